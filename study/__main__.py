"""
The jobs on the small world, one at a time: `python -m study` lists them, `python -m study JOB --help` explains one.
"""
import sys

from engine.script import guard  # before torch: Ctrl-C is one line
from study import ask, figure, findings, jobs, mechanism, memory, page, sweeps, trial

JOBS = {  # name: (what runs, what it does)
    "train": (jobs.train_job, "train the dense GPT, with or without an ingredient of its recipe, and ask it"),
    "compress": (jobs.compress_job,
                 "compress it in one of the study's ways: the layers' errors, recall before and after"),
    "repair": (jobs.repair_job, "repair a compressed model in one way: recall before and after"),
    "ask": (ask.main, "ask checkpoints the facts of the world they know; one comes with the project"),
    "sweep": (sweeps.main, "vary one setting: bits, sparsity, damage, size, steps; or lr, on validation people"),
    "trial": (trial.main, "where a pool of prompts should beat one prompt: two locks, and routing by attribute"),
    "why": (mechanism.main, "why one compressor's damage is displaced and another's is not: where layers' errors lie"),
    "findings": (findings.main, "what others found, with our numbers beside it"),
    "figure": (figure.main, "the README's picture: what each repair brings back, from results.json to an SVG"),
    "page": (page.main, "results.json as one page to explore"),
    "memory": (memory.main, "what each step needs in memory, for a model on paper or a real one"),
}


def main():
    """The script: see the top of this file."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m study JOB [--help]\n")
        for job, (_, what) in JOBS.items():
            print(f"  {job:9s} {what}")
        return
    if name not in JOBS:
        print(f"study: no job {name!r}; there are {', '.join(JOBS)}", file=sys.stderr)
        sys.exit(2)
    guard(lambda: JOBS[name][0](arguments), f"study {name}")


if __name__ == "__main__":
    guard(main, "study")
