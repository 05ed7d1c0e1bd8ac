"""
The study on a real language model: the same compressors, repairs and statistics, facts about the real world.

    python -m real MODEL                                         # 825 facts about countries, text of the model's own
    python -m real MODEL --facts real/facts/cities.jsonl         # 1,670 cities
    python -m real MODEL --facts mine.jsonl --text mine.txt --device cuda
    python -m real MODEL --task arc=ARC-Easy.jsonl               # tasks in the harness' layouts, study/taskfiles.py

MODEL is a Hugging Face folder or a .gguf file. What the facts are and what is read: real/world.py and real/text.py.
"""
import torch

from engine.script import guard
from evaluate import study
from real.settings import FACTS, LONGEST, STEPS, real_config
from real.world import RealWorld, read_facts, real_dense
from study.publish import publish
from study.settings import options
from study.steps import Run
from study.sweeps import sweep_rates
from study.taskfiles import fits, named


def main():
    """The script: see the top of this file, and --help."""
    parser = options("real", "Compress and repair a real language model, and ask it about the world.", sizes=False)
    parser.add_argument("model", help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--facts", default=FACTS, help="JSON lines of question, answer, options, entity")
    parser.add_argument("--text", help="a text file for calibration and repair; else the model writes it")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FILE",
                        help="also a task file in the harness' layout, see taskfiles.py; may be repeated")
    parser.add_argument("--repair-steps", type=int, default=STEPS, help="training steps of a repair")
    parser.add_argument("--rows", type=int, default=16, help="rows of 24 tokens in a step of a repair")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="draw text and repairs K times")
    parser.add_argument("--device", default="cpu", help="where the model computes: cpu, cuda, mps")
    parser.add_argument("--sweep", choices=["lr"], help="only try learning rates, on validation entities")
    args = parser.parse_args()

    def job():
        """The whole job, for `guard` to watch."""
        config = real_config(args.model, args.seed, args.out, args.repair_steps, args.seeds, args.rows)
        read_facts(args.facts)  # what is wrong with a file is said before the model is read
        named(args.task)
        run = Run(config, None)
        dense, encoding = real_dense(args.model, run.log, torch.device(args.device))
        check = fits(encoding, dense.model.config.context - LONGEST)
        facts, files = read_facts(args.facts, check), named(args.task, check)
        run.world = RealWorld(run, dense, encoding, facts, args.text)
        dense.about["settings"] |= run.world.settings
        run.describe_reuse()
        if args.sweep:
            return sweep_rates(run, dense)
        publish(run, dense, study(run, dense, files, controls=()))
    guard(job, "real")


if __name__ == "__main__":
    main()
