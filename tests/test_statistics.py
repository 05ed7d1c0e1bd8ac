"""The statistics against closed forms, published small cases, scipy's numbers and counts done by hand."""
import itertools
import json
import math
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from study import statistics
from study.statistics import (Estimate, beta_cdf, beta_quantile, by_person, clustered_interval, crossed,
                              detectable, detectable_flips, exact_interval, flip_test, holm, interval, judged, mcnemar,
                              pooled_test, power, rank_correlation, recall_interval, resampled, seed_interval,
                              share_of, t_interval, t_quantile, t_tails)
from world.score import knowledge


# ---- intervals

def test_bootstrap_interval_is_the_normal_one_for_many_people():
    """Oracle: mean ± 1.96 s / sqrt(n), which the bootstrap approaches."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(800, 1, generator=generator).double()
    low, high = interval(resampled(scores, 10_000, generator)[:, 0])
    mean, half = scores.mean().item(), 1.96 * scores.std().item() / math.sqrt(800)
    assert abs(low - (mean - half)) < 0.05 * half and abs(high - (mean + half)) < 0.05 * half


def test_bootstrap_is_paired():
    """Two models that differ by a constant on every person differ by it in every resample: people, not models, are
    drawn.
    """
    scores = torch.rand(50, 1, generator=torch.Generator().manual_seed(1)).double()
    samples = resampled(torch.cat([scores, scores + 0.25], dim=1), 500, torch.Generator().manual_seed(2))
    assert torch.allclose(samples[:, 1] - samples[:, 0], torch.full((500,), 0.25, dtype=torch.float64), atol=1e-12)


def test_bootstrap_draws_as_many_people_as_there_are():
    ones = resampled(torch.ones(7, 1), 100, torch.Generator().manual_seed(3))
    assert torch.allclose(ones, torch.ones_like(ones))


def test_people_with_more_facts_weigh_more():
    """Ada has 3 facts, 2 right; Ben has 1, wrong: recall 2 of 4. Drawn: Ada twice, 2/3; both, 1/2; Ben twice, 0."""
    facts = [SimpleNamespace(person=person) for person in ("Ada", "Ben", "Ada", "Ada")]
    sums, sizes = by_person([[1, 0, 0, 1]], facts)
    assert sums.tolist() == [[2], [0]] and sizes.tolist() == [3, 1]
    samples = resampled(sums, 200, torch.Generator().manual_seed(0), sizes)
    assert {round(x, 6) for x in samples[:, 0].tolist()} == {0.0, 0.5, round(2 / 3, 6)}


@pytest.mark.parametrize("sizes", [None, np.arange(1, 41)])
def test_resamples_drawn_in_blocks_have_the_same_digits(monkeypatch, sizes):
    """E21: 10,042 questions took 2 GB. The draws in one piece, as they were before there were blocks."""
    scores = torch.rand(40, 3, generator=torch.Generator().manual_seed(4)).double()
    draws = torch.randint(40, (101, 40), generator=torch.Generator().manual_seed(5))
    counts = torch.zeros(101, 40).scatter_add_(1, draws, torch.ones(101, 40)).double()
    whole = counts @ scores / (40 if sizes is None else counts @ torch.as_tensor(sizes).double()[:, None])
    for block in (1, 90, 40 * 101, 10**9):
        monkeypatch.setattr(statistics, "BLOCK", block)
        assert torch.equal(resampled(scores, 101, torch.Generator().manual_seed(5), sizes), whole)


# ---- quantiles and exact bounds

@pytest.mark.parametrize("x", [1e-9, 0.01, 0.3, 0.5, 0.77, 1 - 1e-9])
def test_beta_in_closed_form(x):
    """x**a for b = 1; 1 - (1 - x)**b for a = 1; the arcsine law for halves; a binomial tail for whole numbers."""
    assert beta_cdf(x, 3.5, 1) == pytest.approx(x**3.5, rel=1e-12)
    assert beta_cdf(x, 1, 200) == pytest.approx(-math.expm1(200 * math.log1p(-x)), rel=1e-11)
    assert beta_cdf(x, 0.5, 0.5) == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)), rel=1e-11)
    tail = sum(math.comb(11, k) * x**k * (1 - x)**(11 - k) for k in range(4, 12))
    assert beta_cdf(x, 4, 8) == pytest.approx(tail, rel=1e-12)
    assert beta_cdf(0, 2, 3) == 0 and beta_cdf(1, 2, 3) == 1


def test_quantiles_undo_the_distribution():
    for q in (0.025, 0.5, 0.975):
        for a, b in ((0.5, 0.5), (3, 1), (197.3, 4.2), (5000, 5000)):
            assert beta_cdf(beta_quantile(q, a, b), a, b) == pytest.approx(q, abs=1e-11)


@pytest.mark.parametrize("df", [1, 2, 4, 7.3, 100])
def test_t_tails_are_what_lies_beyond_a_quantile(df):
    for alpha in (0.5, 0.05, 1e-4):
        assert t_tails(t_quantile(df, alpha), df) == pytest.approx(alpha, rel=1e-8)
    assert t_tails(2.0, 1) == pytest.approx(1 - 2 * math.atan(2.0) / math.pi, rel=1e-12)  # Cauchy's distribution
    assert t_tails(2.0, 2) == pytest.approx(1 - 2.0 / math.sqrt(2 + 2.0**2), rel=1e-12)
    assert t_tails(0.0, df) == 1.0


@pytest.mark.parametrize("seeds", [(), (0.3,), (0.25, 0.35), (0.2, 0.3, 0.4), (0.2, 0.25, 0.35, 0.4),
                                   (0.28, 0.31, 0.30, 0.29, 0.32), (0.3, 0.3, 0.3)])
def test_p_is_one_in_twenty_at_both_ends_of_the_interval(seeds):
    """Lopsided people, and seeds from nearly alike to far apart; beyond an end p is smaller, within it larger."""
    samples = 0.3 + np.array([-0.1] * 10 + [0.0] * 80 + [0.05] * 10)[:, None]
    found = Estimate(0.3, samples + np.linspace(-0.3, 0.3, len(seeds) or 1) * (samples - 0.3), seeds)
    for end, out in zip(found.interval(), (-0.01, 0.01)):
        assert found.p(end) == pytest.approx(0.05, rel=1e-6)
        assert found.p(end + out) < 0.05 < found.p(end - out)
    assert found.p(0.3) == pytest.approx(1.0)
    assert Estimate(0.3, np.array([[0.1] * 4, [np.inf] * 4]), seeds).p(0.0) == 1.0


def test_t_quantiles_of_the_printed_tables():
    for df, t in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)):
        assert t_quantile(df) == pytest.approx(t, abs=5e-4)
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)  # Cauchy's distribution
    assert t_quantile(10_000) == pytest.approx(statistics.NORMAL, abs=5e-4)


def test_exact_bounds_where_all_or_none_is_right():
    low, high = exact_interval(200, 200)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 200), rel=1e-10), 1.0) and round(low, 3) == 0.982
    assert exact_interval(0, 200) == pytest.approx([0, 1 - low], rel=1e-10)


def test_exact_bounds_are_the_shares_that_a_binomial_test_does_not_reject():
    low, high = exact_interval(7, 30)
    assert sum(statistics.binomial(30, low)[7:]) == pytest.approx(0.025, rel=1e-9)
    assert sum(statistics.binomial(30, high)[:8]) == pytest.approx(0.025, rel=1e-9)
    for right, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"{right} of {n}"):
            exact_interval(right, n)


def test_facts_that_cluster_count_for_fewer():
    """20 people of 5 facts that are all right or all wrong are as much as 20 facts, nearly (19 / 20 of them)."""
    right = np.array([5] * 17 + [0] * 3)
    assert clustered_interval(right, np.full(20, 5)) == pytest.approx(exact_interval(0.85 * 19, 19))
    spread = np.array([4] * 15 + [5] * 5)  # 15 wrong answers, never two of one person: no more than 100 facts
    assert clustered_interval(spread, np.full(20, 5)) == exact_interval(85, 100)
    assert clustered_interval([5] * 20, [5] * 20) == exact_interval(100, 100)


def test_recall_takes_exact_bounds_near_the_edge_only():
    sizes, samples = np.full(50, 4), np.linspace(0.5, 0.7, 1001)
    assert recall_interval(np.full(50, 2), sizes, samples) == interval(samples)
    for wrong in (0, 3, 9):
        right = sizes - (np.arange(50) < wrong)
        assert recall_interval(right, sizes, samples) == clustered_interval(right, sizes)
    right = sizes - (np.arange(50) < 10)
    assert recall_interval(right, sizes, samples) == interval(samples)
    low, high = recall_interval(sizes, sizes, np.ones(9), [1, 0.9, 1.0])  # over seeds: wider, and still a share
    assert low < 0.9 and high == 1


# ---- seeds

def test_t_interval_by_hand():
    """0.2, 0.3 and 0.7: mean 0.4, s² = 0.07, 4.3027 * sqrt(0.07 / 3) = 0.6572."""
    assert t_interval([0.2, 0.3, 0.7]) == pytest.approx([0.4 - 0.65725, 0.4 + 0.65725], abs=1e-4)
    assert t_interval([0.2]) == [None, None] and t_interval([0.5, 0.5]) == [0.5, 0.5]


def test_seeds_widen_an_interval():
    assert seed_interval([0.1, 0.3], []) == seed_interval([0.1, 0.3], [0.2]) == [0.1, 0.3]
    assert seed_interval([0.1, 0.3], [0.2, 0.2]) == [0.1, 0.3]  # seeds that agree add nothing
    assert seed_interval([None, None], [0.1, 0.2]) == [None, None]


def test_two_and_three_seeds_weigh_the_quantiles_of_people_and_seeds():
    """By hand: the people's standard error is 0.1 / 1.96 below and 0.2 / 1.96 above; that of three seeds is
    0.01 / sqrt(3), t of 2 degrees of freedom 4.30265; that of two seeds 0.01, t of 1 degree 12.7062."""
    for values, variance, t in (([0.2, 0.21, 0.19], 0.0001 / 3, 4.302653), ([0.19, 0.21], 0.0001, 12.706205)):
        for shared, kept in ((0.0, (1.0, 1.0)), (1e9, (0.0, 0.0))):
            low, high = seed_interval([0.1, 0.4], values, shared)
            for found, side, share in ((0.2 - low, 0.1, kept[0]), (high - 0.2, 0.2, kept[1])):
                people = share * (side / 1.9599640) ** 2
                by_hand = (people * 1.9599640 + variance * t) / math.sqrt(people + variance)
                assert found == pytest.approx(by_hand, rel=1e-6)
    assert seed_interval([0.2, 0.2], [0.1, 0.2, 0.3]) == pytest.approx(t_interval([0.1, 0.2, 0.3]))  # people agree
    # shared: a half of the people's variance, sides alike
    low, high = seed_interval([-1.9599640, 1.9599640], [-1.0, 0.0, 1.0], 0.5)
    assert high == pytest.approx((0.5 * 1.9599640 + 4.302653 / 3) / math.sqrt(0.5 + 1 / 3), rel=1e-6) == -low


@pytest.mark.parametrize("K", [2, 3])
def test_p_of_few_seeds_is_that_of_the_interval_that_ends_there(K):
    rng = np.random.default_rng(K)
    e = Estimate(0.5, rng.normal(0.5, 0.1, (4000, 1)) + np.zeros((1, K)), np.linspace(0.4, 0.6, K))
    low, high = e.interval()
    assert e.p(low) == pytest.approx(0.05, abs=1e-6) and e.p(high) == pytest.approx(0.05, abs=1e-6)
    assert e.p(0.5) == pytest.approx(1, abs=1e-6) and e.p(low - 1) < e.p(low - 0.1) < 0.05 < e.p(low + 0.01)


def test_four_seeds_add_variances():
    """Equal variances of people and seeds: df = 3 * (2 / 1)² = 12, half = t(12) * sqrt(2) * the common standard error.
    """
    values = np.array([-1.0, -1, 1, 1])
    error = math.sqrt(values.var(ddof=1) / 4)
    low, high = seed_interval([-statistics.NORMAL * error, statistics.NORMAL * error], values)
    assert high == pytest.approx(2.178813 * math.sqrt(2) * error, rel=1e-6) and low == pytest.approx(-high)
    assert seed_interval([-1e-9, 1e-9], values) == pytest.approx(t_interval(values), rel=1e-6)  # people agree
    assert seed_interval([-50, 90], values * 1e-3) == pytest.approx([-50, 90], rel=1e-3)  # seeds agree
    bounds = [-statistics.NORMAL * error, statistics.NORMAL * error]
    assert seed_interval(bounds, values, error**2) == pytest.approx(t_interval(values))  # all of it is in both
    assert seed_interval(bounds, values, 9 * error**2) == pytest.approx(t_interval(values))
    low, high = seed_interval(bounds, values, error**2 / 2)  # df = 3 * 1.5², 1.5 variances
    assert high == pytest.approx(t_quantile(6.75) * math.sqrt(1.5) * error, rel=1e-6) and low == pytest.approx(-high)


def test_what_people_and_seeds_make_together_is_the_mean_square_of_their_interaction():
    """The analysis of variance of 400 people in five seeds, by hand: (x_pk - x_p - x_k + x) is what remains."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1)) + 3 * rng.normal(size=(1, 5)) + 2 * rng.normal(size=(400, 5))
    left = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    square = (left**2).sum() / (400 * 4)
    samples = resampled(x, 20_000, torch.Generator().manual_seed(0)).numpy()
    assert crossed(samples) == pytest.approx(square / 400 / 5, rel=0.03) == pytest.approx(2**2 / 2000, rel=0.2)
    assert crossed(samples[:, :1].repeat(5, 1)) == pytest.approx(0, abs=1e-15)  # seeds that agree about each person
    left = left[:, :3] - left[:, :3].mean(1, keepdims=True)  # of three seeds
    assert crossed(samples[:, :3]) == pytest.approx((left**2).sum() / (400 * 2) / 400 / 3, rel=0.05)
    assert crossed(samples[:, :1]) == 0.0 and crossed(np.full((9, 5), np.inf)) == 0.0


