"""
Makes tests/golden/trained/: a small GPT that knows 900 facts, two compressions of it, and 50 questions.

    python tests/golden/make_trained.py                # a minute; the same command gives the same files on one machine

Trained and compressed as the study does it, smaller: 2 blocks of width 40, so that 3 bits take something. Stored in
float16: what stands in the files is the model, and answers.json holds what the files answer in float32.
"""
import argparse
import json
import pathlib
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from checkpoints import load, save  # noqa: E402
from checkpoints.vocabulary import save_ranks  # noqa: E402
from compress import compress  # noqa: E402
from engine.files import write_text  # noqa: E402
from engine.script import guard  # noqa: E402
from recover import FitConfig  # noqa: E402
from study.settings import StudyConfig  # noqa: E402
from study.steps import Log  # noqa: E402
from study.training import train_dense  # noqa: E402
from world.facts import WorldConfig  # noqa: E402
from world.score import Subject, answer  # noqa: E402
from world.small import World  # noqa: E402

WORLD = WorldConfig(seen=80, heldout=80, validation=20, novel=20, vocab_size=512)
COMPRESSIONS = {"gptq-3-bits": ("gptq", {"bits": 3}), "sparsegpt-50": ("sparsegpt", {"sparsity": 0.5})}
PEOPLE = {"seen": 4, "heldout": 4, "novel": 2}  # of each split whose five facts stand in answers.json


def study_config():
    """How the dense GPT is trained, and how much text compression is calibrated on."""
    return StudyConfig(world=replace(WORLD), gpt={"n_layer": 2, "n_embd": 40, "context": 64}, calibration=(128, 64),
                       pretrain=FitConfig(steps=2000, lr=4e-3, muon=0.02, weight_decay=0.1), pretrain_batch=(16, 64))


def make(folder):
    """All files of the folder."""
    config = study_config()
    world = World(config)
    dense = train_dense(SimpleNamespace(config=config, world=world, log=Log()))
    save(dense.half(), folder / "dense.safetensors")
    dense = load(folder / "dense.safetensors").float()
    calibration = world.calibration(config)
    world.check_leaks(calibration)
    for name, (method, settings) in COMPRESSIONS.items():
        model, _ = compress(dense, calibration, method, **settings)
        save(model.half(), folder / f"{name}.safetensors")
    save_ranks(world.ranks, folder / "tokens.tiktoken")
    write_text(folder / "world.json", json.dumps(asdict(WORLD)) + "\n")
    write_text(folder / "answers.json", answers(folder, world))


def answers(folder, world):
    """JSON: the questions, and what each model answers, one line a question."""
    facts = [f for split, people in PEOPLE.items() for f in world.facts(split, people)]
    given = {name: answer(Subject(load(folder / f"{name}.safetensors").float()), facts, world.encoding)
             for name in ("dense", *COMPRESSIONS)}
    def entry(row):
        """What answers.json keeps of an answer."""
        return {"answer": row["answer"], "correct": row["correct"], "logprob": round(row["logprob"], 6)}
    rows = [{"person": f.person, "split": f.split, "attribute": f.attribute, "question": f.question,
             "gold": f.answer.strip(), **{name: entry(answers[i]) for name, answers in given.items()}}
            for i, f in enumerate(facts)]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main():
    """The script: see the top of this file."""
    parser = argparse.ArgumentParser(description="Make tests/golden/trained/.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "tests" / "golden" / "trained"), help="the folder")
    args = parser.parse_args()
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    make(folder)


if __name__ == "__main__":
    guard(main)
