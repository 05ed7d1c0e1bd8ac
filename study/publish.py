"""
What a study leaves behind: results.json, predictions.jsonl, tables.md and the page; and what it prints.
"""
import json
import platform
import shlex
import sys
import time

import numpy as np
import tiktoken
import torch

from engine.files import write_text
from study import page, sweeps, tables, taskfiles

METRICS = [  # name, label, unit, higher is better, what it is
    ("bits_per_weight", "bits a weight", "bits", False, "of the blocks' linear layers, scales and masks included"),
    ("bytes", "bytes on disk", "bytes", False, "the checkpoint file, plus the repair's parameters as float32"),
    ("extra_parameters", "extra parameters", "", False, "what the repair adds"),
    ("perplexity", "perplexity", "", False, "a text token, on sentences about held-out people; prompts not counted"),
    ("recall_seen", "recall, seen", "share", True, "exact match on people in the repair's text"),
    ("recall_heldout", "recall, held-out", "share", True, "exact match on people in pretraining only"),
    ("recall_novel", "recall, novel", "share", True, "exact match on people in no text: what guessing reaches"),
    ("displaced", "displaced", "share", True, "share of the lost held-out recall that came back"),
    ("relearned", "re-learned", "share", False, "share of the lost seen recall that came back, minus displaced"),
    ("unguessed_seen", "recall, seen, not guessable", "share", True, "of facts that cannot be guessed"),
    ("unguessed_heldout", "recall, held-out, not guessable", "share", True, "the same on held-out entities"),
    ("displaced_unguessed", "displaced, not guessable", "share", True, "displaced, of facts that cannot be guessed"),
    ("relearned_unguessed", "re-learned, not guessable", "share", False, "the same on seen entities, minus displaced"),
    ("knowledge_seen", "knowledge, seen", "nats", True,
     "mean log-probability of the right value among its attribute's"),
    ("knowledge_heldout", "knowledge, held-out", "nats", True, "the same on held-out people"),
    ("knowledge_novel", "knowledge, novel", "nats", True, "the same on people in no text"),
    ("displaced_knowledge", "displaced, knowledge", "share", True,
     "share of the lost held-out knowledge that came back"),
    ("relearned_knowledge", "re-learned, knowledge", "share", False, "the same on seen people, minus displaced"),
    ("gain_logprob", "gain", "nats", True, "what the repair adds to the right answer's log-probability, held-out"),
    ("gain_knowledge", "gain, knowledge", "nats", True, "the part of it that tells the right value from others"),
    ("gain_format", "gain, format", "nats", True, "the rest: saying some value of the attribute at all"),
]
RAW = ("answers", "entities", "scores")  # keys of a row that hold single facts: not in results.json


def describe_metrics(rows, files):
    """The metrics that some row has, described for whoever reads results.json."""
    return [dict(zip(("name", "label", "unit", "higher_is_better", "description"), m))
            for m in [*METRICS, *taskfiles.task_metrics(files)] if any(m[0] in row["metrics"] for row in rows)]


def predictions(run, rows):
    """A dict a fact a model: what predictions.jsonl holds."""
    asked = run.world.asked(run.config)
    for row in [row for row in rows if row["group"] == "study"]:  # controls answer about other people
        for split, answers in row["answers"].items():
            for fact, given in zip(asked[split], answers):
                yield {"model": row["id"], "split": split, "person": fact.person, "attribute": fact.attribute,
                       "question": fact.question, "gold": fact.answer.strip(), **given}


def publish(run, dense, results):
    """Print the result; then write results.json, tables.md, predictions.jsonl and, last, the page: each may fail, and
    `| head` may end the printing."""
    log, rows = run.log, results["models"]
    results = {**results, "models": [{k: v for k, v in row.items() if k not in RAW} for row in rows],
               "sweeps": {}, "command": shlex.join(["python", *sys.orig_argv[1:]]),
               "created": time.strftime("%Y-%m-%dT%H:%M:%S"), "seconds": time.time() - log.began, "times": log.times,
               "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                            "tiktoken": tiktoken.__version__, "platform": platform.platform()}}
    try:
        print_result(results)
    finally:  # also where nobody reads on
        write_files(run, dense, results, list(predictions(run, rows)))
    print(f"{results['seconds']:.0f} s; more tables: {run.path('tables.md')}; to explore: {run.path('report.html')}")


def print_result(results):
    """The result on the terminal."""
    print(tables.main_table(results) + "\n")
    context = results["context"]
    print(f"24 unrelated tokens in front of every question: held-out recall {context['alone']:.1%} -> "
          f"{context['behind_24_tokens']:.1%}\n\n{results['headline']}\n")
    for claim in results["claims"]:
        print(f"{claim['verdict']:12s} {claim['statement']}")
    print(flush=True)


def write_files(run, dense, results, told):
    """The result as files; told: the rows of predictions.jsonl."""
    path = run.path("results.json")
    with run.holding("results.json"):  # a sweep adds its points under the same lock
        results["sweeps"] = sweeps.kept(path, dense.about["settings"])
        text = json.dumps(results, indent=1)
        write_text(path, text)
    write_text(run.path("tables.md"), tables.all_tables(results))
    write_text(run.path("predictions.jsonl"), "".join(json.dumps(row) + "\n" for row in told))
    write_text(run.path("report.html"), page.page(json.loads(text), told))