# ---- shares

def estimates(seed=0, people=300, seeds=1, recalls=(0.9, 0.6, 0.7)):
    """Estimates of dense, compressed and repaired recall: of one draw of right answers, on the same resamples."""
    rng = np.random.default_rng(seed)
    right = rng.random((people, 1, 1)) * 0.5 + rng.random((people, seeds, 3)) * 0.5 < recalls
    samples = resampled(right.reshape(people, -1), 2000, torch.Generator().manual_seed(seed)).view(2000, seeds, 3)
    means = right.mean(0)
    return [Estimate(means[:, i].mean(), samples[:, :, i].numpy(), means[:, i] if seeds > 1 else ()) for i in range(3)]


def test_one_seed_is_the_bootstrap_of_the_ratio():
    dense, compressed, repaired = estimates()
    share = share_of(repaired - compressed, dense - compressed)
    assert share.value == (repaired.value - compressed.value) / (dense.value - compressed.value)
    ratio = (repaired.samples - compressed.samples) / (dense.samples - compressed.samples)
    assert share.interval() == interval(ratio[:, 0])
    assert share_of(dense - compressed, dense - compressed).interval() == [1, 1]


def test_no_share_of_a_loss_that_may_be_zero():
    dense, compressed, repaired = estimates(recalls=(0.6, 0.6, 0.7))
    assert share_of(repaired - compressed, dense - compressed) is None
    assert share_of(repaired - compressed, compressed - repaired) is None  # a gain is no loss
    some = np.array([0.0] + [0.1] * 99)[:, None]  # a resample that lost nothing counts as one that lost least
    assert share_of(Estimate(0.1, some), Estimate(0.1, some)).samples[:, 0].tolist() == [0.0] + [1.0] * 99
    no = Estimate(0.1, np.array([[0.1], [np.nan]]))
    assert share_of(no, no) is None


