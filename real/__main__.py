"""
The study on a real language model: `python -m real MODEL`, see real/world.py.
"""
from engine.script import guard
from evaluate import study
from real.world import FACTS, STEPS, RealWorld, read_facts, real_config, real_dense
from study.publish import publish
from study.settings import options
from study.steps import Run
from study.sweeps import sweep_rates
from study.taskfiles import named


def main():
    """The script: see the top of this file, and --help."""
    parser = options("real", "Compress and repair a real language model, and ask it about the world.", sizes=False)
    parser.add_argument("model", help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--facts", default=FACTS, help="JSON lines of question, answer, options, entity")
    parser.add_argument("--text", help="a text file for calibration and repair; else the model writes it")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FILE",
                        help="also a task file in the harness' layout, see taskfiles.py; may be repeated")
    parser.add_argument("--repair-steps", type=int, default=STEPS, help="training steps of a repair")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="draw text and repairs K times")
    parser.add_argument("--sweep", choices=["lr"], help="only try learning rates, on validation entities")
    args = parser.parse_args()

    def job():
        """The whole job, for `guard` to watch."""
        files = dict(map(named, args.task))
        run = Run(real_config(args.model, args.seed, args.out, args.repair_steps, args.seeds), None)
        facts = read_facts(args.facts)
        dense, encoding = real_dense(args.model, run.log)
        run.world = RealWorld(run, dense.model, encoding, facts, args.text)
        dense.about["settings"] |= run.world.settings
        run.describe_reuse()
        if args.sweep:
            return sweep_rates(run, dense)
        publish(run, dense, study(run, dense, files))
    guard(job, "real")


if __name__ == "__main__":
    main()
