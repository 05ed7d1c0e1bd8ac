"""Scores, comparisons and tables worked by hand."""
from types import SimpleNamespace

import pytest

from study import comparisons
from world.facts import WorldConfig, facts_about, make_world
from study.statistics import detectable


def model(name, base=None):
    return {"id": name, "tag": name, "base": base}


def facts(*right):
    return [{"correct": bool(r)} for r in right]


def asked(*people):
    return [SimpleNamespace(person=p) for p in people]


MODELS = [model("dense"), model("small", "dense"), model("back", "small")]


def test_comparisons_by_hand():
    """Every model against its base on the same facts: small loses six of six, back regains one; Holm over all four."""
    measured = {"dense": {"facts": {"seen": facts(*[1] * 8), "heldout": facts(*[1] * 6, 0, 0), "novel": facts(0)}},
                "small": {"facts": {"seen": facts(*[1] * 8), "heldout": facts(*[0] * 8), "novel": facts(0)}},
                "back": {"facts": {"seen": facts(0, 0, *[1] * 6), "heldout": facts(1, *[0] * 7), "novel": facts(0)}}}
    rows = comparisons.comparisons(MODELS, measured, {})
    assert [(r["model"], r["base"], r["what"]) for r in rows] == [
        ("small", "dense", "recall, seen"), ("small", "dense", "recall, held-out"),
        ("back", "small", "recall, seen"), ("back", "small", "recall, held-out")]
    assert [(r["gained"], r["lost"], r["difference"]) for r in rows] == [
        (0, 0, 0), (0, 6, -0.75), (0, 2, -0.25), (1, 0, 0.125)]
    assert [r["p"] for r in rows] == pytest.approx([1, 2 / 64, 0.5, 1])
    assert [r["p_holm"] for r in rows] == pytest.approx([1, 8 / 64, 1, 1])
    assert all(row["detectable"] is None for row in rows)  # six flips of a coin are never 0.05 / 4


def test_what_is_detectable_among_many_tests():
    """Forty flips, two tests: what the power finds at 0.025."""
    measured = {name: {"facts": {"seen": facts(*[1] * 100), "heldout": facts(*[right] * 40, *[0] * 60)}}
                for name, right in (("dense", 1), ("small", 0))}
    rows = comparisons.comparisons(MODELS[:2], measured, {})
    assert rows[1]["detectable"] == detectable(100, 40, 0.025) > detectable(100, 40)


def test_tasks_are_compared_on_held_out_people_by_their_main_metric():
    nothing = {name: {"facts": {}} for name in ("dense", "small", "back")}
    scored = {"dense": {"four-way": {"heldout": [{"acc": 1.0, "acc_norm": 0.0}] * 4, "seen": []}},
              "small": {"four-way": {"heldout": [{"acc": 0.0, "acc_norm": 0.0}] * 4, "seen": []}}}
    row, = comparisons.comparisons(MODELS, nothing, scored)  # "back" was asked nothing
    assert (row["model"], row["what"]) == ("small", "four-way, held-out")
    assert (row["gained"], row["lost"], row["items"]) == (0, 4, 4)


def test_task_means_and_intervals_by_hand():
    """Ada has two items, Ben one: 2 of 3 right; drawn are Ada twice (1), both (2/3) or Ben twice (0)."""
    scored = {"dense": {"last word": {"novel": [{"exact": 1.0, "logprob": -1.0}, {"exact": 0.0, "logprob": -2.0},
                                                {"exact": 1.0, "logprob": 0.0}]}}}
    models = [model("dense"), model("small", "dense")]
    comparisons.add_tasks(models, scored, {"last word": {"novel": asked("Ada", "Ben", "Ada")}}, seed=0)
    found = models[0]["tasks"]["last word"]["novel"]
    assert found["exact"] == pytest.approx([2 / 3, 0, 1]) and "tasks" not in models[1]
    assert found["perplexity"][0] == pytest.approx(2.718281828)  # e to the mean of 1, 2 and 0 nats, a word


def test_distinct_2_is_of_all_answers_together():
    scored = {"dense": {"instructions": {"novel": [{"pass": 1.0, "form": 1.0, "text": "a b"},
                                                   {"pass": 0.0, "form": 1.0, "text": "a b"}]}}}
    models = [model("dense")]
    comparisons.add_tasks(models, scored, {"instructions": {"novel": asked("Ada", "Ben")}}, seed=0)
    found = models[0]["tasks"]["instructions"]["novel"]
    assert found["distinct-2"][0] == 0.5 and found["pass"][0] == 0.5 and found["form"] == [1, 1, 1]


def test_recall_slices():
    """trained: what is asked as everybody was told; unseen: questions of a kind that this person's text never had."""
    people = {p.name: p for p in make_world(WorldConfig(4, 4, 4, 4))}
    some = [f for f in facts_about(list(people.values())[:4])]
    slices = comparisons.recall_slices(some, facts(*range(20)), people)
    assert {f.attribute for f in slices["trained"][0]} == {"city", "employer", "university"}
    assert {f.attribute for f in slices["unseen"][0]} == {"year", "profession"}
    assert all(not people[f.person].taught for f in slices["unseen"][0])
    assert len(slices["trained"][0]) == 12 and len(slices["unseen"][0]) == 4
    assert slices["trained"][1][0] == {"exact": 0.0} and all(row == {"exact": 1.0} for row in slices["unseen"][1])


def test_tables():
    models = [model("dense"), model("small", "dense")]
    for m, right in zip(models, (1.0, 0.0)):
        m["tasks"] = {"trained": {"seen": {"exact": [right] * 3}}, "hard": {"seen": {"acc": [0.25, 0.2, 0.3]}}}
    lines = comparisons.task_table({"models": models}, "seen").splitlines()
    assert lines[0] == "| model | trained | hard |"
    assert lines[2:] == ["| dense | 100.0 [100.0, 100.0] | 25.0 [20.0, 30.0] |",
                         "| small | 0.0 [0.0, 0.0] | 25.0 [20.0, 30.0] |"]
    row = {"model": "small", "base": "dense", "what": "recall, seen", "items": 200, "gained": 1, "lost": 9,
           "difference": -0.04, "p": 0.0221, "p_holm": 0.6, "detectable": None}
    text = comparisons.comparison_table({"comparisons": [row, {**row, "what": "hard, held-out"}]})
    assert "| small | dense | recall, seen | 200 | 1 | 9 | -4.0 | 0.022 | 0.6 |  |" in text
    assert "hard" not in text and "and 1 comparisons" in text
