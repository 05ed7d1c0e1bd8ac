"""
How often the intervals of study/statistics.py hold the truth, by simulation: 93 to 97 % is what 95 % should come to.

    python -m pytest -m slow tests/test_coverage.py          # about a minute on a free core

The world here knows its truth. Fact f of person p is right for model m in seed k where

    a_p + b_f + noise (p, f, m, k)  <  threshold of m + shift (m, k)             all normal, left side of variance 1

so that a person's facts cluster, models and seeds agree on most facts, and a seed's models are better or worse
together. 500 people of 5 facts, as in the study; every world is drawn anew, its people and its seeds.
"""
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from study.statistics import (Estimate, interval, mcnemar, pooled_test, recall_interval, resampled, share_of,
                              t_interval)

pytestmark = pytest.mark.slow
PEOPLE, FACTS, RESAMPLES, WORLDS = 500, 5, 1000, 1000
PERSON, FACT = 0.1, 0.5  # of the left side's variance
Z = NormalDist()


@pytest.fixture(scope="module")
def counts():
    """(RESAMPLES, PEOPLE) how often each person is drawn."""
    return PEOPLE * resampled(torch.eye(PEOPLE), RESAMPLES, torch.Generator().manual_seed(0)).float().numpy()


def shifts(rng, models, K, spread):
    """(models, K) probits; half of a shift's variance is the seed's, for all its models. The dense model has none."""
    out = spread * math.sqrt(0.5) * (rng.normal(size=(1, K)) + rng.normal(size=(models, K)))
    out[0] = 0
    return out


def right_answers(rng, recalls, moved, spread):
    """(PEOPLE, models, K) right answers of each person. Dense (the first) answers the same in every seed."""
    models, K = moved.shape
    left = math.sqrt(PERSON) * rng.standard_normal((PEOPLE, 1), np.float32) \
        + math.sqrt(FACT) * rng.standard_normal((PEOPLE, FACTS), np.float32)
    noise = math.sqrt(1 - PERSON - FACT) * rng.standard_normal((models, K, PEOPLE, FACTS), np.float32)
    noise[0] = noise[0, :1]
    widened = [1.0] + [math.sqrt(1 + spread**2)] * (models - 1)  # so that the mean over seeds is as asked
    threshold = np.array([Z.inv_cdf(p) * w for p, w in zip(recalls, widened)])[:, None] + moved
    return (left + noise < threshold[:, :, None, None].astype(np.float32)).sum(-1).transpose(2, 0, 1)


def estimates(worlds, counts):
    """Of each world's right answers (PEOPLE, models, K), an Estimate of each model's recall."""
    for right in worlds:
        models, K = right.shape[1:]
        samples = (counts @ right.reshape(PEOPLE, -1).astype(np.float32) / PEOPLE / FACTS).reshape(-1, models, K)
        yield [Estimate(right[:, m].mean() / FACTS, samples[:, m].astype(float), right[:, m].mean(0) / FACTS)
               for m in range(models)]


def held(intervals, truth):
    """The share of the intervals that hold the truth; those not given do not count."""
    given = [bounds for bounds in intervals if bounds[0] is not None]
    return np.mean([low - 1e-9 <= truth <= high + 1e-9 for low, high in given])


