"""study/claims.py: the four claims on a study that is made up, each number by hand."""
from math import comb
from statistics import NormalDist

import numpy as np
import pytest

from study import claims
from study.statistics import Estimate

CLAIMED = ("prompt 8", "prompt 32", "IDP 4 x 8", "LoRA rank 1")  # one prompt, a long one, the pool, as many weights
PEOPLE = 24


def lopsided(value, below=0.1, above=0.4):
    """An Estimate whose 95 % interval reaches `below` to the left and `above` to the right."""
    return Estimate(value, value + np.array([-below] * 10 + [0.0] * 80 + [above] * 10)[:, None])


def exactly(value):
    """An Estimate that is the same whoever is asked, so that a difference has the interval of the other one."""
    return Estimate(value, np.full((100, 1), value))


def row(base, tag, right):
    """A model that knows the one fact asked about each of the people `right`."""
    name = f"{base} {tag}".replace("dense ", "") if base else tag
    answers = [{"correct": i in right, "knowledge": -float(i not in right)} for i in range(PEOPLE)]
    return {"id": name, "tag": tag, "base": base, "answers": {"heldout": answers},
            "entities": {"heldout": [f"person {i}" for i in range(PEOPLE)]}}


def study(prompt=range(12), pool=range(4), **shares):
    """(draws, displaced) of GPTQ and RTN at 3 bits: GPTQ knows 4 people, its prompt 12 and its pool 4,
    unless said."""
    made = {(base, tag): right for base, tag, right in (
        ("GPTQ 3 bits", "prompt 8", prompt), ("GPTQ 3 bits", "prompt 32", range(13)),
        ("GPTQ 3 bits", "IDP 4 x 8", pool), ("GPTQ 3 bits", "LoRA rank 1", range(9)),
        ("RTN 3 bits", "prompt 8", range(20)))}
    rows = [row(None, "dense", range(24)), row("dense", "GPTQ 3 bits", range(4)), row("dense", "RTN 3 bits", range(2)),
            *(row(base, tag, right) for (base, tag), right in made.items())]
    given = {"prompt": lopsided(0.3), "long": exactly(0.4), "pool": lopsided(0.2, 0.1, 0.1), "equal": exactly(0.1),
             "crude": exactly(0.65), **{role.removesuffix("_share"): share for role, share in shares.items()}}
    names = {"prompt": "GPTQ 3 bits prompt 8", "long": "GPTQ 3 bits prompt 32", "pool": "GPTQ 3 bits IDP 4 x 8",
             "equal": "GPTQ 3 bits LoRA rank 1", "crude": "RTN 3 bits prompt 8"}
    return [rows], {name: given[role] for role, name in names.items()}


def coin(flips, one_way=None):
    """Two-sided p of so many flips, all one way, or so many of them."""
    few = min(one_way, flips - one_way) if one_way is not None else 0
    return min(1.0, 2 * sum(comb(flips, k) for k in range(few + 1)) / 2**flips)


def normal(distance, half):
    """Two-sided p of a value so far from the null value, half a 95 % interval being `half`."""
    return 2 * NormalDist().cdf(-NormalDist().inv_cdf(0.975) * distance / half)


@pytest.mark.parametrize("value, null, half", [(0.3, 0.0, 0.1), (-0.3, 0.0, 0.4), (0.3, 0.5, 0.4), (0.1, -0.05, 0.1),
                                               (0.02, 0.0, 0.1)])
def test_p_is_read_from_the_half_of_the_interval_that_looks_at_the_null_value(value, null, half):
    assert lopsided(value).p(null) == pytest.approx(normal(abs(value - null), half), rel=1e-6, abs=1e-15)


