"""
Models compared: what each scores on the tasks of items.py, and which differences between a model and the one it was
made from are more than luck.

A comparison is two models on the same items: a compressed model against the dense one, a repaired one against the
compressed one. Each is an exact test of the answers that flip, one coin an entity over all draws, and all of a table
are corrected together by Holm; beside it stands the smallest difference that the test would have found four times in
five, given as many flips and at the level that Holm asks of the smallest p (0.05 over the number of tests). The noise
floor is the same comparison where nothing should differ: a model asked again in other batches, and a compression made
again from another sample of the calibration text.

What it leaves out: comparisons of two repairs with each other.
"""
import numpy as np
import torch

import idp
from study.repairs import light
from study.statistics import detectable_flips, holm, pooled_test, recalls_of
from study.steps import digest
from study.subjects import compressed_subject
from world.facts import TAUGHT
from world.items import TASKS, distinct, score_item
from world.score import Subject, answer


# ---- the tasks

ANSWERS = ("world.score", "world.items", "study.repairs", "compress", "study.training")  # code that answers depend on


def measure_tasks(subject, asked, people, encoding):
    """{task: {split: [scores of an item]}}; asked {task: {split: items}}, people {name: Person}."""
    subject, out = light(subject), {}
    for name, splits in asked.items():
        out[name] = {}
        for split, questions in splits.items():
            out[name][split] = [{**score_item(name, item, row, people),
                                 **({"text": row["answer"]} if item.options is None else {})}
                                for item, row in zip(questions, answer(subject, questions, encoding))]
    return out


def score_tasks(run, subject, answers):
    """{task: {split: [scores of an item]}} of one subject, None for a subject that tasks are not asked of.

    answers  {split: rows}: what it said to the main facts, of which two closed-book tasks are slices
    """
    config, world, about = run.config, run.world, subject.about
    asked = world.tasks(config)
    if not asked or not (config.all_tasks or "kind" not in about or about["tag"] in config.task_repairs):
        return None
    people = {p.name: p for who in world.people.values() for p in who}
    scored = run.once_json(about["id"] + ".tasks", {**about["settings"], "items": digest(asked)},
                           ("study.comparisons", *ANSWERS),
                           lambda: measure_tasks(subject, asked, people, world.encoding))
    recalled = {}
    for split, facts in world.asked(config).items():
        for name, places in recall_slices(facts, people).items():
            recalled.setdefault(name, {})[split] = [{"exact": float(answers[split][i]["correct"])} for i in places]
    return {**recalled, **{name: scored[name] for name in asked}}


def task_items(run):
    """{task: {split: facts}} behind the scores of `score_tasks`."""
    config, world = run.config, run.world
    asked = world.tasks(config)
    if not asked:
        return {}
    people, slices = {p.name: p for who in world.people.values() for p in who}, {}
    for split, facts in world.asked(config).items():
        for name, places in recall_slices(facts, people).items():
            slices.setdefault(name, {})[split] = [facts[i] for i in places]
    return {**slices, **asked}


def recall_slices(facts, people):
    """The two closed-book tasks as slices of the main table's facts: {"trained": their places, "unseen": ...}.

    unseen  asked as pretraining asked of other people only, never of this one
    """
    return {"trained": [i for i, f in enumerate(facts) if f.attribute not in TAUGHT],
            "unseen": [i for i, f in enumerate(facts) if f.attribute in TAUGHT and not people[f.person].taught]}


def add_tasks(rows, asked, seed):
    """Means with intervals into "tasks" of each row that has scores: {task: {split: {metric: [mean, low, high]}}}.

    asked {task: {split: facts}} as `task_items` gives it
    """
    generator = torch.Generator().manual_seed(seed)
    some = [m for m in rows if m.get("scores")]
    for m in some:
        m["tasks"] = {name: {split: {} for split in splits} for name, splits in asked.items()}
    for name, splits in asked.items():
        for split, questions in splits.items():
            scored = [m["scores"][name][split] for m in some]
            for metric in [key for key in scored[0][0] if key not in ("logprob", "text")]:
                found = recalls_of([[row[metric] for row in r] for r in scored], questions, generator)
                for m, recall in zip(some, found):
                    m["tasks"][name][split][metric] = recall
            for m, r in zip(some, scored):
                if name == "last word":  # as LAMBADA: of the whole word
                    mean = sum(row["logprob"] for row in r) / len(r)
                    m["tasks"][name][split]["perplexity"] = [float(torch.tensor(-mean).exp()), None, None]
                if name == "instructions":
                    m["tasks"][name][split]["distinct-2"] = [distinct([row["text"] for row in r]), None, None]


# ---- the comparisons