def simulate(recalls, K, spread, counts, seed=0):
    """{what: (intervals of so many worlds, the truth)}."""
    rng, out = np.random.default_rng(seed), {}
    dense, compressed, a, b = recalls
    lost = dense - compressed
    truth = {"recall": compressed, "loss": lost, "displaced": (a - compressed) / lost, "relearned": 0.0,
             "two repairs": (a - b) / lost}
    for _ in range(WORLDS // 50):
        moved = [shifts(rng, 4, K, spread) for _ in range(50)]
        heldout, seen = ([right_answers(rng, recalls, m, spread) for m in moved] for _ in range(2))
        for right, (D, C, A, B), on_seen in zip(heldout, estimates(heldout, counts), estimates(seen, counts)):
            displaced, other = share_of(A - C, D - C), share_of(B - C, D - C)
            back = share_of(on_seen[2] - on_seen[1], on_seen[0] - on_seen[1])
            both = displaced and back
            for what, bounds in (
                    ("recall", recall_interval(right[:, 1].mean(1), np.full(PEOPLE, FACTS), C.samples, C.seeds)),
                    ("loss", (D - C).interval()), ("displaced", displaced.interval() if displaced else [None, None]),
                    ("relearned", (back - displaced).interval() if both else [None, None]),
                    ("two repairs", (displaced - other).interval() if displaced else [None, None])):
                out.setdefault(what, []).append(bounds)
    return {what: held(out[what], truth[what]) for what in out}


def outside(found, low, high):
    return {what: share for what, share in found.items() if not low <= share <= high}


@pytest.mark.parametrize("recalls", [(0.99, 0.85, 0.89, 0.87), (0.90, 0.84, 0.87, 0.86)])
def test_one_seed(recalls, counts):
    assert outside(simulate(recalls, 1, 0.0, counts), 0.93, 0.97) == {}


def test_a_loss_of_one_and_a_half_points(counts):
    """8 to 45 wrong answers of 2,500 decide. Worlds whose loss may be zero give no share."""
    assert outside(simulate((0.997, 0.982, 0.99, 0.986), 1, 0.0, counts), 0.93, 0.97) == {}


@pytest.mark.parametrize("spread", [0.03, 0.08, 0.15])
@pytest.mark.parametrize("K", [2, 3, 5])
def test_several_seeds(K, spread, counts):
    """At recall 0.85 the seeds' standard deviation is 0.7, 1.9 and 3.5 points. The README's table has five seeds. A
    recall of two or three that hardly differ is held in 97 to 98 %: their t is long."""
    most = 0.98 if K < 4 and spread < 0.05 else 0.97
    assert outside(simulate((0.99, 0.85, 0.89, 0.87), K, spread, counts), 0.93, most) == {}


@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_p_of_a_difference_that_is_none(K, counts):
    """Two repairs that bring back the same: p is below 0.05 in about one world of twenty (at most 7 %), below 0.0125 in
    one of eighty (at most 2.5 %), or less often."""
    rng, p = np.random.default_rng(K), []
    for _ in range(WORLDS // 50):
        worlds = [right_answers(rng, (0.99, 0.85, 0.88, 0.88), shifts(rng, 4, K, 0.15 if K > 1 else 0.0),
                                0.15 if K > 1 else 0.0) for _ in range(50)]
        p += [(share_of(A - C, D - C) - share_of(B - C, D - C)).p(0.0) for D, C, A, B in estimates(worlds, counts)]
    assert np.mean(np.less(p, 0.05)) < 0.07 and np.mean(np.less(p, 0.0125)) < 0.025


def test_what_a_bootstrap_over_seeds_would_do():
    """E14, the reason for t: resampled, two seeds' mean has half its variance."""
    rng, t, bootstrap = np.random.default_rng(1), [], []
    for values in rng.normal(0, 1, (WORLDS, 3)):
        t.append(t_interval(values))
        bootstrap.append(interval(values[rng.integers(0, 3, (RESAMPLES, 3))].mean(1)))
    assert 0.93 <= held(t, 0) <= 0.97 and held(bootstrap, 0) < 0.85


def test_losses_that_differ_by_draw():
    """Where it fails: one draw in five loses 0.8 and gets 0.7 of it back, the others lose 0.25 and get 0.4 back, as the
    control *rank one* has it. Draws alone, without people."""
    rng, found = np.random.default_rng(2), {}
    for what, much in (("alike", 0.275), ("rank one", 0.8)):
        large = rng.random((WORLDS, 5)) < 0.2
        losses = np.where(large, much, 0.25) * rng.normal(1, 0.1, (WORLDS, 5))
        gains = losses * (np.where(large & (much > 0.5), 0.7, 0.4) + rng.normal(0, 0.08, (WORLDS, 5)))
        truth = (0.2 * much * (0.7 if much > 0.5 else 0.4) + 0.8 * 0.25 * 0.4) / (0.2 * much + 0.8 * 0.25)
        intervals = [t_interval(share_of(Estimate(g.mean(), g[None].repeat(9, 0), g),
                                         Estimate(x.mean(), x[None].repeat(9, 0), x)).seeds)
                     for g, x in zip(gains, losses)]
        found[what] = held(intervals, truth)
    assert 0.93 <= found["alike"] <= 0.97 and found["rank one"] < 0.9, found


@pytest.mark.parametrize("wrong", [1, 4])
def test_near_the_edge(wrong, counts):
    """So many wrong answers of 2,500, on average: the exact bounds hold the truth at least as often as they say (they
    must: no interval is right for every share of so few answers); the bootstrap does not."""
    recall, rng, ours, bootstrap = 1 - wrong / PEOPLE / FACTS, np.random.default_rng(wrong), [], []
    for _ in range(200):
        right = right_answers(rng, (recall,), np.zeros((1, 1)), 0)[:, 0, 0]
        samples = counts @ right / PEOPLE / FACTS
        ours.append(recall_interval(right, np.full(PEOPLE, FACTS), samples))
        bootstrap.append(interval(samples))
    assert held(ours, recall) >= 0.935
    assert held(bootstrap, recall) < 0.93


@pytest.mark.parametrize("K", [1, 3])
def test_whole_entities_flipped_are_called_different_five_times_in_a_hundred(K):
    """300 entities of 5 items that move together, and nothing but luck: 60 % of an item's change is its entity's."""
    rng, entities, p, coins = np.random.default_rng(K), np.repeat(np.arange(300), 5), [], []
    for _ in range(400):
        moved = math.sqrt(0.6) * np.repeat(rng.normal(size=300), 5) + math.sqrt(0.4) * rng.normal(size=(K, 1500))
        before, after = (moved < -1).astype(float), (moved > 1).astype(float)
        p.append(pooled_test(before, after, entities)[2])
        coins.append(mcnemar(before[0], after[0])[2])
    assert 0.03 <= np.mean(np.array(p) <= 0.05) <= 0.07
    assert np.mean(np.array(coins) <= 0.05) > 0.12  # McNemar's test takes each item for a coin of its own
