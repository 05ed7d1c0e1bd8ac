"""
Makes stats.json: what scipy and statsmodels say about the numbers of study/statistics.py. Our code takes no part.

All inputs are stored, resamples too: a port needs no generator of ours. scipy and statsmodels are no part of the study,
so they are imported by name, in an environment of their own:

    python -m venv out/golden && . out/golden/bin/activate
    pip install numpy==2.4.6 scipy==1.17.1 statsmodels==0.15.0
    python tests/golden/make_stats.py
"""
import importlib
import json
import os

import numpy as np

RNG = np.random.default_rng(0)


def short(x):
    """Numbers of six digits, so that the file is short and what it says is exact."""
    return np.round(np.asarray(x, dtype=float), 6).tolist()


def quantiles(stats):
    """Of Beta(a, b) and, on both sides, of Student's t."""
    beta = [(q, a, b) for q in (0.025, 0.5, 0.975) for a, b in ((0.5, 0.5), (1, 200), (2, 5), (160, 41), (30.25, 7.5))]
    t = [(df, alpha) for df in (1, 2, 3, 4.5, 29, 499) for alpha in (0.05, 0.0125)]
    return {"beta_quantile": [{"q": q, "a": a, "b": b, "result": float(stats.beta.ppf(q, a, b))} for q, a, b in beta],
            "t_quantile": [{"df": df, "alpha": alpha, "result": float(stats.t.ppf(1 - alpha / 2, df))}
                           for df, alpha in t]}


def intervals(stats, proportion):
    """Exact bounds, alone and of facts that cluster; t over seeds, alone and joined with the people's part."""
    exact = [(0, 200), (1, 200), (200, 200), (7, 30), (30, 60), (2490, 2500)]
    clusters = [([5, 5, 4, 5, 0, 5, 5, 5], [5] * 8), ([2, 1, 3, 0, 3], [2, 2, 3, 1, 4]), ([3, 3], [3, 3])]
    out = []
    for right, sizes in clusters:
        right, sizes = np.array(right), np.array(sizes)
        p, n, N = right.sum() / sizes.sum(), sizes.sum(), len(sizes)
        variance = N / (N - 1) * np.sum((right - p * sizes) ** 2) / n**2
        effective = min(n, p * (1 - p) / variance) if variance else n
        bounds = proportion.proportion_confint(p * effective, effective, 0.05, "beta")
        out.append({"right": right.tolist(), "sizes": sizes.tolist(), "effective": float(effective),
                    "result": [float(x) for x in bounds]})
    seeds = [[0.71, 0.84], [0.2, 0.3, 0.7], [0.312, 0.355, 0.301, 0.398, 0.35]]

    def t_interval(values):
        return [float(x) for x in stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))]
    joined = []
    for values, (below, above), shared in [(s, half, shared) for s in seeds for half in ((0.02, 0.03), (0.5, 0.4))
                                          for shared in (0.0, 5e-5, 0.1)]:  # the last is all of the people's, or more
        mean, K, z, v = np.mean(values), len(values), stats.norm.ppf(0.975), stats.sem(values) ** 2
        low, high = mean - below, mean + above
        both = ((high - low) / 2 / z) ** 2
        people = max(0.0, both - shared)
        parts = [(side / z) ** 2 * people / both for side in (below, above)]  # the people's variance on either side
        if K > 3:  # Satterthwaite
            t = stats.t.ppf(0.975, min(10_000, (people + v) ** 2 / (v**2 / (K - 1))))
            halves = [t * np.sqrt(part + v) for part in parts]
        else:  # Cochran and Cox
            halves = [(part * z + v * stats.t.ppf(0.975, K - 1)) / np.sqrt(part + v) for part in parts]
        bounds = [mean - halves[0], mean + halves[1]]
        joined.append({"bounds": [float(low), float(high)], "values": values, "shared": shared,
                       "result": [float(x) for x in bounds]})
    return {"exact_interval": [{"right": right, "n": n, "result": [
                float(x) for x in proportion.proportion_confint(right, n, 0.05, "beta")]} for right, n in exact],
            "clustered_interval": out,
            "t_interval": [{"values": s, "result": t_interval(s)} for s in seeds], "seed_interval": joined}


def bootstrap():
    """12 people of 1 to 5 facts; dense, compressed and two repaired models; 200 resamples; displaced, and the two
    repairs beside each other."""
    sizes = RNG.integers(1, 6, 12)
    right = np.stack([RNG.binomial(sizes, p) for p in (0.95, 0.4, 0.8, 0.6)], 1)  # (people, models)
    draws = RNG.integers(0, 12, (200, 12))
    means = np.array([right[row].sum(0) / sizes[row].sum() for row in draws])
    value = right.sum(0) / sizes.sum()
    dense, compressed, a, b = means.T
    displaced = [(a - compressed) / (dense - compressed), (b - compressed) / (dense - compressed)]

    def middle(samples):  # of the sorted samples, the ones at 2.5 and 97.5 % of the way, straight lines between them
        at, ordered = np.array([0.025, 0.975]) * (len(samples) - 1), np.sort(samples)
        below = at.astype(int)
        return (ordered[below] + (at - below) * (ordered[below + 1] - ordered[below])).tolist()
    low, high = difference = middle(displaced[0] - displaced[1])
    word = "superior" if low > 0 else "non-inferior" if low > -0.05 else "inferior" if high < 0 else "undecided"
    return {"right": right.tolist(), "sizes": sizes.tolist(), "draws": draws.tolist(), "means": value.tolist(),
            "resampled_means": means.tolist(), "intervals": [middle(x) for x in means.T],
            "displaced": [float((value[i] - value[1]) / (value[0] - value[1])) for i in (2, 3)],
            "displaced_intervals": [middle(x) for x in displaced],
            "compare": {"margin": 0.05, "interval": difference, "word": word}}


