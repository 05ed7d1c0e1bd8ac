"""
Models compared: what each scores on the tasks of items.py, and which differences between a model and the one it was
made from are more than luck.

A comparison is two models on the same items: a compressed model against the dense one, a repaired one against the
compressed one. Each is an exact McNemar test of the flips, all of a table corrected together by Holm; beside it stands
the smallest difference that the test would have found four times in five, given as many flips and at the level that
Holm asks of the smallest p (0.05 over the number of tests). The noise floor is the
same comparison where nothing should differ: a model asked again in other batches, and a compression made again from
another sample of the calibration text.

What it leaves out: comparisons of two repairs with each other.
"""
import hashlib
import os
from dataclasses import replace

import torch

from world.facts import TAUGHT
from world.items import TASKS, distinct, score_item
from study.statistics import by_person, detectable, holm, interval, mcnemar, resampled
from study.steps import Log, json_step
from study.subjects import compressed_subject
from world.score import answer


# ---- the tasks

def measure_tasks(subject, asked, people, encoding):
    """{task: {split: [scores of an item]}}; asked {task: {split: items}}, people {name: Person}."""
    out = {}
    for name, splits in asked.items():
        out[name] = {}
        for split, questions in splits.items():
            out[name][split] = [{**score_item(name, item, row, people),
                                 **({"text": row["answer"]} if item.options is None else {})}
                                for item, row in zip(questions, answer(subject, questions, encoding))]
    return out


def fingerprint(asked):
    """A short digest of every item of {task: {split: items}}: what finished scores are compared by."""
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def score_tasks(subjects, measured, world, config, log):
    """What the subjects that tasks are asked of score, {id: {task: {split: [scores]}}}; and {task: {split: items}}."""
    asked = world.tasks(config)
    if not asked:
        return {}, {}
    people = {p.name: p for who in world.people.values() for p in who}
    scored, slices = {}, {}
    for subject in subjects:
        about = subject.about
        if not (config.all_tasks or "kind" not in about or about["tag"] in config.task_repairs):
            continue
        settings = {**about["settings"], "items": fingerprint(asked)}
        scored[about["id"]] = json_step(log, os.path.join(config.out, about["id"] + ".tasks.json"), settings,
                                        lambda: measure_tasks(subject, asked, people, world.encoding))
        for split, facts in world.asked(config).items():
            recalled = recall_slices(facts, measured[about["id"]]["facts"][split], people)
            for name, (part, rows) in recalled.items():
                scored[about["id"]].setdefault(name, {})[split] = rows
                slices.setdefault(name, {})[split] = part
    names = [*slices, *asked]
    return {m: {name: rows[name] for name in names} for m, rows in scored.items()}, {**slices, **asked}


def recall_slices(facts, answers, people):
    """The two closed-book tasks as slices of the main table's facts: {"trained": (facts, scores), "unseen": ...}.

    unseen  asked as pretraining asked of other people only, never of this one
    """
    unseen = [f.attribute in TAUGHT and not people[f.person].taught for f in facts]
    trained = [f.attribute not in TAUGHT for f in facts]
    return {name: ([f for f, here in zip(facts, where) if here],
                   [{"exact": float(a["correct"])} for a, here in zip(answers, where) if here])
            for name, where in (("trained", trained), ("unseen", unseen))}


def add_tasks(models, scored, asked, seed):
    """Means with intervals into each model's "tasks": {task: {split: {metric: [mean, low, high]}}}.

    scored {model id: {task: {split: [scores]}}} of some of the models, asked {task: {split: items}}
    """
    generator = torch.Generator().manual_seed(seed)
    some = [m for m in models if m["id"] in scored]
    for m in some:
        m["tasks"] = {name: {split: {} for split in splits} for name, splits in asked.items()}
    for name, splits in asked.items():
        for split, questions in splits.items():
            rows = [scored[m["id"]][name][split] for m in some]
            for metric in [key for key in rows[0][0] if key not in ("logprob", "text")]:
                sums, sizes = by_person([[row[metric] for row in r] for r in rows], questions)
                means, samples = sums.sum(0) / sizes.sum(), resampled(sums, 10_000, generator, sizes).numpy()
                for i, m in enumerate(some):
                    m["tasks"][name][split][metric] = [float(means[i]), *interval(samples[:, i])]
            for m, r in zip(some, rows):
                if name == "last word":  # as LAMBADA: of the whole word
                    mean = sum(row["logprob"] for row in r) / len(r)
                    m["tasks"][name][split]["perplexity"] = [float(torch.tensor(-mean).exp()), None, None]
                if name == "instructions":
                    m["tasks"][name][split]["distinct-2"] = [distinct([row["text"] for row in r]), None, None]


