"""Tables worked by hand: what stands in each cell, and that columns are padded to one width."""
import pytest

from study import tables
from test_comparisons import model


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_is_padded_and_keeps_every_cell():
    text = tables.markdown(["a", "long head"], [["x", 1], ["much longer", 22]])
    assert text.splitlines() == ["| a           | long head |", "|-------------|----------:|",
                                 "| x           |         1 |", "| much longer |        22 |"]


@pytest.mark.parametrize("values, said", [([0.5, 0.25, 1], "50.0 [25.0, 100.0]"),
                                          ((0.5, [0.25, 1]), "50.0 [25.0, 100.0]"),
                                          ([0.5, None, None], "50.0"), ([None, None, None], "")])
def test_a_share_is_said_in_percent(values, said):
    assert tables.share(values) == said


def test_tasks_and_comparisons():
    models = [model("dense"), model("small", "dense")]
    for m, right in zip(models, (1.0, 0.0)):
        m["tasks"] = {"trained": {"seen": {"exact": [right] * 3}}, "hard": {"seen": {"acc": [0.25, 0.2, 0.3]}}}
    lines = [cells(line) for line in tables.task_table({"models": models}, "seen").splitlines()]
    assert lines[0] == ["model", "trained", "hard"]
    assert lines[2:] == [["dense", "100.0 [100.0, 100.0]", "25.0 [20.0, 30.0]"],
                         ["small", "0.0 [0.0, 0.0]", "25.0 [20.0, 30.0]"]]
    row = {"model": "small", "base": "dense", "what": "recall, seen", "items": 200, "gained": 1, "lost": 9,
           "difference": -0.04, "p": 0.0221, "p_holm": 0.6, "detectable": None}
    text = tables.comparison_table({"comparisons": [row, {**row, "what": "hard, held-out"}]})
    assert cells(text.splitlines()[2]) == ["small", "dense", "recall, seen", "200", "1", "9", "-4.0", "0.022", "0.6",
                                           ""]
    assert "hard" not in text and "and 1 comparisons" in text
