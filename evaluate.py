"""
The study: train, compress, repair, and answer the question - is the knowledge forgotten or displaced?

    python evaluate.py                     # the whole study: out/results.json, out/predictions.jsonl, out/report.html
    python evaluate.py --quick             # the same path through a smaller world, in a minute
    python evaluate.py --full              # adds the next-token twins and the pools trained in other ways
    python evaluate.py --seeds 3           # compression data, repair and prompts drawn three times: adds the spread
    python evaluate.py --size medium       # a second GPT, which has also been taught to read, compare and follow
    python -m study                        # single steps, and sweeps of one setting
    python -m real MODEL                   # the same on a real language model

The hypothesis, written down before the run. People are split into seen (in the repair's text) and held-out (never in
it). With a(m, s) the recall of model m on split s,

    displaced = (a(repaired, held-out) - a(compressed, held-out)) / (a(dense, held-out) - a(compressed, held-out))
    relearned = the same fraction on seen people, minus displaced

    H0  what compression took is forgotten: displaced = 0, and a repair gains on the people in its text only
    H1  it is displaced: displaced > 0, on people that no repair has read about

Every recall and fraction has a 95 % interval from a paired bootstrap over people (Efron & Tibshirani 1993; 10,000
resamples); every model is compared with the one it was made from by an exact test of the flips, all corrected together
(compare.py). The verdict in words follows from these alone.
"""
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import tiktoken
import torch

import idp
import recover
from engine.script import guard, write_text
from study import comparisons, findings, page, pools, sweeps, taskfiles
from study.settings import OPERATIONS, StudyConfig, options, sized
from study.statistics import by_person, interval, resampled
from study.steps import Log, digest, json_step, slug
from study.subjects import all_subjects, dense_subject, make_pool
from world.score import Subject, answer, perplexity
from world.small import World


# ---- forgotten or displaced

def fractions(dense, compressed, repaired):
    """displaced and relearned (module docstring) from recalls by split: numbers, or arrays of bootstrap samples."""
    with np.errstate(divide="ignore", invalid="ignore"):
        back = {s: (repaired[s] - compressed[s]) / (dense[s] - compressed[s]) for s in ("seen", "heldout")}
        return back["heldout"], back["seen"] - back["heldout"]


def clause(value, bounds, gains, loses, neither):
    """One clause of a verdict: which side of zero the whole interval lies on, if it lies on one."""
    low, high = bounds
    return f"{gains if low > 0 else loses if high < 0 else neither} {value:.0%} [{low:.0%}, {high:.0%}]"


def verdict(model, tests, reach=None):
    """What one repaired model's tests and intervals say in words: nothing in it is judged by hand.

    tests  its comparison with the unrepaired model on held-out recall, one a seed: the corrected p of each must be
           below 0.05, and all must agree on the side, for anything to be claimed
    reach  the smallest displaced share that the first of them would find four times in five
    """
    value, bounds = model["metrics"], model["intervals"]
    if None in bounds["displaced"] + bounds["relearned"]:
        return "compression took too little recall to divide by"
    sides = {(t["difference"] > 0) - (t["difference"] < 0) if t["p_holm"] < 0.05 else 0 for t in tests}
    said = {(1,): "held-out facts come back", (-1,): "held-out facts are lost further"}.get(
        tuple(sides), "held-out recall not distinguishable from unrepaired")
    low, high = bounds["displaced"]
    power = f", detectable from {reach:.0%}" if reach else ""
    return (f"{said}, displaced {value['displaced']:.0%} [{low:.0%}, {high:.0%}]{power}; "
            + clause(value["relearned"], bounds["relearned"], "seen facts gain more, re-learned",
                     "seen facts gain less, re-learned", "seen facts gain as much, re-learned"))


# ---- measuring one subject

def measure(subject, world, config):
    """What a subject answers and how well it reads: {"facts": {split: [answers]}, "perplexity": float}."""
    return {"facts": {split: answer(subject, facts, world.encoding) for split, facts in world.asked(config).items()},
            "perplexity": perplexity(subject, world.windows)}


def ask_all(subjects, config, world, log):
    """What every subject answers, {id: see measure}: asked once, then read from its file."""
    return {s.about["id"]: json_step(log, os.path.join(config.out, s.about["id"] + ".answers.json"),
                                     {**s.about["settings"], "test_people": config.test_people},
                                     lambda: measure(s, world, config)) for s in subjects}


