"""
The study: train, compress, repair, and answer the question - is the knowledge forgotten or displaced?

    python evaluate.py                     # the whole study: out/results.json, tables.md, predictions.jsonl, report.html
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
(study/comparisons.py). The verdict in words follows from these alone.

Read it from the bottom: `study` makes every model and asks it (`every_model`, `ask`), so that each is a row; then it
passes over the finished rows for intervals, comparisons and verdicts.
"""
from dataclasses import asdict

import numpy as np
import torch

import idp
from engine.script import guard
from study import inside, pools, publish
from study.comparisons import ANSWERS, add_tasks, comparisons, noise_floor, score_tasks, task_items
from study.costs import costs, milliseconds
from study.settings import OPERATIONS, POOLS, StudyConfig, options, sized
from study.statistics import by_person, interval, resampled
from study.steps import Run
from study.subjects import compressed_subject, dense_subject, repair_batches, repaired_subject
from study.taskfiles import add_files
from world.score import Subject, answer, perplexity
from world.small import World


# ---- every model is made and asked: a row each

def every_model(run, dense):
    """The Subjects of the study, in the order of the table: dense, then each compression and its repairs."""
    yield dense
    batches = repair_batches(run, dense)
    for tag in run.config.compressions:
        base = compressed_subject(run, dense, tag)
        yield base
        if tag not in run.config.rates:
            continue
        wanted = [(name, *how, "distillation") for name, how in run.config.repairs.items()]
        if run.config.full:
            wanted += [(name, *how, "distillation") for name, how in POOLS.items()]
            wanted += [(name, *how, "next_token") for name, how in run.config.repairs.items()]
        for name, kind, size, objective in wanted:
            yield repaired_subject(run, base, name, kind, size, batches, objective)


def ask(run, subject, dense, base):
    """One model becomes a row: what it costs, what it answers, how well it reads, what happens inside it.

    dense, base  the Subjects it is compared with inside: the undamaged model, and what it was made from
    "answers" and "scores" hold single facts; `publish.publish` takes them out of the finished row.
    """
    about, world, config = subject.about, run.world, run.config
    asked = run.once_json(about["id"] + ".answers", {**about["settings"], "test_people": config.test_people}, ANSWERS,
                          lambda: {"facts": {split: answer(subject, facts, world.encoding)
                                             for split, facts in world.asked(config).items()},
                                   "perplexity": perplexity(subject, world.windows)})
    row = {**{key: about[key] for key in ("id", "tag", "base", "operation", "layers")}, "intervals": {}, "verdict": None,
           "metrics": {**costs(subject), "perplexity": asked["perplexity"]}, "answers": asked["facts"]}
    if config.repeat:  # of the other draws only recalls are wanted
        return row
    row["scores"] = score_tasks(run, subject, asked["facts"])
    row["similarity"] = run.once_json(about["id"] + ".inside", {**about["settings"], "texts": len(world.inside)},
                                      ("study.inside", *ANSWERS),
                                      lambda: inside.similarity(subject, dense, world.inside))
    if about.get("kind") == "idp" and config.ablation_people:
        tried = run.once_json(about["id"] + ".selectors", {**about["settings"], "people": config.ablation_people},
                              ("study.pools", *ANSWERS), lambda: pools.try_selectors(run, subject, base))
        row["idp"] = pools.summary(tried, world.facts("heldout", config.ablation_people), config.seed)
    return row


def rows_of(run, dense):
    """(Subjects, rows) of every model of one draw."""
    subjects, rows, made = [], [], {}
    for subject in every_model(run, dense):
        made[subject.about["id"]] = subject
        subjects.append(subject)
        rows.append(ask(run, subject, dense, made.get(subject.about["base"])))
    return subjects, rows


# ---- passes over the finished rows

def fractions(dense, compressed, repaired):
    """displaced and relearned (module docstring) from recalls by split: numbers, or arrays of bootstrap samples."""
    with np.errstate(divide="ignore", invalid="ignore"):
        back = {s: (repaired[s] - compressed[s]) / (dense[s] - compressed[s]) for s in ("seen", "heldout")}
        return back["heldout"], back["seen"] - back["heldout"]


