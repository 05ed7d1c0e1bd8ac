"""
The statistics: how sure a number is, whether two models differ, and how small a difference the study could have seen.

    intervals    95 %, from a paired bootstrap over people (Efron & Tibshirani 1993): a person's facts stay together
    flips        two models on the same items: exact McNemar test (McNemar 1947; Edwards 1948 for the exact form), which
                 reads only the items that one has right and the other wrong; a coin decides under the null hypothesis
    many tests   Holm's correction (Holm 1979): with it, the chance of one false claim in the whole table is 5 %
    power        the smallest difference that the test finds four times in five, from the flips that were counted

What it leaves out: Bayesian estimates, corrections for clustered flips (people's facts are drawn independently).
"""
import math

import numpy as np
import torch


# ---- intervals

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


# ---- two models on the same items

def mcnemar(before, after):
    """(gained, lost, p) of two models' scores on the same items, each (N,): items that `after` has better, items that
    `before` has better, and the two-sided p of so uneven a split if each flip were a fair coin's. No flips: p = 1.

    With right and wrong as scores this is the exact McNemar test; with other scores, the sign test.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if before.shape != after.shape:
        raise ValueError(f"two models answer the same items, got {len(before)} and {len(after)} scores")
    gained, lost = int((after > before).sum()), int((after < before).sum())
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))  # exact, in whole numbers
    return gained, lost, min(1.0, 2 * tail / 2**n)


def holm(p):
    """Holm's adjusted p of each of m tests: the smallest times m, the next times m - 1, ...; never below one before it.
    """
    adjusted, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = most
    return adjusted


# ---- power

def binomial(n, q):
    """(n + 1,) probabilities of 0 .. n successes of n, each with probability q."""
    if q in (0, 1):
        return np.eye(n + 1)[int(q * n)]
    log_fact = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    k = np.arange(n + 1)
    return np.exp(log_fact[n] - log_fact[k] - log_fact[n - k] + k * math.log(q) + (n - k) * math.log(1 - q))


def power(flips, share, alpha=0.05):
    """The chance that the exact McNemar test says p <= alpha when `share` of the flips' probability goes one way."""
    below = np.cumsum(binomial(flips, 0.5))
    k = np.arange(flips + 1)
    p = np.minimum(1, 2 * below[np.minimum(k, flips - k)])
    return float(binomial(flips, share)[p <= alpha * (1 + 1e-12)].sum())


def detectable(items, flips, alpha=0.05, wanted=0.8):
    """The smallest difference, as a share of `items`, found with probability `wanted` among so many flips.

    None when even flips that all go one way are too few.
    """
    if flips == 0 or power(flips, 1.0, alpha) < wanted:
        return None
    low, high = 0.5, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(flips, middle, alpha) >= wanted else (middle, high)
    return (2 * high - 1) * flips / items
