"""
Single steps of the study as scripts: train the dense GPT, compress it, repair what came out. The last two ask before
and after.
"""
import math
import os

from checkpoints.compression import print_layers
from study.settings import KIND_RATES, config_of, job_parser
from study.steps import Run
from study.subjects import compressed_subject, dense_subject, repair_batches, repaired_subject
from study.training import RECIPE
from world.score import answer
from world.small import World

MOST = 1000  # a LoRA's rank, tokens of a prompt, prompts of a pool


def train_job(arguments):
    """python -m study train: the dense GPT, and a few of its answers."""
    parser = job_parser("study train", "Train the dense GPT on the small world, and ask it questions.")
    parser.add_argument("--without", choices=list(RECIPE), default="",
                        help="leave one ingredient of the training out, to see what it buys; in OUT/without-...")
    args = parser.parse_args(arguments)
    config = config_of(args, without=args.without)
    if args.without:
        config.out = os.path.join(config.out, f"without-{args.without}")
    run = Run(config, World(config))
    dense = dense_subject(run)
    for split, facts in run.world.asked(config).items():
        for fact, given in zip(facts[:5], answer(dense, facts[:5], run.world.encoding)):
            print(f"{split:8s} {fact.question} {given['answer']}    (gold: {fact.answer.strip()})")
    print_recalls(run, {"dense": dense})


def compress_job(arguments):
    """python -m study compress: one of the study's compressions."""
    parser = job_parser("study compress", "Compress the dense GPT; ask it before and after.")
    parser.add_argument("--tag", help='how: "RTN 3 bits", ...; none: with GPTQ')
    args = parser.parse_args(arguments)
    config = config_of(args)
    tag, run = tag_of(config, args.tag), Run(config, World(config))
    dense = dense_subject(run)
    small = compressed_subject(run, dense, tag)
    print_layers(small.about["layers"])
    print_recalls(run, {"dense": dense, tag: small})


def repair_job(arguments):
    """python -m study repair: one repair of one compressed model."""
    parser = job_parser("study repair", "Repair a compressed model of the small world; ask it before and after.")
    parser.add_argument("--base", help='what to repair: "RTN 3 bits", ...; none: what GPTQ made')
    parser.add_argument("--method", choices=["lora", "prompt", "prefix", "idp", "bias"], default="lora", help="how")
    parser.add_argument("--repair-size", type=int, default=8, help="LoRA's rank, or the tokens of a prompt or prefix")
    parser.add_argument("--prompts", type=int, default=4, help="idp: prompts in the pool")
    parser.add_argument("--way", choices=["together", "joint", "competitive", "selected"], default="together",
                        help="idp: how the pool is trained")
    parser.add_argument("--objective", choices=["distillation", "next_token"], default="distillation", help="the loss")
    parser.add_argument("--lr", type=float, help="peak learning rate; none: the study's for repairs of this kind")
    args = parser.parse_args(arguments)
    config = config_of(args)
    args.lr = KIND_RATES[args.method] if args.lr is None else args.lr
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr must be above 0, got {args.lr:g}")
    if not 1 <= args.repair_size <= MOST or not 1 <= args.prompts <= MOST:
        raise ValueError(f"--repair-size and --prompts must be from 1 to {MOST}, got {args.repair_size} and "
                         f"{args.prompts}")
    base, run = tag_of(config, args.base), Run(config, World(config))
    dense = dense_subject(run)
    base = compressed_subject(run, dense, base)
    size = {"idp": (args.prompts, args.repair_size, args.way), "bias": "o down"}.get(args.method, args.repair_size)
    tag = f"{args.method} {' '.join(map(str, size)) if args.method == 'idp' else size} lr {args.lr:g}"
    tag += ", next token" if args.objective == "next_token" else ""
    repaired = repaired_subject(run, base, repair_batches(run, dense), tag, args.method, size, args.objective, args.lr)
    print_recalls(run, {"dense": dense, base.about["tag"]: base, "repaired": repaired})
    print(f"{repaired.about['extra']:,} extra parameters")


def tag_of(config, tag, method="gptq"):
    """The compression that `tag` names among those of this size of the study; without a tag the one by `method`."""
    tag = tag or next(name for name, (_, how, _) in config.compressions.items() if how == method)
    if tag not in config.compressions:
        raise ValueError(f"no compression {tag!r} at --size {config.size}; there are {', '.join(config.compressions)}")
    return tag


def print_recalls(run, subjects):
    """A line a split: what share of its facts each of {name: Subject} answers rightly."""
    for split, facts in run.world.asked(run.config).items():
        right = {name: sum(a["correct"] for a in answer(s, facts, run.world.encoding)) for name, s in subjects.items()}
        print(f"{split:8s} {len(facts):,} facts: "
              + ", ".join(f"{name} {n / len(facts):.1%}" for name, n in right.items()))