def test_a_seed_moves_the_share_as_the_ratio_of_means_says():
    """Leave-one-out: the share without seed k, to first order, is the mean of the other seeds' entries."""
    dense, compressed, repaired = estimates(seeds=40, people=1000)
    share = share_of(repaired - compressed, dense - compressed)
    assert share.seeds.mean() == pytest.approx(share.value)
    gains, losses = (repaired - compressed).seeds, (dense - compressed).seeds
    for k in range(40):
        rest = np.arange(40) != k
        assert gains[rest].mean() / losses[rest].mean() == pytest.approx(share.seeds[rest].mean(), abs=2e-4)
    gains, losses = ((a - b).samples for a, b in ((repaired, compressed), (dense, compressed)))  # and in each resample
    assert share.samples.mean(1) == pytest.approx(gains.mean(1) / losses.mean(1))
    assert (gains[:, 1:].mean(1) / losses[:, 1:].mean(1)) == pytest.approx(share.samples[:, 1:].mean(1), abs=5e-4)


def test_seeds_whose_losses_differ_and_whose_share_is_one():
    """Each seed gives back a third of another loss: seeds agree about the share, and add nothing to its interval."""
    loss = Estimate(0.2, np.array([[0.1, 0.2, 0.3]] * 3), np.array([0.1, 0.2, 0.3]))
    gain = Estimate(loss.value / 3, loss.samples / 3, loss.seeds / 3)
    assert share_of(gain, loss).seeds == pytest.approx([1 / 3] * 3) == share_of(gain, loss).samples[0]