def flips(what, model, base, before, after, entities):
    """One comparison on the same items, as a dict; p_holm is added when all are there. before, after (draws, items)."""
    gained, lost, p = pooled_test(before, after, entities)
    return {"what": what, "model": model, "base": base, "items": len(entities), "gained": gained, "lost": lost,
            "difference": float(np.mean(after) - np.mean(before)), "p": p}


def flip_p(draws, base, model):
    """The p of two models' held-out recalls over all draws, a person's facts flipped together."""
    return pooled_test(*(recalls(draws, name, "heldout") for name in (base, model)), entities_of(draws, "heldout"))[2]


def recalls(draws, name, split):
    """(draws, facts) 1 where the model is right."""
    return [[float(a["correct"]) for a in next(m for m in rows if m["id"] == name)["answers"][split]] for rows in draws]


def entities_of(draws, split):
    """Whom each fact of a split is about."""
    return draws[0][0]["entities"][split]


def comparisons(draws, tasks):
    """Every model against the one it was made from: recall on seen and held-out people, over all draws; tasks on
    held-out people, of the first draw.

    tasks  {task: {split: facts}} as `task_items` gives it
    """
    rows, pairs = draws[0], []
    where = {m["id"]: m for m in rows}
    for m in rows:
        base = where.get(m["base"])
        if base is None:
            continue
        for split, name in (("seen", "seen"), ("heldout", "held-out")):
            pairs.append((f"recall, {name}", m["id"], base["id"], *(recalls(draws, x["id"], split) for x in (base, m)),
                          entities_of(draws, split)))
        if m.get("scores") and base.get("scores"):
            for name in [name for name in m["scores"] if name in TASKS]:
                pairs.append((f"{name}, held-out", m["id"], base["id"],
                              *([[row[TASKS[name].metrics[0]] for row in x["scores"][name]["heldout"]]]
                                for x in (base, m)),
                              [fact.person for fact in tasks[name]["heldout"]]))
    out = [flips(*pair) for pair in pairs]
    for row, p, (*_, before, after, entities) in zip(out, holm([row["p"] for row in out]), pairs):
        row["p_holm"] = p
        row["detectable"] = detectable_flips(np.mean(before, 0), np.mean(after, 0), entities, 0.05 / len(out))
    return out


def noise_floor(run, subjects, answers):
    """Comparisons on held-out recall where nothing should differ, as `flips`: the A/A test.

    The dense model asked again with its questions in reverse, so in other batches; each calibrated compression made
    again from another sample of the calibration text. answers {model id: {split: rows}}
    """
    world, out = run.world, []
    facts = world.facts("heldout", run.config.test_people)

    def compared(what, subject, given):
        """One comparison of a subject's first answers with its second ones."""
        pair = ([[float(a["correct"]) for a in rows]] for rows in (answers[subject.about["id"]]["heldout"], given))
        out.append(flips(what, subject.about["id"], subject.about["id"], *pair, [f.person for f in facts]))
    compared("asked again in reverse", subjects[0], answer(subjects[0], facts[::-1], world.encoding)[::-1])
    first = {subject.about["tag"]: subject for subject in subjects}
    for again, given in compressed_again(run, subjects[0]):
        compared("compressed again on other text", first[again.about["tag"]], given)
    return out


def compressed_again(run, dense):
    """(Subject, what it answers to held-out facts) of each calibrated compression, made from another sample of the
    calibration text.
    """
    facts = run.world.facts("heldout", run.config.test_people)
    other = run.draw(99 if run.world.trained else 1)  # one in which nobody makes these files from another dense model
    if not torch.equal(*(run.world.calibration(r.config) for r in (run, other))):  # a real world may have one sample
        for tag, (_, method, _) in run.config.compressions.items():
            if method in ("gptq", "sparsegpt", "wanda"):
                again = compressed_subject(other, dense, tag)
                settings = {**again.about["settings"], "facts": digest(facts)}
                yield again, other.once_json(again.about["id"] + ".noise", settings, ANSWERS,
                                             lambda: answer(light(again), facts, run.world.encoding))


def context_check(run, dense):
    """Held-out recall with and without 24 tokens of unrelated text in front of the question. If these cost recall, so
    would every prompt, whatever it holds."""
    facts = run.world.facts("heldout", run.config.test_people)

    @torch.no_grad()
    def ask_twice():
        """{"alone", "behind_24_tokens"}: held-out recall."""
        prompt = dense.model.wte(run.world.unrelated().to(dense.device))
        filled = idp.prefill(dense.model, idp.PromptPool([prompt]))
        alone, behind = (sum(a["correct"] for a in answer(s, facts, run.world.encoding)) / len(facts)
                         for s in (dense, Subject(dense.model, filled)))
        return {"alone": alone, "behind_24_tokens": behind}
    return run.once_json("context", {**dense.about["settings"], "facts": digest(facts)},
                         ("study.comparisons", *ANSWERS), ask_twice)
