"""
Ask checkpoints the facts of the world that they were trained on: right answers, log-probabilities, a few examples.

    python -m study ask --model tests/golden/trained/dense.safetensors tests/golden/trained/gptq-3-bits.safetensors
    python -m study ask --model out/gptq-3-bits.safetensors

Which world a checkpoint knows stands beside it: in FILE.made.json, where the study made it, or in world.json. The
world's sizes and seed are all there is to know: the same people come of them again (world/facts.py).

What it leaves out: repairs (`python -m study repair`), models that know no invented people (`python -m real`).
"""
import argparse
import os

import torch

from checkpoints import read_model
from checkpoints.compression import parameters
from engine.device import add_device, device_of
from engine.files import read_json
from study.statistics import by_person, interval, recalls_of, resampled
from study.tables import SPLIT_NAMES, markdown, share
from world.facts import WorldConfig, facts_about, make_world, sample
from world.score import Subject, answer

TRAINED = os.path.join("tests", "golden", "trained")  # a small GPT that comes with the project


def read_world(model, facts=None):
    """The WorldConfig of a checkpoint: of the file `facts`, or of FILE.made.json or world.json beside it.

    Raises ValueError for a file that holds none, OSError where there is no file.
    """
    beside = [model + ".made.json", os.path.join(os.path.dirname(model), "world.json")]
    path = facts or next(filter(os.path.exists, beside), None)
    if path is None:
        raise ValueError(f"{model}: no {' or '.join(map(os.path.basename, beside))} beside it says which world it "
                         "knows: name such a file with --facts")
    fields = read_json(path)
    if isinstance(fields.get("settings"), dict):  # the mark of a step that made the model
        fields = fields["settings"].get("world")
    try:
        if fields.keys() != WorldConfig.__dataclass_fields__.keys() or {*map(type, fields.values())} != {int}:
            raise TypeError
        return WorldConfig(**fields)
    except (TypeError, AttributeError):
        raise ValueError(f"{path}: not the settings of a world: {', '.join(WorldConfig.__dataclass_fields__)}, "
                         "all whole numbers") from None


def facts_by_split(config, people=None):
    """{split: facts} of the seen, held-out and novel people, of `people` of each split, drawn as the study draws."""
    everybody = make_world(config)
    return {split: facts_about(sample([p for p in everybody if p.split == split], people)) for split in SPLIT_NAMES}


def recall(answers, facts):
    """[mean, low, high] of right answers, the interval over people."""
    return recalls_of([[row["correct"] for row in answers]], facts, torch.Generator().manual_seed(0))[0]


def mean(answers, facts, key):
    """"-1.23 [-1.40, -1.07]" of one number an answer."""
    sums, sizes = by_person([[row[key] for row in answers]], facts)
    low, high = interval(resampled(sums, 10_000, torch.Generator().manual_seed(0), sizes)[:, 0])
    return f"{sums.sum() / sizes.sum():.2f} [{low:.2f}, {high:.2f}]"


def main(arguments):
    """python -m study ask"""
    parser = argparse.ArgumentParser(prog="study ask", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Ask checkpoints the facts of the world that they were trained on.")
    parser.add_argument("--model", nargs="+", metavar="FILE", default=[os.path.join(TRAINED, "dense.safetensors")],
                        help="checkpoints of this study")
    parser.add_argument("--facts", metavar="FILE",
                        help="a world.json, or the .made.json of a step; none: beside each model")
    parser.add_argument("--people", type=int, default=500, help="of each split, at most")
    parser.add_argument("--show", type=int, default=3, help="answers of each split to print, the first wrong ones")
    add_device(parser)
    args = parser.parse_args(arguments)
    device, dtype = device_of(args)
    if args.people < 1 or args.show < 0:
        raise ValueError(f"--people must be at least 1 and --show at least 0, got {args.people} and {args.show}")
    rows, shown = [], []
    for path in args.model:
        model, encoding = read_model(path)
        if encoding is None:
            raise ValueError(f"{path}: no tokenizer in it, and no tokens.tiktoken beside it")
        subject = Subject(model.to(device, dtype).eval(), about={"id": path})
        asked = facts_by_split(read_world(path, args.facts), args.people)
        name = os.path.basename(path).removesuffix(".safetensors")
        shown.append(f"\n{path}: {parameters(model):,} parameters, {os.path.getsize(path):,} bytes")
        for split, facts in asked.items():
            answers = answer(subject, facts, encoding)
            rows.append([name, SPLIT_NAMES[split], f"{len(facts):,}", share(recall(answers, facts)),
                         mean(answers, facts, "logprob"), mean(answers, facts, "knowledge")])
            first = sorted(zip(answers, facts), key=wrong_first)[:args.show]
            shown += [f"  {split:8s} {f.question} {a['answer']}    (gold: {f.answer.strip()}; {a['logprob']:.2f})"
                      for a, f in first]
    print(markdown(["model", "split", "facts", "right %", "log-probability", "knowledge"], rows, 2))
    print("\nlog-probability of the right answer, in nats; knowledge: the same among all values of its attribute. 95 % "
          "intervals over people.")
    print("\n".join(shown))


def wrong_first(pair):
    """Sorts (answer, fact) by whether the answer is right."""
    return pair[0]["correct"]