def test_subtracting_keeps_pairs():
    a, b = (Estimate(x, np.array([[1.0, x], [5, 2]]), np.array([2.0, 2 * x - 2])) for x in (3.0, 1.0))
    assert (a - b).value == 2 and (a - b).samples.tolist() == [[0, 2], [0, 0]] and (a - b).seeds.tolist() == [0, 4]
    one = Estimate(3.0, np.array([[1.0], [5]]))
    assert (one - one).samples.tolist() == [[0], [0]] and len((one - one).seeds) == 0


# ---- two repairs

@pytest.mark.parametrize("low, high, word", [
    (0.01, 0.3, "superior"), (0.0, 0.1, "non-inferior"), (-0.04, 0.3, "non-inferior"), (-0.04, -0.01, "non-inferior"),
    (-0.05, 0.1, "undecided"), (-0.3, 0.3, "undecided"), (-0.3, -0.01, "inferior"), (-0.3, -0.2, "inferior")])
def test_the_word_follows_the_interval(low, high, word):
    samples = np.linspace(low - (high - low) / 38, high + (high - low) / 38, 401)  # its middle 95 % are low .. high
    bounds = (Estimate(0.5, samples[:, None] + 0.5) - Estimate(0.5, np.full((401, 1), 0.5))).interval()
    assert bounds == pytest.approx([low, high], abs=1e-9) and judged(bounds) == word or low in (0.0, -0.05)
    assert judged(bounds, margin=1.0) in ("superior", "non-inferior")