def add_recalls(draws, asked, seed):
    """Recalls, fractions and intervals from each person's right answers: all models on the same people.

    draws  [rows], one list a draw of `--seeds`; the first gets the numbers. With several, metrics are their mean, intervals
           are resampled over people and over draws, and each row's "seeds" holds the metric of each.
    asked  {split: facts}
    """
    generator, K, rows = torch.Generator().manual_seed(seed + 3), len(draws), draws[0]
    where = {m["id"]: i for i, m in enumerate(rows)}
    means, each, samples = {}, {}, {}
    drawn = torch.randint(K, (10_000, K), generator=generator) if K > 1 else torch.zeros(10_000, 1, dtype=torch.long)
    for split, facts in asked.items():
        right = [[a["correct"] for a in m["answers"][split]] for draw in draws for m in draw]
        people, sizes = by_person(right, facts)  # (people, K * models)
        each[split] = (people.sum(0) / sizes.sum()).reshape(K, -1)  # (K, models)
        means[split] = each[split].mean(0)
        found = resampled(people, 10_000, generator, sizes).view(10_000, K, -1)
        samples[split] = found.gather(1, drawn[:, :, None].expand(-1, -1, len(rows))).mean(1).numpy()
        for i, m in enumerate(rows):
            m.setdefault("seeds", {})[f"recall_{split}"] = each[split][:, i].tolist()
            m["metrics"][f"recall_{split}"] = float(means[split][i])
            m["intervals"][f"recall_{split}"] = interval(samples[split][:, i])
    for i, m in enumerate(rows):
        base = where.get(m["base"])
        if base in (None, 0):
            continue
        value, bounds, by_seed = (fractions(*({s: of[s][..., j] for s in of} for j in (0, base, i)))
                                  for of in (means, samples, each))
        for k, name in enumerate(("displaced", "relearned")):
            m["metrics"][name] = float(value[k]) if np.isfinite(value[k]) else None
            m["intervals"][name] = interval(bounds[k])
            m["seeds"][name] = [x if np.isfinite(x) else None for x in by_seed[k].tolist()]


def add_attributes(rows, asked, seed):
    """Recall by attribute over seen and held-out facts together: {attribute: [mean, low, high]} in each row."""
    generator = torch.Generator().manual_seed(seed + 8)
    facts = [f for split in ("seen", "heldout") for f in asked[split]]
    right = [[a["correct"] for split in ("seen", "heldout") for a in m["answers"][split]] for m in rows]
    for m in rows:
        m["attributes"] = {}
    for attribute in dict.fromkeys(f.attribute for f in facts):
        own = [i for i, f in enumerate(facts) if f.attribute == attribute]
        sums, sizes = by_person([[answers[i] for i in own] for answers in right], [facts[i] for i in own])
        samples = resampled(sums, 10_000, generator, sizes).numpy()
        for i, m in enumerate(rows):
            m["attributes"][attribute] = [float(sums[:, i].sum() / sizes.sum()), *interval(samples[:, i])]


def add_verdicts(rows, tests):
    """Each repaired model's verdict, from its comparison on held-out recall in `tests`: [comparisons] a draw."""
    recall = {m["id"]: m["metrics"].get("recall_heldout") for m in rows}
    for m in rows:
        if m["base"] not in (None, rows[0]["id"]):
            mine = [test for draw in tests for test in draw
                    if (test["model"], test["what"]) == (m["id"], "recall, held-out")]
            lost, found = recall[rows[0]["id"]] - recall[m["base"]], mine[0]["detectable"]
            m["verdict"] = verdict(m, mine, found / lost if found and lost > 0 else None)


