"""study/overlap.py: the same facts under two compressors, counted by hand."""
from types import SimpleNamespace

import pytest

from study import tables
from study.overlap import same_facts

FACTS = 40
PEOPLE = [SimpleNamespace(person=i) for i in range(FACTS)]


def row(name, base, wrong, kind="repaired", operation="quantize"):
    """A model that is wrong on the facts `wrong`; a repair's tag is its id's last word."""
    return {"id": name, "tag": name.split(" + ")[-1], "base": base, "kind": kind,
            "operation": {"name": operation, "parameters": {}},
            "answers": {"heldout": [{"correct": i not in wrong} for i in range(FACTS)]}}


def draw(moved=0):
    """Dense is wrong on 0 and 1. RTN loses 2 .. 21 (and is wrong on 0), GPTQ 14 .. 27 (and on 1): eight both, 12 RTN
    alone, 6 GPTQ alone. A prompt brings back 6 + moved of the eight on RTN, and 3 of the 12; 2 of the eight on GPTQ,
    where it loses 30 .. 35 anew, and 4 of the 6. GPTQ alone has biases; magnitude is no rounding."""
    return [row("dense", None, {0, 1}, "dense"),
            row("RTN", "dense", {0, *range(2, 22)}, "compressed"),
            row("RTN + prompt", "RTN", {*range(5, 14), *range(20 + moved, 22)}),
            row("GPTQ", "dense", {1, *range(14, 28)}, "compressed"),
            row("GPTQ + prompt", "GPTQ", {*range(16, 22), 26, 27, *range(30, 36)}),
            row("GPTQ + biases", "GPTQ", set()),
            row("magnitude", "dense", set(range(9)), "compressed", "prune"),
            row("magnitude + prompt", "magnitude", set())]


def test_facts_that_both_took_by_hand():
    found, = same_facts([draw()], PEOPLE, 0)
    assert (found["a"], found["b"], found["repair"]) == ("RTN", "GPTQ", "prompt")
    assert (found["both"], found["a_only"], found["b_only"]) == (8, 12, 6)
    for name, value in (("back_a", 6 / 8), ("back_b", 2 / 8), ("difference", 4 / 8), ("back_a_only", 3 / 12),
                        ("back_b_only", 4 / 6)):
        mean, low, high = found[name]
        assert mean == pytest.approx(value) and low <= mean <= high and low < high, name
    assert found["difference"][1] > 0  # 4 of 8 facts differ, all one way


def test_draws_are_pooled_and_seen_in_the_interval():
    one, = same_facts([draw()], PEOPLE, 0)
    three, = same_facts([draw(), draw(2), draw(1)], PEOPLE, 0)
    assert three["both"] == 24 and three["back_a"][0] == pytest.approx(21 / 24)
    assert three["back_b"][0] == one["back_b"][0]
    same, = same_facts([draw()] * 3, PEOPLE, 0)
    assert same["back_a"] == pytest.approx(one["back_a"])  # draws that agree add nothing


def test_few_facts_in_common_give_no_share():
    rows = draw()
    rows[3] = row("GPTQ", "dense", {21, *range(22, 34)}, "compressed")  # one fact in common
    found, = same_facts([rows], PEOPLE, 0)
    assert found["both"] == 1 and found["back_a"] is found["back_b"] is found["difference"] is None
    assert found["back_b_only"] is not None
    cells = tables.same_table({"same": [found]}).splitlines()[2].split("|")
    assert [cell.strip() for cell in cells[1:7]] == ["RTN; GPTQ", "prompt", "1; 19; 12", "", "", ""]
    assert cells[8].strip()


def test_the_table_has_percent():
    text = tables.same_table({"same": same_facts([draw()], PEOPLE, 0)})
    assert "| RTN; GPTQ" in text and "8; 12; 6" in text and "75.0 [" in text and "50.0 [" in text
