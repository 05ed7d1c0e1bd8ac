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


def test_a_mean_that_is_zero_but_for_rounding_has_no_sign():
    assert tables.share([-1e-17, -0.031, 0.031]) == "0.0 [-3.1, 3.1]"
    assert tables.share([-0.0004, None, None]) == "-0.0", "a number that rounds to 0 keeps its side"


def test_the_main_table_fits_a_terminal():
    """With the study's longest names and numbers."""
    models = [model("locked, behind its key"), model("LoRA rank 1 on o", "a") | {"kind": "repaired"}]
    for m in models:
        m["metrics"] = {"extra_parameters": 55_296, "recall_heldout": 0.885, "displaced": 1.004, "relearned": -0.104}
        m["intervals"] = {"recall_heldout": [0.844, 0.926], "displaced": [0.98, 1.028], "relearned": [-0.143, -0.065]}
        m["confirmed"] = m["base"] is not None
    lines = tables.main_table({"models": models, "settings": {"seeds": 3}}).splitlines()
    assert cells(lines[3]) == ["+ LoRA rank 1 on o *", "55,296", "88.5 [84.4, 92.6]", "100.4 [98.0, 102.8]",
                               "-10.4 [-14.3, -6.5]"]
    assert max(map(len, lines)) <= 100


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


def test_a_task_files_name_may_hold_a_space():
    scored = model("dense") | {"metrics": {"arc easy acc": 0.5}, "intervals": {"arc easy acc": [0.25, 0.75]}}
    results = {"models": [scored], "metrics": [{"name": "recall_seen"}, {"name": "arc easy acc"}],
               "files": {"arc easy": 4}}
    assert [cells(line) for line in tables.file_table(results).splitlines()[::2]] == [
        ["model", "arc easy acc"], [scored["id"], "0.500 [0.250, 0.750]"]]


def test_each_draws_own_share_is_of_its_own_loss():
    """10 of 50 points, 30 of 40, and a draw that lost nothing; the mean of the draws' entries is no part of it."""
    def model(name, base, kind, recalls):
        return {"id": name, "tag": name, "base": base, "kind": kind, "seeds": {"recall_heldout": recalls}}
    models = [model("dense", None, "dense", [1.0, 0.9, 1.0]), model("RTN", "dense", "compressed", [0.5, 0.5, 1.0]),
              model("prompt", "RTN", "repaired", [0.6, 0.8, 1.0])]
    text = tables.draws_table({"models": models, "settings": {"seeds": 3}})
    assert [cell.strip() for cell in text.split("\n")[-1].split("|")[1:-1]] == ["RTN", "prompt", "20.0", "75.0", ""]
