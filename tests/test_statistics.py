"""The statistics against closed forms, published small cases and counts done by hand."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from study.statistics import by_person, detectable, holm, interval, mcnemar, power, resampled


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