def test_the_four_claims_by_hand():
    """The prompt regains 8 of 24 people and loses none; the pool has 9 fewer than a prompt of as many tokens."""
    draws, displaced = study()
    found = {c["name"]: c for c in claims.claims(draws, displaced, CLAIMED)}
    assert list(found) == ["prompt", "pool", "weights", "compressor"]
    assert [c["estimate"] for c in found.values()] == pytest.approx([0.3, 0.2 - 0.4, 0.3 - 0.1, 0.65 - 0.3])
    for name, bounds in (("prompt", [0.2, 0.7]), ("pool", [-0.3, -0.1]), ("weights", [0.1, 0.6]),
                         ("compressor", [-0.05, 0.45])):  # of a difference from something lopsided: mirrored
        assert found[name]["interval"] == pytest.approx(bounds, abs=1e-9), name
    p = [coin(8), coin(9), normal(0.25, 0.1), normal(0.35, 0.4)]
    assert [c["p"] for c in found.values()] == pytest.approx(p, rel=1e-6)
    # Holm: the smallest times four, the next times three, then two, one, none below one before it
    assert [c["p_holm"] for c in found.values()] == pytest.approx([2 * p[0], 3 * p[1], 4 * p[2], p[3]], rel=1e-6)
    assert [c["verdict"] for c in found.values()] == ["holds", "the opposite holds", "holds", "undecided"]
    assert "IDP 4 x 8, chosen by attention" in found["pool"]["statement"]
    assert "(LoRA rank 1)" in found["weights"]["statement"]
    assert not any("positive" in c for c in found.values())


@pytest.mark.parametrize("worse, verdict", [(-0.02, "holds"), (-0.2, "the opposite holds"), (-0.051, "undecided")])
def test_a_prompt_may_be_five_points_worse_than_weights(worse, verdict):
    """What is tested is -0.05, not 0: 3 points from it with half an interval of 1 point on either side."""
    draws, displaced = study(prompt=range(4), pool=range(12), equal=lopsided(0.3 - worse, 0.01, 0.01))
    displaced["GPTQ 3 bits prompt 8"] = exactly(0.3)
    claim = claims.claims(draws, displaced, CLAIMED)[2]
    assert claim["estimate"] == pytest.approx(worse) and claim["verdict"] == verdict
    assert claim["p"] == pytest.approx(normal(abs(worse + 0.05), 0.01), rel=1e-6, abs=1e-15)


def test_a_claim_needs_its_answers_and_its_interval():
    """p is the larger of the flips', which know these draws only, and the interval's, which knows draws and people."""
    for prompt, share, p in ((range(12), lopsided(0.3, 0.4), normal(0.3, 0.4)), (range(12), lopsided(0.3), coin(8)),
                             (range(4), lopsided(0.3), 1.0)):
        draws, displaced = study(prompt=prompt, prompt_share=share)
        assert claims.claims(draws, displaced, CLAIMED)[0]["p"] == pytest.approx(p)
    for pool, share, p in ((range(4), lopsided(0.2, 0.1, 0.4), normal(0.2, 0.4)), (range(13), lopsided(0.2), 1.0)):
        draws, displaced = study(pool=pool, pool_share=share)
        assert claims.claims(draws, displaced, CLAIMED)[1]["p"] == pytest.approx(p)


def test_claims_about_models_that_were_not_made_are_left_out():
    draws, displaced = study()
    assert [c["name"] for c in claims.claims(draws, {**displaced, "RTN 3 bits prompt 8": None}, CLAIMED)] == [
        "prompt", "pool", "weights"]
    few = {name: displaced[name] for name in ("GPTQ 3 bits IDP 4 x 8", "GPTQ 3 bits LoRA rank 1")}
    assert claims.claims(draws, few, CLAIMED) == []
    assert [c["name"] for c in claims.claims(draws, {**few, "GPTQ 3 bits prompt 8": exactly(0.1)}, CLAIMED)] == [
        "prompt", "weights"]


def test_repairs_of_one_model_are_compared_in_pairs():
    draws, displaced = study(pool=range(4))
    draws[0].append(row("GPTQ 3 bits", "LoRA rank 8", range(20)))
    displaced |= {"GPTQ 3 bits LoRA rank 8": exactly(0.31), "GPTQ 3 bits IDP 4 x 8": lopsided(0.2)}
    found = {(r["a"], r["b"]): r for r in claims.pairs(draws[0], displaced, CLAIMED)}
    assert list(found) == [("prompt 8", "LoRA rank 8"), ("IDP 4 x 8", "LoRA rank 8"), ("prompt 8", "LoRA rank 1"),
                           ("IDP 4 x 8", "prompt 32")]
    assert [r["difference"] for r in found.values()] == pytest.approx([-0.01, -0.11, 0.2, -0.2])
    assert found["prompt 8", "LoRA rank 1"]["interval"] == pytest.approx([0.1, 0.6])
    assert [r["verdict"] for r in found.values()] == ["undecided", "undecided", "superior", "undecided"]
    assert {r["base"] for r in found.values()} == {"GPTQ 3 bits"}  # nothing of RTN's has a partner