def test_a_comparison_is_paired_and_knows_of_seeds():
    wide = np.random.default_rng(0).normal(0, 1, 500)[:, None]
    bounds = (Estimate(0.1, wide + 0.1) - Estimate(0.0, wide)).interval()
    assert bounds == pytest.approx([0.1, 0.1]) and judged(bounds) == "superior"
    a = Estimate(0.5, wide.repeat(3, 1) + 0.1, np.array([0.5, 0.9, 0.1]))
    b = Estimate(0.4, wide.repeat(3, 1), np.array([0.4, 0.3, 0.5]))
    assert judged((a - b).interval()) == "undecided"
    nothing = (Estimate(0.1, np.array([[0.1], [math.inf]])) - Estimate(0.1, np.array([[0.1], [0.2]]))).interval()
    assert nothing == [None, None] and judged(nothing) == "undecided"


# ---- McNemar

def scores(both, gained, lost, neither):
    """(before, after) with so many items of each kind."""
    return ([1] * both + [0] * gained + [1] * lost + [0] * neither,
            [1] * both + [1] * gained + [0] * lost + [0] * neither)


@pytest.mark.parametrize("gained, lost, p", [
    (0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0),
    (6, 0, 2 / 64),                                          # all six coins alike
    (8, 2, 2 * (1 + 10 + 45) / 1024),                        # at most two of ten
    (1, 9, 2 * (1 + 10) / 1024),
    (121, 59, 2 * sum(math.comb(180, k) for k in range(60)) / 2**180),
])
def test_exact_mcnemar_by_hand(gained, lost, p):
    found = mcnemar(*scores(7, gained, lost, 3))
    assert found[:2] == (gained, lost) and found[2] == pytest.approx(p, rel=1e-12)


