"""
The statistics: how sure a number is, whether two models differ, and how small a difference the study could have seen.

    intervals    95 %, from a paired bootstrap over people (Efron & Tibshirani 1993): a person's facts stay together.
                 Near 0 and 100 % there is too little to draw from, and exact bounds take its place (Clopper & Pearson
                 1934, for facts that cluster Korn & Graubard 1998)
    seeds        two or three seeds say little about the next: a t interval over seeds, joined with the people's part
                 (Student 1908, Satterthwaite 1946; of two and three seeds Cochran & Cox 1957); what both contain counts
                 once (Cameron, Gelbach & Miller 2011)
    shares       displaced and re-learned are shares of a loss, given only where the loss is above zero in these draws
    flips        two models on the same items: exact McNemar test (McNemar 1947; Edwards 1948 for the exact form), which
                 reads only the items that one has right and the other wrong; a coin decides under the null hypothesis.
                 Items about one entity that move together: one coin an entity (Fisher 1935)
    two repairs  superior, non-inferior or inferior by a margin stated before the run (Piaggio et al. 2012)
    many tests   Holm's correction (Holm 1979): with it, the chance of one false claim in all that is corrected together
                 is 5 %
    power        the smallest difference that the test finds four times in five, from the flips that were counted

Which interval when: `recalls_of`, or `recall_interval`, for recalls, `share_of` for displaced and re-learned,
`interval` for other means over people. The test of coverage, tests/test_coverage.py, makes data whose truth is known
and counts how often each interval holds it.

What it leaves out: Bayesian estimates, and one joint model of people and seeds.
"""
import functools
import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

NORMAL = 1.959963984540054  # the middle 95 % of a normal variable end here
BLOCK = 2**22  # people times resamples drawn at once: 100 MB


# ---- quantiles, by hand

def beta_cdf(x, a, b):
    """The chance that a Beta(a, b) variable, a and b above 0, is at most x. Source: the continued fraction DLMF
    8.17.22; it agrees with scipy within 1e-10 up to a and b of 10,000."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # below the mean the fraction converges faster
        return 1 - beta_cdf(1 - x, b, a)
    fraction = 1.0
    for k in range(60 + int(6 * math.sqrt(a + b)), 0, -1):  # from its last term to its first
        m = k // 2
        top = -(a + m) * (a + b + m) if k % 2 else m * (b - m)
        fraction = 1 + top * x / ((a + k - 1) * (a + k)) / fraction
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / a / fraction


def beta_quantile(q, a, b):
    """The x that a Beta(a, b) variable stays below with chance q, by bisection: to the last digit of `beta_cdf`."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if beta_cdf(middle, a, b) < q else (low, middle)
    return middle


@functools.cache
def t_quantile(df, alpha=0.05):
    """The t that Student's variable of df > 0 degrees of freedom (whole or not) stays within, on both sides of 0, with
    chance 1 - alpha: df / (df + t²) is a Beta(df / 2, 1 / 2) variable."""
    x = beta_quantile(alpha, df / 2, 0.5)
    return math.sqrt(df * (1 - x) / x)


def t_tails(t, df):
    """The chance that Student's variable of df > 0 degrees of freedom is as far from 0 as t, on either side."""
    return beta_cdf(df / (df + t * t), df / 2, 0.5)


# ---- intervals over people