def tests(stats, contingency, multitest):
    """McNemar, Holm, power and detectable; whole entities flipped, against every choice of signs."""
    flips = [(0, 0), (1, 0), (6, 0), (8, 2), (59, 121), (300, 250)]
    p = short(RNG.random(9) ** 3)

    def power(flips, share, alpha):
        k = np.arange(flips + 1)
        rejected = np.minimum(1, 2 * stats.binom.cdf(np.minimum(k, flips - k), flips, 0.5)) <= alpha * (1 + 1e-12)
        return float(stats.binom.pmf(k, flips, share)[rejected].sum())
    optimize = importlib.import_module("scipy.optimize")
    found = []
    for items, n, alpha in ((1000, 200, 0.05), (1000, 200, 0.05 / 30), (500, 40, 0.05), (500, 5, 0.05)):
        reached = power(n, 1.0, alpha) >= 0.8
        share = optimize.brentq(lambda s: power(n, s, alpha) - 0.8, 0.5, 1.0) if reached else None
        found.append({"items": items, "flips": n, "alpha": alpha, "wanted": 0.8,
                      "result": (2 * share - 1) * n / items if reached else None})
    entities = []
    for scale in (1, 0.7):
        before, after = RNG.integers(0, 2, 36), (RNG.random(36) < 0.75).astype(int)
        about = RNG.integers(0, 12, 36)
        before, after = scale * before, scale * after
        sums = np.bincount(about, after - before, 12)
        result = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf)
        entities.append({"before": short(before), "after": short(after), "entities": about.tolist(),
                         "gained": int((after > before).sum()), "lost": int((after < before).sum()),
                         "p": float(result.pvalue)})
    return {"mcnemar": [{"gained": g, "lost": n, "p": float(contingency.mcnemar([[7, n], [g, 3]], exact=True).pvalue)}
                        for g, n in flips],
            "holm": {"p": p, "result": [float(x) for x in multitest.multipletests(p, method="holm")[1]]},
            "power": [{"flips": n, "share": share, "alpha": alpha, "result": power(n, share, alpha)}
                      for n, share, alpha in ((6, 0.9, 0.05), (60, 0.7, 0.05), (200, 0.6, 0.0125), (5, 1.0, 0.05))],
            "detectable": found, "flip_test": entities}


def others(stats, special):
    """A share's value over three seeds and each seed's entry; normalised knowledge; rank correlation with ties, null
    where a row is constant."""
    logprobs = [short(np.log(RNG.dirichlet(np.ones(n + 2))[:n])) for n in (2, 5, 3, 8)]
    gold = [1, 0, 2, 7]
    a = [[1, 2, 3, 4, 5], [2, 1, 2, 3, 3], [0.5, 0.5, 0.5, 0.1, 0.9], [1, 1, 1, 1, 1]]
    b = [[2, 1, 4, 3, 5], [1, 2, 2, 5, 4], [3, 3, 1, 1, 2], [1, 2, 3, 4, 5]]
    rho = [None if len(set(x)) == 1 else float(stats.spearmanr(x, y).statistic) for x, y in zip(a, b)]
    gains, losses = np.array([0.04, 0.09, 0.05]), np.array([0.12, 0.17, 0.16])
    share = gains.sum() / losses.sum()
    return {"share_of": {"gains": gains.tolist(), "losses": losses.tolist(), "value": float(share),
                         "seeds": (share + (gains - share * losses) / losses.mean()).tolist()},
            "normalised": {"logprobs": logprobs, "gold": gold, "result": [
                float(special.log_softmax(row)[g]) for row, g in zip(logprobs, gold)]},
            "rank_correlation": {"a": a, "b": b, "result": rho}}


def main():
    """Write stats.json."""
    stats, special = (importlib.import_module(f"scipy.{name}") for name in ("stats", "special"))
    proportion, multitest = (importlib.import_module(f"statsmodels.stats.{x}") for x in ("proportion", "multitest"))
    contingency = importlib.import_module("statsmodels.stats.contingency_tables")
    out = {**quantiles(stats), **intervals(stats, proportion), "bootstrap": bootstrap(),
           **tests(stats, contingency, multitest), **others(stats, special)}
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stats.json")
    with open(path, "w", encoding="utf-8") as f:
        f.write("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in out.items()) + "\n}\n")


if __name__ == "__main__":
    main()
