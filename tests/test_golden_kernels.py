"""tests/golden/kernels.json against the code of the day, and read back word by word by golden/twin.py."""
import numpy as np
import pytest

from golden import make_kernels, twin
from golden.files import differing, read

FILE = read("kernels.json")
CASES = {case["name"]: case for case in FILE["cases"]}


def test_golden():
    code = make_kernels.Code()
    assert differing(lambda case: make_kernels.result(code, case), FILE) == []


def test_the_file_is_the_one_that_the_script_writes():
    assert make_kernels.cases() == [{k: v for k, v in case.items() if k != "result"} for case in FILE["cases"]]


def weight(given):
    """(N, K) in float64: scale * (code - zero)."""
    if "weight" in given:
        return np.array(given["weight"])
    codes, scale, zero = (np.array(given[name], dtype=float) for name in ("codes", "scale", "zero"))
    return scale[:, given["group"]] * (codes - zero[:, given["group"]])


@pytest.mark.parametrize("name", CASES)
def test_words_read_back(name):
    """Bits are cut out of the words by hand; nothing of engine/packing.py takes part."""
    given, result = CASES[name]["given"], CASES[name]["result"]
    W, packed = weight(given), result["packed"]
    exact = np.float32(W) if "weight" in given else W
    np.testing.assert_allclose(twin.unpacked(packed), exact, rtol=1e-7, atol=0)
    codes, _, places = twin.read_packed(packed)
    if places is None and packed["bits"] < 32:
        order = packed["order"] or range(len(codes[0]))
        for row, mine in zip(codes, given["codes"]):
            assert [code for code, column in zip(row, order) if column < len(mine)] == [
                mine[column] for column in order if column < len(mine)]
            assert all(code == 0 for code, column in zip(row, order) if column >= len(mine))  # padding
    if given["x"] is not None:
        y = np.array(given["x"]) @ exact.T
        np.testing.assert_allclose(y, result["y"], rtol=1e-6, atol=2e-5)  # the product's weights are float32


def test_the_cases_hold_what_they_are_for():
    """Every code of 2 and 3 bits, both halves of a range at the top of a word, cells with fewer than N kept."""
    for bits in (2, 3):
        assert {c for row in CASES[f"{bits} bits"]["given"]["codes"] for c in row} == set(range(2**bits))
    for bits, last in ((2, 15), (4, 7), (8, 3)):
        tops = [row[last] >= 2**(bits - 1) for row in CASES[f"{bits} bits"]["given"]["codes"]]
        assert 0 < sum(tops) < len(tops), bits
    tiles = CASES["two tiles"]["result"]["packed"]
    assert tiles["span"] > 2048 and len(tiles["words"]) == 2
    for name, n, m in (("2:4, floats", 2, 4), ("4:8, 3 bits", 4, 8)):
        W = weight(CASES[name]["given"])
        W = np.pad(W, ((0, 0), (0, -W.shape[1] % m)))
        kept = {int(x) for x in (W.reshape(len(W), -1, m) != 0).sum(-1).flatten()}
        assert n in kept and len(kept) > 1, kept