# ---- the comparisons

def flips(what, model, base, before, after):
    """One comparison on the same items, as a dict; p_holm is added when all are there."""
    gained, lost, p = mcnemar(before, after)
    return {"what": what, "model": model["id"], "base": base["id"], "items": len(before), "gained": gained,
            "lost": lost, "difference": (sum(after) - sum(before)) / len(before), "p": p}


def comparisons(models, measured, scored):
    """Every model against the one it was made from: recall on seen and held-out people, tasks on held-out people."""
    where, out = {m["id"]: m for m in models}, []
    for m in models:
        if m["base"] is None:
            continue
        base = where[m["base"]]
        for split, name in (("seen", "seen"), ("heldout", "held-out")):
            if split not in measured[m["id"]]["facts"]:
                continue
            pair = [[float(a["correct"]) for a in measured[x["id"]]["facts"][split]] for x in (base, m)]
            out.append(flips(f"recall, {name}", m, base, *pair))
        if m["id"] in scored and base["id"] in scored:
            for name in [name for name in scored[m["id"]] if name in TASKS]:
                pair = [main_scores(name, scored[x["id"]][name]["heldout"]) for x in (base, m)]
                out.append(flips(f"{name}, held-out", m, base, *pair))
    for row, p in zip(out, holm([row["p"] for row in out])):
        row["p_holm"] = p
        row["detectable"] = detectable(row["items"], row["gained"] + row["lost"], 0.05 / len(out))
    return out


def main_scores(name, rows):
    """The scores that models are compared on: the first metric of the task's table."""
    metric = TASKS[name].metrics[0] if name in TASKS else "exact"
    return [row[metric] for row in rows]


def noise_floor(subjects, measured, config, world):
    """Comparisons on held-out recall where nothing should differ, as `flips`: the A/A test.

    The dense model asked again with its questions in reverse, so in other batches; each repaired compression made again
    from another sample of the calibration text.
    """
    facts, out = world.facts("heldout", config.test_people), []

    def compared(what, subject, right):
        before = [float(a["correct"]) for a in measured[subject.about["id"]]["facts"]["heldout"]]
        out.append(flips(what, subject.about, subject.about, before, right))
    again = [float(a["correct"]) for a in answer(subjects[0], facts[::-1], world.encoding)][::-1]
    compared("asked again in reverse", subjects[0], again)
    other = replace(config, repeat=1)
    same = torch.equal(world.calibration(config), world.calibration(other))  # a world with one sample only
    for subject in subjects:
        if subject.about["tag"] in config.rates and not same:
            made = compressed_subject(subjects[0], subject.about["tag"], other, world, Log())
            right = [float(a["correct"]) for a in answer(made, facts, world.encoding)]
            compared("compressed again on other text", subject, right)
    return out


# ---- tables

def task_table(results, split):
    """A row a model, a column a task: the main metric in percent with its interval, on one split."""
    models = [m for m in results["models"] if m.get("tasks")]
    names = list(models[0]["tasks"])
    lines = ["| model | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for m in models:
        cells = []
        for name in names:
            metric = TASKS[name].metrics[0] if name in TASKS else "exact"
            mean, low, high = (100 * x for x in m["tasks"][name][split][metric])
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
        tag = m["tag"] if m["base"] in (None, "dense") else f"{m['base']} + {m['tag']}"
        lines.append(f"| {tag} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_table(results):
    """The comparisons of recall, and those on tasks that are no luck: flips, p, corrected p, what was detectable.

    Differences are in percent of the items; all comparisons, shown or not, are corrected together.
    """
    lines = ["| model | against | on | items | gained | lost | difference | p | p (Holm) | detectable |",
             "|---|---|---|" + "---:|" * 7]
    shown = [row for row in results["comparisons"] if row["what"].startswith("recall") or row["p_holm"] < 0.05]
    for row in shown:
        found = "" if row["detectable"] is None else f"{100 * row['detectable']:.1f}"
        lines.append(f"| {row['model']} | {row['base']} | {row['what']} | {row['items']} | {row['gained']} "
                     f"| {row['lost']} | {100 * row['difference']:+.1f} | {row['p']:.2g} | {row['p_holm']:.2g} "
                     f"| {found} |")
    hidden = len(results["comparisons"]) - len(shown)
    return "\n".join(lines + [f"\nand {hidden} comparisons on tasks whose corrected p is 0.05 or more"] * (hidden > 0))