def verdict(model, tests, reach=None):
    """What one repaired model's tests and intervals say in words: nothing in it is judged by hand.

    tests  its comparison with the unrepaired model on held-out recall, one a draw: the corrected p of each must be
           below 0.05, and all must agree on the side, for anything to be claimed
    reach  the smallest displaced share that the first of them would find four times in five
    """
    value, bounds = model["metrics"], model["intervals"]
    if None in bounds["displaced"] + bounds["relearned"]:
        return "compression took too little recall to divide by"
    sides = {(t["difference"] > 0) - (t["difference"] < 0) if t["p_holm"] < 0.05 else 0 for t in tests}
    said = {(1,): "held-out facts come back", (-1,): "held-out facts are lost further"}.get(
        tuple(sides), "held-out recall not distinguishable from unrepaired")
    (low, high), (least, most) = bounds["displaced"], bounds["relearned"]
    power = f", detectable from {reach:.0%}" if reach else ""
    gain = "more" if least > 0 else "less" if most < 0 else "as much"
    return (f"{said}, displaced {value['displaced']:.0%} [{low:.0%}, {high:.0%}]{power}; "
            f"seen facts gain {gain}, re-learned {value['relearned']:.0%} [{least:.0%}, {most:.0%}]")


def context_check(run, dense):
    """Held-out recall with and without 24 tokens of unrelated text in front: what every prompt's result rests on."""
    facts = run.world.facts("heldout", run.config.test_people)
    with torch.no_grad():
        prompt = dense.model.wte(run.world.unrelated())
        filled = idp.prefill(dense.model, idp.PromptPool([prompt]))
    recall = [sum(a["correct"] for a in answer(s, facts, run.world.encoding)) / len(facts)
              for s in (dense, Subject(dense.model, filled))]
    return {"alone": recall[0], "behind_24_tokens": recall[1]}


# ---- the main job

def study(run, dense, files=None):
    """The whole study of one dense model -> (results, rows): what results.json holds, and the rows with single answers.

    files  {task: its questions} to ask of every model beside the facts, see study/taskfiles.py
    """
    config, asked, seed = run.config, run.world.asked(run.config), run.config.seed
    subjects, rows = rows_of(run, dense)
    draws = [rows] + [rows_of(run.draw(k), dense)[1] for k in range(1, config.seeds)]
    for draw in draws[1:]:
        for row, first in zip(draw, rows):
            row |= {"id": first["id"], "base": first["base"]}  # one model, drawn again

    where, settings = {m["id"]: m for m in rows}, [s.about["settings"] for s in subjects]
    add_recalls(draws, asked, seed)
    add_tasks(rows, task_items(run), seed + 6)
    compared = [comparisons(draw) for draw in draws]
    add_verdicts(rows, compared)
    add_attributes(rows, asked, seed)
    add_files(run, rows, subjects, files or {})
    ms = run.once_json("milliseconds", settings, ANSWERS, lambda: milliseconds(run, subjects))
    for m in rows:
        m["metrics"]["ms_per_question"] = ms[m["id"]]
        if m["base"] not in (None, "dense"):
            m["similarity"]["nearer"] = inside.nearer(m["similarity"]["texts"], where[m["base"]]["similarity"]["texts"],
                                                      seed + 8)
    context = run.once_json("context", dense.about["settings"], ANSWERS, lambda: context_check(run, dense))
    noise = run.once_json("noise", settings, ("study.comparisons", *ANSWERS),
                          lambda: noise_floor(run, subjects, {m["id"]: m["answers"] for m in rows}))
    return {"name": run.world.name, "settings": asdict(config), "seed": seed, "models": rows, "context": context,
            "comparisons": compared[0], "noise": noise, "metrics": publish.metrics(rows, files or {}),
            "files": {name: len(questions) for name, questions in (files or {}).items()},
            "operations": [{"name": n, "parameters": None, "description": d} for n, d in OPERATIONS.items()],
            "verdicts": [{"base": m["base"], "text": f"{m['tag']}: {m['verdict']}"} for m in rows if m["verdict"]],
            "hypothesis": "H0: displaced = 0. H1: displaced > 0 on people that no repair has read about."}


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

    def job():
        """The whole job, for `guard` to watch."""
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
        config = sized(args.size, args.seed, args.out, full=args.full, all_tasks=args.all_tasks, seeds=args.seeds)
        run = Run(config, World(config))
        run.describe_reuse()
        dense = dense_subject(run)
        publish.publish(run, dense, study(run, dense))
    guard(job)


if __name__ == "__main__":
    main()
