"""
Displaced and re-learned, with intervals over people and draws, from the single answers of finished rows.

A group of rows has one reference (the undamaged model, the first row), damaged models made from it, and repairs of
these.
With a(m, s) the mean of what is measured (recall, or knowledge) of model m on split s,

    displaced = (a(repaired, held-out) - a(damaged, held-out)) / (a(reference, held-out) - a(damaged, held-out))
    relearned = the same fraction on seen people, minus displaced

What it leaves out: verdicts (evaluate.py), tests (comparisons.py).
"""
import numpy as np
import torch

from study.statistics import Estimate, by_person, recall_interval, recalls_of, resampled, share_of

MEASURES = [("recall", "correct", ""),                # how its mean is called, the key of an answer, and the suffix of
            ("knowledge", "knowledge", "_knowledge"),  # displaced and relearned in a row's metrics
            ("unguessed", "correct", "_unguessed")]    # recall of facts that cannot be guessed


def add_shares(draws, asked, seed, guessed=None):
    """Write means, displaced and relearned with their intervals into the rows of the first draw.

    draws    [rows], one list a draw of `--seeds`, the reference first
    asked    {split: facts}, which every row answered
    guessed  {split: whether each fact can be guessed}, see real/guess.py; None: none can, and all are one kind

    Returns {id: Estimate of displaced}, by recall.
    """
    rows = draws[0]
    where, displaced = {m["id"]: i for i, m in enumerate(rows)}, {}
    for name, key, suffix in MEASURES[:3 if guessed else 2]:
        kept = {split: [i for i in range(len(facts)) if name != "unguessed" or not guessed[split][i]]
                for split, facts in asked.items()}
        found = {split: estimates(draws, split, asked[split], key, seed + 3 + 1000 * k, kept[split])
                 for k, split in enumerate(sorted(asked))}  # a seed each: the splits' people are drawn apart
        for split, of in found.items():
            for m, (estimate, bounds) in zip(rows, of):
                put(m, f"{name}_{split}", estimate, bounds)
        for i, m in enumerate(rows):
            base = where.get(m["base"])
            if base in (None, 0):
                continue
            share = {}
            for split in ("heldout", "seen"):
                whole, damaged, repaired = (found[split][j][0] for j in (0, base, i))
                share[split] = share_of(repaired - damaged, whole - damaged)
            back, seen = share["heldout"], share["seen"]
            put(m, "displaced" + suffix, back)
            put(m, "relearned" + suffix, seen - back if seen and back else None)
            if name == "recall":
                displaced[m["id"]] = back
            if name == "knowledge":  # what is left of the gain of the right answer's log-probability is format
                raw = logprob_gain(draws, i, base)
                known = found["heldout"][i][0].value - found["heldout"][base][0].value
                m["metrics"] |= {"gain_logprob": raw, "gain_knowledge": known, "gain_format": raw - known}
    return displaced


def logprob_gain(draws, i, base):
    """The mean over held-out facts and draws of what a repair adds to the right answer's log-probability, in nats."""
    return float(np.mean([[b["logprob"] - a["logprob"] for a, b in
                           zip(rows[base]["answers"]["heldout"], rows[i]["answers"]["heldout"])] for rows in draws]))


def estimates(draws, split, facts, key, seed, kept):
    """[(Estimate, its 95 % interval)] of every model's mean `key` on one split: all models on the same resamples.

    kept  the places of the facts that count
    """
    facts = [facts[i] for i in kept]
    scores = np.array([[[float(m["answers"][split][i][key]) for i in kept] for m in rows] for rows in draws])
    if key == "correct":
        return recall_means(scores, facts, seed)
    return [(estimate, estimate.interval()) for estimate in means(scores, facts, seed)]


def recall_means(scores, facts, seed):
    """[(Estimate, its 95 % interval, exact near 0 and 100 %)] of each column of scores in [0, 1], as `means`."""
    right, sizes = by_person(scores.mean(0), facts)  # (people, columns), mean over draws; (people,)
    return [(e, recall_interval(right[:, j], sizes, e.samples, e.seeds))
            for j, e in enumerate(means(scores, facts, seed))]


def means(scores, facts, seed):
    """[Estimate] of the mean of each column of scores (K draws, columns, facts): all on the same resamples of people.
    """
    K = len(scores)
    sums, sizes = by_person(scores.reshape(-1, len(facts)), facts)  # (people, K * columns), (people,)
    samples = resampled(sums, 10_000, torch.Generator().manual_seed(seed), sizes).view(10_000, K, -1).numpy()
    by_seed = (sums.sum(0) / sizes.sum()).reshape(K, -1)  # (K, columns)
    return [Estimate(float(by_seed[:, j].mean()), samples[:, :, j], by_seed[:, j] if K > 1 else ())
            for j in range(by_seed.shape[1])]


def put(row, name, estimate, bounds=None):
    """Value, interval and the value of each draw into a row; None where there is no such share."""
    row["metrics"][name] = None if estimate is None else float(estimate.value)
    row["intervals"][name] = [None, None] if estimate is None else bounds or estimate.interval()
    seeds = () if estimate is None else estimate.seeds
    row.setdefault("seeds", {})[name] = [float(x) for x in seeds]


def add_attributes(rows, asked, seed):
    """Recall by attribute over seen and held-out facts together: {attribute: [mean, low, high]} in each row."""
    generator = torch.Generator().manual_seed(seed + 8)
    facts = [f for split in ("seen", "heldout") for f in asked[split]]
    right = [[a["correct"] for split in ("seen", "heldout") for a in m["answers"][split]] for m in rows]
    for m in rows:
        m["attributes"] = {}
    for attribute in dict.fromkeys(f.attribute for f in facts):
        own = [i for i, f in enumerate(facts) if f.attribute == attribute]
        found = recalls_of([[answers[i] for i in own] for answers in right], [facts[i] for i in own], generator)
        for m, recall in zip(rows, found):
            m["attributes"][attribute] = recall
