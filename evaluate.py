"""
The study: train, compress, repair, and answer the question - is the knowledge forgotten or displaced?

    python evaluate.py                     # the whole study: out/results.json, out/predictions.jsonl, out/report.html
    python evaluate.py --quick             # the same path through a smaller world, in a minute
    python evaluate.py --full              # adds the next-token twins and the pools trained in other ways
    python evaluate.py --sweep lr          # the sweep behind study.RATES
    python evaluate.py --model M           # the same on a real language model: real.py

The hypothesis, written down before the run. People are split into seen (in the repair's text) and held-out (never in
it). With a(m, s) the recall of model m on split s,

    displaced = (a(repaired, held-out) - a(compressed, held-out)) / (a(dense, held-out) - a(compressed, held-out))
    relearned = the same fraction on seen people, minus displaced

    H0  what compression took is forgotten: displaced = 0, and a repair gains on the people in its text only
    H1  it is displaced: displaced > 0, on people that no repair has read about

Every recall and fraction has a 95 % interval from a paired bootstrap over people (Efron & Tibshirani 1993; 10,000
resamples), and the verdict in words follows from the intervals alone.

What it leaves out: several seeds at once, a correction for many comparisons, tasks beyond recall and perplexity.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict

import numpy as np
import tiktoken
import torch

import analyze
import data
import harness
import idp
import real
import recover
import report
from study import (OPERATIONS, Log, World, all_subjects, dense_subject, guard, options, read_json, sized,
                   slug, step, sweep_rates, write_text)
from tasks import Subject, perplexity


# ---- statistics

def resampled(scores, resamples, generator, sizes=None):
    """Bootstrap means (resamples, models) of scores (people, models): people are drawn with replacement, the same for
    all models.

    sizes  (people,) facts of each; scores are then sums over a person's facts, and the means are a fact's
    """
    n = len(scores)
    draws = torch.randint(n, (resamples, n), generator=generator)
    counts = torch.zeros(resamples, n).scatter_add_(1, draws, torch.ones(resamples, n)).double()
    total = n if sizes is None else counts @ torch.as_tensor(sizes, dtype=torch.float64)[:, None]
    return counts @ torch.as_tensor(scores, dtype=torch.float64) / total


def by_person(columns, facts):
    """Scores of single facts, columns (models, facts), summed by whom they are about: (people, models), and (people,)
    the facts of each."""
    where = {person: i for i, person in enumerate(dict.fromkeys(f.person for f in facts))}
    index = [where[f.person] for f in facts]
    sums = np.zeros((len(where), len(columns)))
    np.add.at(sums, index, np.array(columns, dtype=float).T)
    return sums, np.bincount(index, minlength=len(where))


def interval(samples):
    """The middle 95 % of bootstrap samples, [low, high]; samples that are not finite make it [None, None]."""
    samples = np.asarray(samples)
    if not np.isfinite(samples).all():
        return [None, None]
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])]


def fractions(dense, compressed, repaired):
    """displaced and relearned (module docstring) from recalls by split: numbers, or arrays of bootstrap samples."""
    with np.errstate(divide="ignore", invalid="ignore"):
        back = {s: (repaired[s] - compressed[s]) / (dense[s] - compressed[s]) for s in ("seen", "heldout")}
        return back["heldout"], back["seen"] - back["heldout"]


def clause(value, bounds, gains, loses, neither):
    """One clause of a verdict: which side of zero the whole interval lies on, if it lies on one."""
    low, high = bounds
    return f"{gains if low > 0 else loses if high < 0 else neither} {value:.0%} [{low:.0%}, {high:.0%}]"


def verdict(model):
    """What the intervals of one repaired model say in words: nothing in it is judged by hand."""
    value, bounds = model["metrics"], model["intervals"]
    if None in bounds["displaced"] + bounds["relearned"]:
        return "compression took too little recall to divide by"
    return (clause(value["displaced"], bounds["displaced"], "held-out facts come back, displaced",
                   "held-out facts are lost further, displaced",
                   "held-out recall not distinguishable from unrepaired, displaced")
            + "; " + clause(value["relearned"], bounds["relearned"], "seen facts gain more, re-learned",
                            "seen facts gain less, re-learned", "seen facts gain as much, re-learned"))


# ---- measuring one subject

def measure(subject, world, config):
    """What a subject answers and how well it reads: {"facts": {split: [answers]}, "perplexity": float}."""
    return {"facts": {split: world.answer(subject, facts) for split, facts in world.asked(config).items()},
            "perplexity": perplexity(subject, world.windows)}


def milliseconds(subjects, world, rounds):
    """Median milliseconds to answer one question, alone, {id: ms}; the subjects take turns."""
    fact = world.facts("heldout", 1)[:1]
    took = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            began = time.perf_counter()
            world.answer(subject, fact)
            took[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(t) for name, t in took.items()}


def look_inside(subjects, world):
    """Attention and block outputs of every subject against the dense model's, on held-out text: {id: similarity}."""
    return {s.about["id"]: analyze.similarity(s, subjects[0], world.inside) for s in subjects}