def test_exact_mcnemar_of_a_published_table():
    """Agresti, Categorical Data Analysis, table 10.1: approval of the prime minister, 86 and 150 changed their minds;
    the chi-square there is 17.36 (z = -4.17), of which the two-sided p is 3.1e-5, and the exact one close to it."""
    _, _, p = mcnemar(*scores(794, 86, 150, 570))
    assert 2.5e-5 < p < 4.5e-5
    assert p == pytest.approx(2 * sum(math.comb(236, k) for k in range(87)) / 2**236, rel=1e-12)


def test_swapping_the_models_changes_only_the_names():
    before, after = scores(4, 9, 3, 2)
    assert mcnemar(before, after) == (9, 3, mcnemar(after, before)[2])
    assert mcnemar(before, before) == (0, 0, 1.0)  # E7
    with pytest.raises(ValueError, match="2 and 3"):
        mcnemar([0, 1], [0, 1, 1])


def test_graded_scores_make_it_the_sign_test():
    assert mcnemar([0.5, 0.2, 0.9, 0.3], [0.6, 0.1, 0.9, 1.0]) == (2, 1, 1.0)


def test_many_flips_do_not_overflow():
    assert mcnemar(*scores(0, 5000, 0, 0))[2] == 0.0 and mcnemar(*scores(0, 2500, 2500, 0))[2] == 1.0


# ---- whole entities flipped

def every_sign(sums):
    """The p of a sign-flip test by trying all signs: the oracle."""
    observed = abs(sum(sums))
    found = [abs(sum(s * x for s, x in zip(signs, sums))) >= observed - 1e-9
             for signs in itertools.product((-1, 1), repeat=len(sums))]
    return sum(found) / len(found)


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (6, 0), (8, 2), (2, 8), (5, 5), (121, 59), (1500, 1400)])
def test_one_item_an_entity_is_mcnemar(gained, lost):
    before, after = scores(7, gained, lost, 3)
    assert flip_test(before, after, range(len(before))) == pytest.approx(mcnemar(before, after), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1, 0.37])  # whole changes and others take different ways
def test_flips_against_every_choice_of_signs(seed, scale):
    rng = np.random.default_rng(seed)
    before, after = rng.integers(0, 2, 30), rng.integers(0, 2, 30) | (rng.random(30) < 0.4)
    entities = [f"city {i}" for i in rng.integers(0, 11, 30)]
    gained, lost, p = flip_test(scale * before, scale * after, entities)
    sums = [sum(a - b for a, b, e in zip(after.tolist(), before.tolist(), entities) if e == name)
            for name in sorted(set(entities))]
    assert (gained, lost) == mcnemar(before, after)[:2] and p == pytest.approx(every_sign(sums))


def test_items_that_move_together_are_one_flip():
    """Six cities whose five wordings flip together: 2 / 64, where McNemar's test would count 30 coins."""
    before, after, cities = [0] * 30, [1] * 30, [i // 5 for i in range(30)]
    assert flip_test(before, after, cities) == (30, 0, 2 / 64)
    assert mcnemar(before, after)[2] < 1e-8


def test_random_signs_come_close_to_all_signs():
    rng = np.random.default_rng(3)
    whole = np.round(rng.normal(0.1, 1, 200) * 100)
    almost = whole + 1e-7 * rng.random(200)  # no whole numbers any more: random signs
    exact, drawn = (flip_test(np.zeros(200), after, range(200), draws=20_000)[2] for after in (whole, almost))
    assert 0.001 < exact < 0.5 and drawn != exact
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000))
    assert drawn == flip_test(np.zeros(200), almost, range(200), draws=20_000)[2]  # the same seed, the same digits
    assert drawn != flip_test(np.zeros(200), almost, range(200), draws=20_000, seed=1)[2]
    assert flip_test(np.zeros(60), 1 + 0.1 * rng.random(60), range(60), draws=999)[2] == 1 / 1000  # never 0
    coins = 0.1 * np.repeat([1, -1], [20, 10])  # many draws are as far out as the data: they count
    assert flip_test(np.zeros(30), coins, range(30))[2] == pytest.approx(mcnemar(np.zeros(30), coins)[2], abs=0.004)