def repeated(dense, subjects, measured, config, world, log):
    """The runs of the other seeds: compression data, repair and prompts drawn anew. Named as the first run's models."""
    for repeat in range(1, config.seeds):
        log.say(f"seed {repeat + 1} of {config.seeds}")
        others = all_subjects(dense, replace(config, repeat=repeat), world, log)
        run = ask_all(others[1:], config, world, log)
        yield {dense.about["id"]: measured[dense.about["id"]],
               **{s.about["id"]: run[o.about["id"]] for s, o in zip(subjects[1:], others[1:])}}


def milliseconds(subjects, world, rounds):
    """Median milliseconds to answer one question, alone, {id: ms}; the subjects take turns."""
    fact = world.facts("heldout", 1)[:1]
    took = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            began = time.perf_counter()
            answer(subject, fact, world.encoding)
            took[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(t) for name, t in took.items()}


def look_inside(subjects, world):
    """Attention and block outputs of every subject against the dense model's, on held-out text: {id: similarity}."""
    return {s.about["id"]: pools.similarity(s, subjects[0], world.inside) for s in subjects}


def ablation(subject, base, world, config):
    """Every way to choose from a repaired subject's pool on each fact, and attention against log-probability."""
    facts, validation = (world.facts(split, config.ablation_people) for split in ("heldout", "validation"))
    pool = make_pool("idp", subject.about["operation"]["parameters"]["size"], subject.about["tensors"])
    generator = torch.Generator().manual_seed(config.seed + 4)
    out, each = pools.selectors(world.encoding, base.model, pool, facts, validation, generator)
    chosen = idp.highest(each["attention"])
    by_attribute = {a: torch.bincount(chosen[[f.attribute == a for f in facts]], minlength=len(pool)).tolist()
                    for a in dict.fromkeys(f.attribute for f in facts)}
    gain = each["logprob"] - each["logprob"].mean(1, keepdim=True)
    points = torch.stack([each["attention"], gain], dim=-1).flatten(0, 1)
    return {"rows": [{"name": name, "right": right.tolist(), "passes": n} for name, (right, n) in out.items()],
            "rho": pools.rank_correlation(each["attention"], each["logprob"]).tolist(),
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
    recall = [sum(a["correct"] for a in answer(s, facts, world.encoding)) / len(facts)
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

    files  {task: its Questions} to ask of every model beside the facts, see taskfiles.py
    """
    subjects = all_subjects(dense, config, world, log)
    measured = ask_all(subjects, config, world, log)
    ms = json_step(log, os.path.join(config.out, "milliseconds.json"), [s.about["settings"] for s in subjects],
                   lambda: milliseconds({s.about["id"]: s for s in subjects}, world, config.timing_rounds))
    models = [{**{k: s.about[k] for k in ("id", "tag", "base", "operation", "layers")},
               "metrics": {**costs(s), "perplexity": measured[s.about["id"]]["perplexity"],
                           "ms_per_question": ms[s.about["id"]]},
               "intervals": {}, "verdict": None} for s in subjects]
    runs = [measured, *repeated(dense, subjects, measured, config, world, log)]
    add_recalls(models, runs, world.asked(config), config)
    scored, tasks = comparisons.score_tasks(subjects, measured, world, config, log)
    comparisons.add_tasks(models, scored, tasks, config.seed + 6)
    compared, *again = [comparisons.comparisons(models, run, scored) for run in runs]
    add_verdicts(models, [compared, *again])
    add_attributes(models, measured, world.asked(config), config)
    add_files(models, subjects, files or {}, world, config, log)
    settings = {"texts": len(world.inside), "models": [s.about["settings"] for s in subjects]}
    inside = json_step(log, os.path.join(config.out, "similarity.json"), settings, lambda: look_inside(subjects, world))
    where = {s.about["id"]: s for s in subjects}
    for subject, model in zip(subjects, models):
        model["similarity"] = inside[model["id"]]
        if model["base"] not in (None, "dense"):
            texts = (inside[name]["texts"] for name in (model["id"], model["base"]))
            model["similarity"]["nearer"] = pools.nearer(*texts, config.seed + 8)
        if subject.about.get("kind") == "idp" and config.ablation_people:
            path = os.path.join(config.out, model["id"] + ".selectors.json")
            ablated = json_step(log, path, {**subject.about["settings"], "people": config.ablation_people},
                                lambda: ablation(subject, where[model["base"]], world, config))
            model["idp"] = summary(ablated, world.facts("heldout", config.ablation_people), config)
    context = json_step(log, os.path.join(config.out, "context.json"), subjects[0].about["settings"],
                        lambda: context_check(subjects[0], world, config))
    noise = json_step(log, os.path.join(config.out, "noise.json"), [s.about["settings"] for s in subjects],
                      lambda: comparisons.noise_floor(subjects, measured, config, world))
    return {"name": world.name, "settings": asdict(config), "seed": config.seed, "models": models,
            "context": context, "comparisons": compared, "noise": noise,
            "metrics": [dict(zip(("name", "label", "unit", "higher_is_better", "description"), m))
                        for m in [*METRICS, *taskfiles.metrics(files or {})]
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


def add_recalls(models, runs, asked, config):
    """Recalls, fractions and intervals from each person's right answers: all models on the same people.

    runs  [{model id: what it answered}], one a seed. With several, metrics are their mean, intervals are resampled over
          people and over seeds, and each model's "seeds" holds the metric of each.
    """
    generator, K = torch.Generator().manual_seed(config.seed + 3), len(runs)
    where = {m["id"]: i for i, m in enumerate(models)}
    means, each, samples = {}, {}, {}
    drawn = torch.randint(K, (10_000, K), generator=generator) if K > 1 else torch.zeros(10_000, 1, dtype=torch.long)
    for split, facts in asked.items():
        right = [[a["correct"] for a in run[m["id"]]["facts"][split]] for run in runs for m in models]
        people, sizes = by_person(right, facts)  # (people, K * models)
        each[split] = (people.sum(0) / sizes.sum()).reshape(K, -1)  # (K, models)
        means[split] = each[split].mean(0)
        found = resampled(people, 10_000, generator, sizes).view(10_000, K, -1)
        samples[split] = found.gather(1, drawn[:, :, None].expand(-1, -1, len(models))).mean(1).numpy()
        for i, m in enumerate(models):
            m.setdefault("seeds", {})[f"recall_{split}"] = each[split][:, i].tolist()
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
        by_seed = fractions(*({s: each[s][:, j] for s in means} for j in (0, base, i)))
        m["seeds"] |= {name: [x if np.isfinite(x) else None for x in values.tolist()]
                       for name, values in zip(("displaced", "relearned"), by_seed)}


def add_verdicts(models, tests):
    """Each repaired model's verdict, from its comparison on held-out recall in `tests`: [comparisons] a seed."""
    recall = {m["id"]: m["metrics"].get("recall_heldout") for m in models}
    for m in models:
        if m["base"] not in (None, models[0]["id"]):
            mine = [row for rows in tests for row in rows
                    if (row["model"], row["what"]) == (m["id"], "recall, held-out")]
            lost, found = recall[models[0]["id"]] - recall[m["base"]], mine[0]["detectable"]
            m["verdict"] = verdict(m, mine, found / lost if found and lost > 0 else None)


def add_attributes(models, measured, asked, config):
    """Recall by attribute over seen and held-out facts together: {attribute: [mean, low, high]} in each model."""
    generator = torch.Generator().manual_seed(config.seed + 8)
    facts = [f for split in ("seen", "heldout") for f in asked[split]]
    right = {m["id"]: [a["correct"] for split in ("seen", "heldout") for a in measured[m["id"]]["facts"][split]]
             for m in models}
    for m in models:
        m["attributes"] = {}
    for attribute in dict.fromkeys(f.attribute for f in facts):
        own = [i for i, f in enumerate(facts) if f.attribute == attribute]
        sums, sizes = by_person([[right[m["id"]][i] for i in own] for m in models], [facts[i] for i in own])
        samples = resampled(sums, 10_000, generator, sizes).numpy()
        for i, m in enumerate(models):
            m["attributes"][attribute] = [float(sums[:, i].sum() / sizes.sum()), *interval(samples[:, i])]


def add_files(models, subjects, files, world, config, log):
    """Every model's score on task files {task: Questions}, as metrics "task metric" with an interval over questions."""
    for name, questions in files.items():
        for subject, model in zip(subjects, models):
            settings = {**subject.about["settings"], "questions": digest(questions)}
            path = os.path.join(config.out, f"{model['id']}.{slug(name)}.json")
            scores = json_step(log, path, settings, lambda: taskfiles.score(subject, name, questions, world.encoding))
            generator = torch.Generator().manual_seed(config.seed + 7)
            for metric, values in scores.items():
                low, high = interval(resampled(np.array(values)[:, None], 10_000, generator)[:, 0])
                metric, (value, low, high) = taskfiles.headline(metric, (np.mean(values), low, high))
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
    """The result as a Markdown table, a row a model; recalls in percent with their 95 % intervals, and with several
    seeds the standard deviation over them behind ±.
    """
    def percent(m, name):
        if m["metrics"].get(name) is None:
            return ""
        low, high = m["intervals"][name]
        bounds = f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None else ""
        seeds = [100 * x for x in m.get("seeds", {}).get(name, []) if x is not None]
        spread = f" ± {statistics.stdev(seeds):.1f}" if len(seeds) > 1 else ""
        return f"{100 * m['metrics'][name]:.1f}{bounds}{spread}"
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


def write_results(results, rows, config, log):
    """out/results.json, out/predictions.jsonl and the page made of them."""
    results |= {"command": "python " + " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
                "created": time.strftime("%Y-%m-%dT%H:%M:%S"), "seconds": time.time() - log.began, "times": log.times,
                "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                             "tiktoken": tiktoken.__version__, "platform": platform.platform()}}
    write_text(os.path.join(config.out, "results.json"), json.dumps(results, indent=1))
    write_text(os.path.join(config.out, "predictions.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    page.write_report(os.path.join(config.out, "results.json"), os.path.join(config.out, "report.html"))


def show(results, out):
    """Print every table of the results, the verdicts, and where it all stands."""
    print(table(results) + "\n\nby attribute, seen and held-out together, %\n\n" + pools.attribute_table(results))
    if results["files"]:
        print("\n" + pools.file_table(results))
    for model in results["models"]:
        if model.get("idp"):
            print(f"\n{model['id']}: one pool, every way to choose\n\n{pools.selector_table(model)}")
    print(f"\nthe pools, held-out %\n\n{pools.pool_table(results)}")
    print(f"\ncosine similarity to the dense model, over layers and heads\n\n{pools.inside_table(results)}")
    if results["settings"]["full"]:
        print(f"\ndistillation and the next token\n\n{pools.twin_table(results)}")
    for split, name in SPLIT_NAMES.items():
        if results["models"][0].get("tasks"):
            print(f"\nthe tasks of items.py, {results['settings']['size']} preset, {name} people, % [95 %]\n\n"
                  + comparisons.task_table(results, split))
    print(f"\nevery model against the one it was made from\n\n{comparisons.comparison_table(results)}\n")
    for row in results["noise"]:
        print(f"noise floor, {row['model']} {row['what']}: {row['gained']} gained and {row['lost']} lost "
              f"of {row['items']}, {100 * row['difference']:+.1f} points, p {row['p']:.2g}")
    print()
    for line in results["verdicts"]:
        print(f"{line['base']}, {line['text']}")
    print("\nwhat others found, and we\n\n" + findings.show(results) + "\n")
    print(f"24 unrelated tokens in front of every question: held-out recall {results['context']['alone']:.1%} -> "
          f"{results['context']['behind_24_tokens']:.1%}")
    print(f"{results['seconds']:.0f} s; {out}/results.json, {out}/predictions.jsonl; to explore: {out}/report.html")


def main():
    """The script: see the top of this file, and --help."""
    parser = options("evaluate.py", "Train, compress, repair, and say whether the knowledge was forgotten or displaced.")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="the same as --size quick")
    parser.add_argument("--full", action="store_true",
                        help="also the next-token twins, and pools trained in other ways")
    parser.add_argument("--seeds", type=int, default=StudyConfig.seeds, metavar="K",
                        help="draw compression data, repair and prompts K times, and add the spread")
    parser.add_argument("--all-tasks", action="store_true", help="ask every model every task of items.py, not a few")
    args = parser.parse_args()

    def run():
        """The whole job, for `guard` to watch."""
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
        log = Log()
        config = sized(args.size, args.seed, args.out, full=args.full, all_tasks=args.all_tasks, seeds=args.seeds)
        world = World(config)
        dense = dense_subject(config, world, log)
        publish(*study(dense, config, world, log), dense, config, log)
    guard(run)


def publish(results, rows, dense, config, log):
    """Write results.json, predictions.jsonl and the page, and print every table."""
    results["sweeps"] = sweeps.kept(os.path.join(config.out, "results.json"), dense)
    write_results(results, rows, config, log)
    show(results, config.out)


if __name__ == "__main__":
    main()