def ablation(subject, base, world, config):
    """Every way to choose from a repaired subject's pool on each fact, and attention against log-probability."""
    facts, validation = (world.facts(split, config.ablation_people) for split in ("heldout", "validation"))
    pool, generator = idp.PromptPool(subject.about["tensors"]), torch.Generator().manual_seed(config.seed + 4)
    out, each = analyze.selectors(base.model, pool, facts, validation, world.encoding, generator)
    chosen = idp.highest(each["attention"])
    by_attribute = {a: torch.bincount(chosen[[f.attribute == a for f in facts]], minlength=len(pool)).tolist()
                    for a in data.VALUES}
    gain = each["logprob"] - each["logprob"].mean(1, keepdim=True)
    points = torch.stack([each["attention"], gain], dim=-1).flatten(0, 1)
    return {"rows": [{"name": name, "right": right.tolist(), "passes": n} for name, (right, n) in out.items()],
            "rho": analyze.rank_correlation(each["attention"], each["logprob"]).tolist(),
            "chosen": torch.bincount(chosen, minlength=gain.shape[1]).tolist(), "by_attribute": by_attribute,
            "points": points[::max(1, len(points) // 500)][:500].tolist()}


def summary(ablated, facts, config):
    """The ablation with intervals over people in place of single facts; `facts` are those it asked."""
    generator = torch.Generator().manual_seed(config.seed + 5)
    columns = [row["right"] for row in ablated["rows"]] + [ablated["rho"]]
    people, sizes = by_person(columns, facts)
    samples, means = resampled(people, 10_000, generator, sizes).numpy(), people.sum(0) / sizes.sum()
    rule = samples[:, 0]
    rows = [{"name": row["name"], "recall": float(means[i]), "interval": interval(samples[:, i]),
             "over_rule": interval(samples[:, i] - rule), "extra_passes": row["passes"]}
            for i, row in enumerate(ablated["rows"])]
    return {"selectors": rows,
            "correlation": {"rho": float(means[-1]), "interval": interval(samples[:, -1])},
            **{key: ablated[key] for key in ("chosen", "by_attribute", "points")}}


def context_check(subject, world, config):
    """Held-out recall with and without 24 tokens of unrelated text in front: what every prompt's result rests on."""
    facts = world.facts("heldout", config.test_people)
    with torch.no_grad():
        prompt = subject.model.wte(world.unrelated())
        filled = idp.prefill(subject.model, idp.PromptPool([prompt]))
    recall = [sum(a["correct"] for a in world.answer(s, facts)) / len(facts)
              for s in (subject, Subject(subject.model, filled))]
    return {"alone": recall[0], "behind_24_tokens": recall[1]}


# ---- the main job

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
    ("ms_per_question", "ms a question", "ms", False, "median time to answer one question alone"),
]


def study(dense, config, world, log, files=None):
    """The whole study of one dense model -> (results, predictions): what results.json and predictions.jsonl hold.

    files  {task: its Questions} to ask of every model beside the facts, see harness.py
    """
    subjects = all_subjects(dense, config, world, log)
    measured = {}
    for subject in subjects:
        about = subject.about
        path = os.path.join(config.out, about["id"] + ".answers.json")
        measured[about["id"]] = step(log, path, {**about["settings"], "test_people": config.test_people},
                                     lambda: measure(subject, world, config),
                                     lambda result, path: write_text(path, json.dumps(result)), read_json)
    ms = step(log, os.path.join(config.out, "milliseconds.json"), [s.about["settings"] for s in subjects],
              lambda: milliseconds({s.about["id"]: s for s in subjects}, world, config.timing_rounds),
              lambda result, path: write_text(path, json.dumps(result)), read_json)
    models = [{**{k: s.about[k] for k in ("id", "tag", "base", "operation", "layers")},
               "metrics": {**costs(s), "perplexity": measured[s.about["id"]]["perplexity"],
                           "ms_per_question": ms[s.about["id"]]},
               "intervals": {}, "verdict": None} for s in subjects]
    add_recalls(models, measured, world.asked(config), config)
    add_files(models, subjects, files or {}, world, config, log)
    inside = step(log, os.path.join(config.out, "similarity.json"), [s.about["settings"] for s in subjects],
                  lambda: look_inside(subjects, world), lambda result, path: write_text(path, json.dumps(result)),
                  read_json)
    where = {s.about["id"]: s for s in subjects}
    for subject, model in zip(subjects, models):
        model["similarity"] = inside[model["id"]]
        if subject.about.get("kind") == "idp" and config.ablation_people:
            path = os.path.join(config.out, model["id"] + ".selectors.json")
            ablated = step(log, path, {**subject.about["settings"], "people": config.ablation_people},
                           lambda: ablation(subject, where[model["base"]], world, config),
                           lambda result, path: write_text(path, json.dumps(result)), read_json)
            model["idp"] = summary(ablated, world.facts("heldout", config.ablation_people), config)
    context = step(log, os.path.join(config.out, "context.json"), subjects[0].about["settings"],
                   lambda: context_check(subjects[0], world, config),
                   lambda result, path: write_text(path, json.dumps(result)), read_json)
    return {"name": world.name, "settings": asdict(config), "seed": config.seed, "models": models,
            "context": context,
            "metrics": [dict(zip(("name", "label", "unit", "higher_is_better", "description"), m))
                        for m in [*METRICS, *harness.metrics(files or {})]
                        if any(m[0] in model["metrics"] for model in models)],
            "files": {name: len(questions) for name, questions in (files or {}).items()},
            "operations": [{"name": n, "parameters": None, "description": d} for n, d in OPERATIONS.items()],
            "verdicts": [{"base": m["base"], "text": f"{m['tag']}: {m['verdict']}"} for m in models if m["verdict"]],
            "hypothesis": "H0: displaced = 0. H1: displaced > 0 on people that no repair has read about."
            }, predictions(subjects, measured, world, config)


def costs(subject):
    """What a subject takes: bits a weight of the blocks' linear layers, bytes on disk, extra parameters."""
    bits = weights = 0
    for layer in subject.model.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            zeros = int((layer.weight == 0).sum())
            mask = layer.weight.numel() if zeros > layer.weight.numel() / 32 else 0  # as `save` stores it
            bits += mask + 32 * (layer.weight.numel() - (zeros if mask else 0))
            weights += layer.weight.numel()
        elif recover.shape_of(layer):  # packed
            bits += 8 * sum(t.nbytes for t in layer.buffers())
            weights += layer.in_features * layer.out_features
    stored = subject.about.get("bytes") or os.path.getsize(subject.about["path"])
    return {"bits_per_weight": bits / weights, "bytes": stored + 4 * subject.about["extra"],
            "extra_parameters": subject.about["extra"]}


def add_recalls(models, measured, asked, config):
    """Recalls, fractions, intervals and verdicts from each person's right answers: all models on the same people."""
    generator = torch.Generator().manual_seed(config.seed + 3)
    where = {m["id"]: i for i, m in enumerate(models)}
    means, samples = {}, {}
    for split, facts in asked.items():
        people, sizes = by_person([[a["correct"] for a in measured[m["id"]]["facts"][split]] for m in models], facts)
        means[split] = people.sum(0) / sizes.sum()  # (models,)
        samples[split] = resampled(people, 10_000, generator, sizes).numpy()
        for i, m in enumerate(models):
            m["metrics"][f"recall_{split}"] = float(means[split][i])
            m["intervals"][f"recall_{split}"] = interval(samples[split][:, i])
    for i, m in enumerate(models):
        base = where.get(m["base"])
        if base in (None, 0):
            continue
        for name, value, drawn in zip(("displaced", "relearned"),
                                      fractions(*({s: means[s][j] for s in means} for j in (0, base, i))),
                                      fractions(*({s: samples[s][:, j] for s in means} for j in (0, base, i)))):
            m["metrics"][name] = float(value) if np.isfinite(value) else None
            m["intervals"][name] = interval(drawn)
        m["verdict"] = verdict(m)


def add_files(models, subjects, files, world, config, log):
    """Every model's score on task files {task: Questions}, as metrics "task metric" with an interval over questions."""
    for name, questions in files.items():
        for subject, model in zip(subjects, models):
            settings = {**subject.about["settings"], "questions": real.digest(questions)}
            path = os.path.join(config.out, f"{model['id']}.{slug(name)}.json")
            scores = step(log, path, settings, lambda: harness.score(subject, name, questions, world.encoding),
                          lambda result, path: write_text(path, json.dumps(result)), read_json)
            generator = torch.Generator().manual_seed(config.seed + 7)
            for metric, values in scores.items():
                low, high = interval(resampled(np.array(values)[:, None], 10_000, generator)[:, 0])
                metric, (value, low, high) = harness.headline(metric, (np.mean(values), low, high))
                model["metrics"][f"{name} {metric}"], model["intervals"][f"{name} {metric}"] = value, [low, high]


def predictions(subjects, measured, world, config):
    """A row a fact a model, as dicts: what predictions.jsonl holds."""
    for subject in subjects:
        for split, answers in measured[subject.about["id"]]["facts"].items():
            for fact, given in zip(world.asked(config)[split], answers):
                yield {"model": subject.about["id"], "split": split, "person": fact.person, "attribute": fact.attribute,
                       "question": fact.question, "gold": fact.answer.strip(), **given}


SPLIT_NAMES = {"seen": "seen", "heldout": "held-out", "novel": "novel"}


def table(results):
    """The result as a Markdown table, a row a model; recalls in percent with their 95 % intervals."""
    def percent(m, name):
        if m["metrics"].get(name) is None:
            return ""
        low, high = m["intervals"][name]
        bounds = f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None else ""
        return f"{100 * m['metrics'][name]:.1f}{bounds}"
    splits = {f"recall_{split}": f"{name} %" for split, name in SPLIT_NAMES.items()
              if f"recall_{split}" in results["models"][0]["metrics"]}
    lines = ["| " + " | ".join(["model", "bits a weight", "KB on disk", "extra parameters", "perplexity",
                                *splits.values(), "displaced %", "re-learned %", "ms"]) + " |",
             "|---" + "|---:" * (7 + len(splits)) + "|"]
    for m in results["models"]:
        v = m["metrics"]
        tag = m["tag"] if m["base"] in (None, "dense") else "+ " + m["tag"]
        lines.append(f"| {tag} | {v['bits_per_weight']:.2f} | {v['bytes'] / 1000:.0f} | {v['extra_parameters']:,} "
                     f"| {v['perplexity']:.2f} | {' | '.join(percent(m, split) for split in splits)} "
                     f"| {percent(m, 'displaced')} | {percent(m, 'relearned')} | {v['ms_per_question']:.1f} |")
    return "\n".join(lines)


def file_table(results):
    """The scores on task files, as a Markdown table, a row a model."""
    names = [m["name"] for m in results["metrics"] if m["name"].split(" ")[0] in results["files"]]
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for m in results["models"]:
        cells = [f"{m['metrics'][name]:.3f} [{m['intervals'][name][0]:.3f}, {m['intervals'][name][1]:.3f}]"
                 for name in names]
        lines.append(f"| {m['id']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def selector_table(model):
    """The ways to choose from one pool, as a Markdown table."""
    lines = ["| choice | held-out % | over the paper's rule, points | extra passes |", "|---|---:|---:|---:|"]
    for row in model["idp"]["selectors"]:
        low, high = row["interval"]
        over = "[{:+.1f}, {:+.1f}]".format(*(100 * x for x in row["over_rule"]))
        lines.append(f"| {row['name']} | {100 * row['recall']:.1f} [{100 * low:.1f}, {100 * high:.1f}] "
                     f"| {over} | {row['extra_passes']} |")
    c = model["idp"]["correlation"]
    bounds = "[{:+.3f}, {:+.3f}]".format(*c["interval"])
    return "\n".join(lines) + (f"\n\nrank correlation of attention with the right answer's log-probability: "
                              f"{c['rho']:+.3f} {bounds}; chosen: {model['idp']['chosen']}")


def write_results(results, rows, config, log):
    """out/results.json, out/predictions.jsonl and the page made of them."""
    results |= {"command": "python " + " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
                "created": time.strftime("%Y-%m-%dT%H:%M:%S"), "seconds": time.time() - log.began, "times": log.times,
                "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                             "tiktoken": tiktoken.__version__, "platform": platform.platform()}}
    write_text(os.path.join(config.out, "results.json"), json.dumps(results, indent=1))
    write_text(os.path.join(config.out, "predictions.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    report.write_report(os.path.join(config.out, "results.json"), os.path.join(config.out, "report.html"))


def show(results, out):
    print(table(results))
    if results["files"]:
        print("\n" + file_table(results))
    for model in results["models"]:
        if model.get("idp"):
            print(f"\n{model['id']}: one pool, every way to choose\n\n{selector_table(model)}")
    print()
    for line in results["verdicts"]:
        print(f"{line['base']}, {line['text']}")
    print(f"24 unrelated tokens in front of every question: held-out recall {results['context']['alone']:.1%} -> "
          f"{results['context']['behind_24_tokens']:.1%}")
    print(f"{results['seconds']:.0f} s; {out}/results.json, {out}/predictions.jsonl; to explore: {out}/report.html")


def main():
    parser = options("Train, compress, repair, and say whether the knowledge was forgotten or displaced.")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="the same as --size quick")
    parser.add_argument("--full", action="store_true", help="also the next-token twins, and pools trained jointly and competitively")
    parser.add_argument("--sweep", choices=["lr"], help="only try the learning rates, on the validation people")
    parser.add_argument("--model", help="a real language model: a Hugging Face folder or a GGUF file")
    parser.add_argument("--facts", default=real.FACTS, help="with --model: JSON lines of question, answer, options, entity")
    parser.add_argument("--text", help="with --model: a text file for calibration and repair; else the model writes it")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FILE",
                        help="with --model: also a task file in the harness' layout, see harness.py; may be repeated")
    parser.add_argument("--repair-steps", type=int, default=real.STEPS, help="with --model: training steps of a repair")
    args = parser.parse_args()

    def run():
        log = Log()
        files = dict(real.named(task) for task in args.task)
        if (files or args.text) and not args.model:
            raise ValueError("--task and --text are for a real language model: name one with --model")
        if args.model:
            config = real.real_config(args.model, args.seed, args.out, args.repair_steps)
            facts = real.read_facts(args.facts)
            dense, encoding = real.real_dense(args.model, log)
            world = real.RealWorld(dense.model, encoding, facts, config, log, args.text)
            dense.about["settings"] |= world.settings
        else:
            config = sized(args.size, args.seed, args.out, full=args.full)
            world = World(config)
            dense = dense_subject(config, world, log)
        if args.sweep:
            return sweep_rates(dense, config, world, log)
        results, rows = study(dense, config, world, log, files)
        write_results(results, rows, config, log)
        show(results, config.out)
    guard(run)


if __name__ == "__main__":
    main()