def test_seeds_are_pooled_before_the_flip():
    before, after = np.zeros((2, 8)), np.ones((2, 8))
    after[1, 0] = before[1, 1] = 0
    before[1, 1], after[1, 1] = 1, 0  # seed 2 loses what seed 1 gains: no change of the mean
    gained, lost, p = pooled_test(before, after, range(8))
    assert (gained, lost, p) == (7, 0, every_sign([1] + [2] * 6)) and p < 0.05
    assert pooled_test(before[:1], after[:1], range(8)) == flip_test(before[0], after[0], range(8))
    assert pooled_test(np.repeat(before[:1], 3, 0), np.repeat(after[:1], 3, 0), range(8))[2] == 2 / 256
    with pytest.raises(ValueError, match="seeds, items"):
        pooled_test(before[0], after[0], range(8))


def test_flips_of_bad_input():
    with pytest.raises(ValueError, match="3"):
        flip_test([0, 1], [0, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="finite"):
        flip_test([0, math.nan], [0, 1], [1, 2])


def test_detectable_with_entities():
    before, after = scores(0, 130, 70, 800)
    assert detectable_flips(before, after, range(1000)) == pytest.approx(detectable(1000, 200))
    # each item five times: as many independent flips, each of five items
    five = [np.repeat(x, 5) for x in (before, after)]
    assert detectable_flips(*five, np.repeat(np.arange(1000), 5)) == pytest.approx(detectable(1000, 200))
    assert detectable_flips(before, before, range(1000)) is None


# ---- Holm

def test_holm_by_hand():
    """0.01 x 4, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.04 x 1 raised to 0.06: in the order they were given."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_of_published_numbers():
    """The example of R's documentation style, p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")."""
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])


def test_holm_is_never_above_bonferroni_nor_below_the_p_itself():
    p = np.random.default_rng(0).random(40) ** 3
    adjusted = holm(list(p))
    assert all(a <= b <= min(1, 40 * a) + 1e-15 for a, b in zip(p, adjusted)) and max(adjusted) <= 1
    assert holm([]) == [] and holm([0.2]) == [0.2]


# ---- power

def test_power_by_hand():
    """Of six flips the test says yes only when all go one way; of five, never."""
    assert power(6, 0.9) == pytest.approx(0.9**6 + 0.1**6, rel=1e-9)
    assert power(5, 1.0) == 0.0 and power(6, 1.0) == 1.0
    assert power(9, 0.8) == pytest.approx(  # at most one against: 2 (1 + 9) / 512 = 0.039
        sum(math.comb(9, k) * (0.8**k * 0.2**(9 - k) + 0.2**k * 0.8**(9 - k)) for k in (8, 9)), rel=1e-9)


@pytest.mark.parametrize("flips", [6, 20, 101, 400])
def test_a_fair_coin_is_called_unfair_as_often_as_alpha_allows(flips):
    assert power(flips, 0.5) <= 0.05 and power(flips, 0.5, alpha=0.001) <= 0.001


def test_detectable_is_where_the_power_is_reached():
    found = detectable(1000, 200)
    share = (found * 1000 / 200 + 1) / 2
    assert power(200, share) == pytest.approx(0.8, abs=1e-6) and power(200, share - 0.01) < 0.8
    assert detectable(1000, 5) is None and detectable(1000, 0) is None
    # the normal approximation, (1.96 + 0.84) sqrt(200) / 1000, within a tenth
    assert found == pytest.approx(2.8 * math.sqrt(200) / 1000, rel=0.1)
    assert detectable(1000, 200, alpha=0.05 / 30) > found  # a correction has its price


def test_simulated_power():
    """10,000 tables of 60 flips, 70 % of them one way."""
    gained = np.random.default_rng(1).binomial(60, 0.7, 10_000)
    p = {k: mcnemar(*scores(0, k, 60 - k, 0))[2] for k in range(61)}
    assert np.mean([p[k] <= 0.05 for k in gained]) == pytest.approx(power(60, 0.7), abs=0.015)


# ---- ranks

@pytest.mark.parametrize("a, b, rho", [
    ([1, 2, 3], [10, 20, 30], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 2, 3, 4], [2, 1, 4, 3], 0.6),  # 1 - 6 sum d²/..
    ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),  # ranks 0.5 0.5 2 and 0 1 2: Pearson's 1.5 / sqrt(1.5 * 2)
    ([1, 1, 2, 2], [5, 5, 5, 9], 1 / math.sqrt(3))])