def resampled(scores, resamples, generator, sizes=None):
    """Bootstrap means (resamples, models) of scores (people, models): people are drawn with replacement, the same for
    all models.

    sizes  (people,) facts of each; scores are then sums over a person's facts, and the means are a fact's
    """
    n, scores, means = len(scores), torch.as_tensor(scores, dtype=torch.float64), []
    for rows in torch.arange(resamples).split(max(1, BLOCK // n)):  # the digits do not depend on the block
        draws = torch.randint(n, (len(rows), n), generator=generator)
        counts = torch.zeros(len(rows), n).scatter_add_(1, draws, torch.ones(1, 1).expand_as(draws)).double()
        total = n if sizes is None else counts @ torch.as_tensor(sizes, dtype=torch.float64)[:, None]
        means.append(counts @ scores / total)
    return torch.cat(means)


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


def exact_interval(right, n):
    """[low, high] of a share when `right` of n independent answers are right: the shares that a binomial test at level
    0.05 does not reject. 200 of 200: [0.982, 1].

    Source: Clopper & Pearson 1934. Wilson's interval is shorter, but holds the truth less often than it says for some
    shares near the edge (Brown, Cai & DasGupta 2001: 84 to 90 %); this one never does, and so is on the long side.
    `right` and n need not be whole. ValueError unless 0 <= right <= n and n > 0.
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"right answers must be between 0 and the number asked, got {right} of {n}")
    return [beta_quantile(0.025, right, n - right + 1) if right > 0 else 0.0,
            beta_quantile(0.975, right + 1, n - right) if right < n else 1.0]


def clustered_interval(right, sizes):
    """`exact_interval` for facts that cluster: right (people,) right answers of each person's sizes (people,) facts.

    So many independent facts as would give the same variance take the place of all facts; never more than there are.
    Source: Korn & Graubard 1998, without their correction for few clusters.
    """
    right, sizes = np.asarray(right, dtype=float), np.asarray(sizes, dtype=float)
    n, share, people = sizes.sum(), right.sum() / sizes.sum(), len(sizes)
    variance = ((right - share * sizes) ** 2).sum() * people / max(1, people - 1) / n**2
    effective = min(n, share * (1 - share) / variance) if variance > 0 else n
    return exact_interval(min(share, 1.0) * effective, effective)


# ---- intervals over people and seeds

def t_interval(values):
    """[low, high] of the mean of K values, one a seed: mean ± t s / sqrt(K), t of K - 1 degrees of freedom (Student
    1908). A bootstrap over seeds has only (K - 1) / K of their variance: with two seeds it holds the truth 50 % of the
    time, with three 75 %. One value: [None, None]."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return [None, None]
    half = t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def seed_interval(bounds, values, shared=0.0):
    """[low, high] over people and seeds, from the people's interval and the seeds' values.

    bounds  [low, high] of the seeds' mean over other people, as `interval` gives it
    values  (K,) what each seed came to; one, or none, leaves the bounds as they are
    shared  the variance of the mean that both of them contain, `crossed`

    Both variances are added, less what both contain. From four seeds on half of the interval is so many standard errors
    as a t of Satterthwaite's (1946) degrees of freedom has; with two seeds it would hold the truth 88 % of the time. Of
    two and three it is `weighted`, and long: their t is 12.7 and 4.3.
    """
    values = np.asarray(values, dtype=float)
    if None in bounds or len(values) < 2 or (values == values[0]).all():
        return list(bounds)
    mean, (factor, of_seeds, df) = values.mean(), joined(bounds, values, shared)
    longer, spread = t_quantile(df) / NORMAL, NORMAL * math.sqrt(of_seeds)

    def half(side):
        """Half of the interval, from the people's half on one side."""
        if len(values) < 4:
            return weighted((factor * side / NORMAL) ** 2, of_seeds, len(values))
        return longer * math.hypot(factor * side, spread)
    return [float(mean - half(mean - bounds[0])), float(mean + half(bounds[1] - mean))]


def weighted(of_people, of_seeds, K, alpha=0.05):
    """How far two variances reach together when one is known and one comes from K values: the root of their sum, times
    the mean of the normal's quantile and of t's, each weighted with its variance (Cochran & Cox 1957)."""
    normal = -NormalDist().inv_cdf(alpha / 2)
    return (of_people * normal + of_seeds * t_quantile(K - 1, alpha)) / math.sqrt(of_people + of_seeds)


def crossed(samples):
    """Of samples (resamples, K): the variance of the K seeds' mean that comes from answers that differ by person *and*
    seed (the interaction). Other people would have another such part, and so would other seeds.

    The people's variance of one seed contains it K times, that of the mean once. One seed, or samples that are not
    finite: 0.
    """
    K = samples.shape[1]
    if K < 2 or not np.isfinite(samples).all():
        return 0.0
    return max(0.0, float(samples.var(0).mean() - samples.mean(1).var()) / (K - 1))


def joined(bounds, values, shared):
    """(the factor on the people's half-widths, the seeds' variance of their mean, Satterthwaite's degrees of freedom of
    both): as `seed_interval` needs them."""
    of_seeds = values.var(ddof=1) / len(values)
    of_people = ((bounds[1] - bounds[0]) / 2 / NORMAL) ** 2
    kept = max(0.0, of_people - shared)
    df = min((len(values) - 1) * ((kept + of_seeds) / of_seeds) ** 2, 10_000)
    return math.sqrt(kept / of_people) if of_people else 1.0, of_seeds, df


FEW = 10  # right or wrong answers: with 4 a bootstrap's interval holds the truth 90 % of the time, with 1, 62 %


def recall_interval(right, sizes, samples, by_seed=()):
    """[low, high] of a recall, the one to use in tables: the bootstrap's where no edge is near, exact near 0 and 100 %.

    right    (people,) right answers of each person, the mean over seeds if there are several
    sizes    (people,) facts of each person
    samples  (resamples,) of `resampled`, or (resamples, K), of each seed
    by_seed  (K,) each seed's recall
    """
    n, total, samples = np.sum(sizes), np.sum(right), np.reshape(samples, (len(samples), -1))
    people = interval(samples.mean(1)) if FEW <= total <= n - FEW else clustered_interval(right, sizes)
    low, high = seed_interval(people, by_seed, crossed(samples))
    return [max(0.0, low), min(1.0, high)]


def recalls_of(columns, facts, generator):
    """[[mean, low, high]] of each column of scores in [0, 1], columns (models, facts): 95 % over people."""
    sums, sizes = by_person(columns, facts)
    samples = resampled(sums, 10_000, generator, sizes).numpy()
    return [[float(right.sum() / sizes.sum()), *recall_interval(right, sizes, drawn)]
            for right, drawn in zip(sums.T, samples.T)]


class Estimate(NamedTuple):
    """A number with what its uncertainty is read from. Two on the same resamples can be subtracted.

    value    the estimate: the mean over seeds, or a share of such means
    samples  (resamples, K) what it comes to with other people, in each seed
    seeds    (K,) what it comes to in each seed; () where there is one
    """
    value: float
    samples: np.ndarray
    seeds: np.ndarray = ()

    def interval(self):
        """95 %, over people and seeds: [low, high]."""
        return seed_interval(interval(self.samples.mean(1)), self.seeds, crossed(self.samples))

    def p(self, null):
        """Two-sided p against a value: 1 - the level of the interval over people and seeds that ends there.

        The people's half of the interval that looks at `null` is taken as a normal variable's.
        """
        bounds, seeds = interval(self.samples.mean(1)), np.asarray(self.seeds, dtype=float)
        if None in bounds:
            return 1.0
        distance = abs(self.value - null)
        half = max(self.value - bounds[0] if self.value > null else bounds[1] - self.value, 1e-12)
        of_people = math.erfc(distance / half * NORMAL / math.sqrt(2))
        if len(seeds) < 2 or (seeds == seeds[0]).all():
            return of_people
        factor, of_seeds, df = joined(bounds, seeds, crossed(self.samples))
        if len(seeds) < 4:  # the alpha at which the interval ends at `null`, by bisection
            low, high, of_people = 0.0, 1.0, (factor * half / NORMAL) ** 2
            for _ in range(50):
                alpha = (low + high) / 2
                far = weighted(of_people, of_seeds, len(seeds), alpha) > distance
                low, high = (alpha, high) if far else (low, alpha)
            return high
        return t_tails(distance / math.hypot(factor * half / NORMAL, math.sqrt(of_seeds)), df)

    def __sub__(self, other):
        return Estimate(self.value - other.value, self.samples - other.samples, np.subtract(self.seeds, other.seeds))


# ---- shares of a loss: displaced, re-learned

def share_of(gain, loss):
    """gain / loss as an Estimate, or None where the loss is not above zero: its interval over people touches zero.

    gain, loss  Estimates on the same resamples: of recall, or of knowledge.
                displaced  = share_of(repaired - compressed, dense - compressed), each of held-out people
                re-learned = the same of seen people, minus displaced

    The value is the share of the means, not the mean of the seeds' shares, which a seed with a small loss would rule.
    A seed's entry is share + (its gain - share its loss) / loss: how it would move the share, to first order (the
    linearised ratio of survey sampling, Cochran 1977). Their mean is the share. This needs losses that are alike: where
    one of five draws loses three times as much as the others, and another share of it comes back, the interval holds
    the truth in 71 % of worlds (tests/test_coverage.py).
    """
    if (interval(loss.samples.mean(1))[0] or 0.0) <= 0:
        return None
    gains, losses = gain.samples.mean(1, keepdims=True), loss.samples.mean(1, keepdims=True)  # (resamples, 1)
    least = np.abs(losses)[losses != 0].min()  # for the resamples, 2.5 % at most, that lost nothing at all
    losses = np.where(losses == 0, least, losses)
    return Estimate(gain.value / loss.value, entries(gains, losses, gain.samples, loss.samples),
                    entries(gain.value, loss.value, gain.seeds, loss.seeds))


def entries(gain, loss, gains, losses):
    """share + how each seed would move it, to first order: `share_of`. gain, loss: the means, numbers or
    (resamples, 1); gains, losses: each seed's, (K,) or (resamples, K)."""
    share = gain / loss
    return share + (np.subtract(gains, gain) - share * np.subtract(losses, loss)) / loss


# ---- two repairs

def judged(bounds, margin=0.05):
    """The word for [low, high] of a - b. `margin` is stated before the run. Source: Piaggio et al. 2012 (CONSORT).

    superior      the whole interval is above 0
    non-inferior  it is above -margin: a may be worse, by less than the margin
    inferior      the whole interval is below 0, and a may be worse by more than the margin
    undecided     all else, and [None, None]
    """
    low, high = bounds
    if low is None:
        return "undecided"
    return "superior" if low > 0 else "non-inferior" if low > -margin else "inferior" if high < 0 else "undecided"


# ---- two models on the same items

def mcnemar(before, after):
    """(gained, lost, p) of two models' scores on the same items, each (N,): items that `after` has better, items that
    `before` has better, and the two-sided p of so uneven a split if each flip were a fair coin's. No flips: p = 1.

    With right and wrong as scores this is the exact McNemar test; with other scores, the sign test. It is the plain
    twin of `flip_test`, for items that each stand for themselves.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if before.shape != after.shape:
        raise ValueError(f"two models answer the same items, got {len(before)} and {len(after)} scores")
    gained, lost = int((after > before).sum()), int((after < before).sum())
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))  # exact, in whole numbers
    return gained, lost, min(1.0, 2 * tail / 2**n)


def entity_sums(before, after, entities):
    """(entities,) by how much each entity's items changed together; ValueError for scores that do not belong together.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if not before.shape == after.shape == (len(entities),):
        raise ValueError(f"each item has a score before, one after and an entity, got {before.shape}, {after.shape} "
                         f"and {len(entities)}")
    if not np.isfinite(before).all() or not np.isfinite(after).all():
        raise ValueError("scores must be finite numbers")
    _, index = np.unique(np.asarray(entities), return_inverse=True)
    return np.bincount(index, weights=after - before)


def flip_test(before, after, entities, draws=100_000, seed=0):
    """(gained, lost, p) as `mcnemar`, for items of one entity that move together: gained and lost count items, and the
    two-sided p is that of so large a total change if each *entity's* change were as likely to have the other sign.

    before, after  (N,) scores; entities (N,) whom each item is about. With one item an entity and right or wrong as
                   scores, p is the exact McNemar test's.

    Exact where changes are whole numbers, as those of right and wrong answers are (their distribution is added up
    entity by entity), and where at most 20 entities changed; else from `draws` random signs, which `seed` draws
    (Phipson & Smyth 2010: the data count as one draw, so that p is never 0). Source: Fisher 1935, Pitman 1937.
    """
    sums = np.abs(changed := entity_sums(before, after, entities))
    difference = np.subtract(after, before)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    observed, sums = abs(changed.sum()), sums[sums > 0]
    if observed <= 1e-12 * sums.sum() or not len(sums):
        return gained, lost, 1.0
    if (sums == sums.round()).all() and sums.sum() * len(sums) < 1e9:
        total = int(sums.sum())
        chance = np.zeros(total + 1)  # of each sum of the entities whose sign is plus
        chance[0], reached = 1.0, 0
        for size in sums.astype(int):
            chance[:reached + size + 1] /= 2
            chance[size:reached + size + 1] += chance[:reached + 1].copy()
            reached += size
        return gained, lost, min(1.0, 2 * float(chance[(total + int(observed) + 1) // 2:].sum()))
    if len(sums) <= 20:
        flipped = np.zeros(1)
        for size in sums:
            flipped = np.concatenate([flipped + size, flipped - size])
        return gained, lost, float(np.mean(np.abs(flipped) >= observed * (1 - 1e-12)))
    generator, extreme = np.random.default_rng(seed), 0
    for rows in np.array_split(np.arange(draws), max(1, draws * len(sums) // BLOCK)):
        signs = generator.integers(0, 2, (len(rows), len(sums)), dtype=np.int8) * 2.0 - 1
        extreme += int((np.abs(signs @ sums) >= observed * (1 - 1e-12)).sum())
    return gained, lost, (1 + extreme) / (1 + draws)


def pooled_test(before, after, entities):
    """`flip_test` of the mean over seeds: before, after (K, N), one row a seed; gained and lost count items whose mean
    changed.

    It asks about these seeds and other people; whether another seed would do the same is asked by `seed_interval`.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if before.ndim != 2 or before.shape != after.shape:
        raise ValueError(f"scores must be (seeds, items), both alike, got {before.shape} and {after.shape}")
    return flip_test(before.sum(0), after.sum(0), entities)  # sums: whole numbers stay whole


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


def detectable_flips(before, after, entities, alpha=0.05):
    """`detectable` for `flip_test`: the smallest mean difference an item found four times in five; None when
    even changes that all have one sign are too few.

    Entities that change by different amounts count as fewer of one size, with the same total and the same variance.
    """
    sums = np.abs(entity_sums(before, after, entities))
    if not sums.any():
        return None
    size = (sums**2).sum() / sums.sum()
    found = detectable(len(entities), int(sums.sum() / size + 1e-9), alpha)
    return None if found is None else float(found * size)


# ---- ranks

def ranks(x):
    """(N, M) ranks 0 .. M - 1 of each row of x (N, M); equal values share the mean of their ranks."""
    below = (x[:, None, :] < x[:, :, None]).sum(-1)  # (N, M) values below each
    equal = (x[:, None, :] == x[:, :, None]).sum(-1)
    return below.double() + (equal - 1) / 2


def rank_correlation(a, b):
    """(N,) Spearman's correlation (1904) of each row of a (N, M) with the same row of b (N, M), ties by their mean
    rank; nan where a row is constant. Correct means over rows for it: `nanmean`."""
    a, b = (ranks(x) - (x.shape[1] - 1) / 2 for x in (a, b))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
