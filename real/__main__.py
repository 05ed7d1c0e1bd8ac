"""
The study on a real language model: the same compressors, repairs and statistics, facts about the real world.

    python -m real MODEL                                         # 825 facts about countries, text of the model's own
    python -m real MODEL --facts real/facts/cities.jsonl         # 1,670 cities
    python -m real MODEL --facts mine.jsonl --text mine.txt --device cuda
    python -m real MODEL --task arc=ARC-Easy.jsonl               # tasks in the harness' layouts, study/taskfiles.py

    python -m real MODEL --only "RTN 3 bits, locked: biases, prompt 16"       # a part of it
    python -m real MODEL --facts real/facts/cities.jsonl --device cuda --rows 64 --seeds 3 --lock

MODEL is a Hugging Face folder or a .gguf file. What the facts are and what is read: real/world.py and real/text.py; the
lock, whose answer is known by construction: real/lock.py; learning rates: real/rates.py.
Every step is kept: the same command goes on where it was stopped.
"""
from engine.script import guard  # before torch: Ctrl-C is one line

from functools import partial

from engine.device import device_of
from evaluate import study
from real.guess import guessed
from real.lock import TAG, lock_subjects
from real.rates import faster_in_bfloat16, set_rates
from real.settings import FACTS, LONGEST, STEPS, part_of, real_config
from real.world import RealWorld, read_facts, real_dense
from study.publish import publish
from study.settings import job_parser
from study.steps import Run
from study.taskfiles import fits, read_tasks


def main(arguments=None):
    """The script: see the top of this file, and --help. `arguments` default to the command line's."""
    parser = job_parser("real", "Compress and repair a real language model, and ask it about the world.", sizes=False)
    parser.add_argument("model", help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--facts", default=FACTS, help="JSON lines of question, answer, options, entity")
    parser.add_argument("--text", help="a text file for calibration and repair; else the model writes it")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FILE",
                        help="also a task file in the harness' layout, see taskfiles.py; may be repeated")
    parser.add_argument("--repair-steps", type=int, default=STEPS, help="training steps of a repair")
    parser.add_argument("--rows", type=int, default=16, help="rows of 24 tokens in a step of a repair")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="draw text and repairs K times")
    parser.add_argument("--rates", action="store_true",
                        help="find learning rates on validation entities, in place of those in real/settings.py")
    parser.add_argument("--lock", action="store_true", help="also a lock, whose answer is known by construction")
    parser.add_argument("--only", metavar="PART", help='these damaged models and, behind a colon, these repairs of '
                        'them: "RTN 3 bits, locked: biases, prompt 16"')
    args = parser.parse_args(arguments)
    config = real_config(args.model, args.seed, args.out, args.repair_steps, args.seeds, args.rows, args.facts)
    place = device_of(args)
    config.device, config.dtype = args.device, args.dtype
    config.compressions, config.repairs, locked = part_of(config, args.only, args.lock)
    read_facts(args.facts)  # what is wrong with a file is said before the model is read
    read_tasks(args.task)
    if args.text:  # a missing one would pass for the model's own text, which may be there
        with open(args.text, "rb"):
            pass
    run = Run(config, None)
    run.alone()
    dense, encoding = real_dense(args.model, run.log, *place)
    check = fits(encoding, dense.model.config.context - LONGEST)
    facts, files = read_facts(args.facts, check), read_tasks(args.task, check)
    run.world = RealWorld(run, dense, encoding, facts, args.text)
    dense.about["settings"] |= run.world.settings
    config.repair_bfloat16 = faster_in_bfloat16(run, dense)
    run.describe_reuse()
    if args.rates:
        set_rates(run, dense, locked)
    guess = partial(guessed, run.world.split)
    run.log.say(guess(run.world.asked(config))[1])
    publish(run, dense, study(run, dense, files, (TAG,) if locked else (), lock_subjects, guess))


if __name__ == "__main__":
    guard(main, "real")