def test_rank_correlation_by_hand(a, b, rho):
    a, b = (torch.tensor([x, x], dtype=torch.float) for x in (a, b))
    assert rank_correlation(a, b).tolist() == pytest.approx([rho, rho])
    assert rank_correlation(a, b).tolist() == pytest.approx(rank_correlation(b.exp(), a).tolist())


def test_constants_have_no_rank_correlation():
    """E9: +1.0 before, by whatever order equal values were sorted in."""
    rows = torch.tensor([[1.0, 1, 1], [1, 2, 3]])
    found = rank_correlation(rows, torch.tensor([[1.0, 2, 3], [1, 2, 3]]))
    assert found[0].isnan() and found[1] == 1 and rank_correlation(rows, rows)[0].isnan()


# ---- scipy and statsmodels

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "stats.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["beta_quantile", "t_quantile", "exact_interval", "clustered_interval", "t_interval",
                                  "seed_interval", "power", "detectable"])
def test_as_scipy_has_it(name):
    function = getattr(statistics, name)
    for case in GOLDEN[name]:
        arguments = {key: x for key, x in case.items() if key not in ("result", "effective")}
        wanted, found = case["result"], function(**arguments)
        assert found is wanted is None or found == pytest.approx(wanted, rel=1e-6 if "flips" in case else 1e-8), case


def test_tests_as_statsmodels_has_them():
    for case in GOLDEN["mcnemar"]:
        before, after = scores(7, case["gained"], case["lost"], 3)
        for found in (mcnemar(before, after), flip_test(before, after, range(len(before)))):
            assert found == (case["gained"], case["lost"], pytest.approx(case["p"], rel=1e-9))
    assert holm(GOLDEN["holm"]["p"]) == pytest.approx(GOLDEN["holm"]["result"], rel=1e-9)
    for case in GOLDEN["flip_test"]:
        found = flip_test(case["before"], case["after"], case["entities"])
        assert found == (case["gained"], case["lost"], pytest.approx(case["p"], rel=1e-9))


def test_bootstrap_of_given_draws(monkeypatch):
    """The draws are stored; torch.randint hands them out."""
    case = GOLDEN["bootstrap"]
    right, draws = np.array(case["right"], dtype=float), torch.tensor(case["draws"])
    monkeypatch.setattr(torch, "randint", lambda n, size, generator: draws)
    samples = resampled(right, len(draws), None, case["sizes"]).numpy()
    assert samples == pytest.approx(np.array(case["resampled_means"]), abs=1e-12)
    means = right.sum(0) / sum(case["sizes"])
    assert means == pytest.approx(case["means"], abs=1e-12)
    models = [Estimate(means[i], samples[:, i:i + 1]) for i in range(4)]
    assert [m.interval() for m in models] == [pytest.approx(bounds, abs=1e-12) for bounds in case["intervals"]]
    shares = [share_of(models[i] - models[1], models[0] - models[1]) for i in (2, 3)]
    assert [s.value for s in shares] == pytest.approx(case["displaced"], abs=1e-12)
    assert [s.interval() for s in shares] == [pytest.approx(b, abs=1e-12) for b in case["displaced_intervals"]]
    bounds, case = (shares[0] - shares[1]).interval(), case["compare"]
    assert bounds == pytest.approx(case["interval"], abs=1e-12) and judged(bounds, case["margin"]) == case["word"]


def test_shares_knowledge_and_ranks():
    case = GOLDEN["share_of"]
    gain, loss = (Estimate(np.mean(x), np.full((2, 3), 0.1), np.array(x)) for x in (case["gains"], case["losses"]))
    share = share_of(gain, loss)
    assert (share.value, share.seeds) == (pytest.approx(case["value"]), pytest.approx(case["seeds"]))
    case = GOLDEN["normalised"]
    assert list(map(knowledge, case["logprobs"], case["gold"])) == pytest.approx(case["result"], abs=1e-12)
    case = GOLDEN["rank_correlation"]
    found = rank_correlation(torch.tensor(case["a"]), torch.tensor(case["b"]).float()).tolist()
    wanted = [math.nan if rho is None else rho for rho in case["result"]]
    assert found == pytest.approx(wanted, abs=1e-12, nan_ok=True)
