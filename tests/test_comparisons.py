"""Scores, comparisons and tables worked by hand."""
from types import SimpleNamespace

import pytest
import torch

from study import comparisons
from world.facts import WorldConfig, facts_about, make_world
from study.statistics import detectable, exact_interval


def model(name, base=None):
    return {"id": name, "tag": name, "base": base}


def facts(*right):
    return [{"correct": bool(r)} for r in right]


def rows(measured=None, scored=None):
    """Rows as evaluate.ask makes them, of the models that were asked."""
    made = [{**m, "answers": (measured or {}).get(m["id"], {"seen": facts(1), "heldout": facts(1)}),
             "scores": (scored or {}).get(m["id"])} for m in MODELS if measured is None or m["id"] in measured]
    for row in made:  # everybody is asked one fact: then the test is McNemar's
        row["entities"] = {split: list(range(len(given))) for split, given in row["answers"].items()}
    return made


def asked(*people):
    return [SimpleNamespace(person=p) for p in people]


MODELS = [model("dense"), model("small", "dense"), model("back", "small")]


def test_comparisons_by_hand():
    """Every model against its base on the same facts: small loses six of six, back regains one; Holm over all four."""
    measured = {"dense": {"seen": facts(*[1] * 8), "heldout": facts(*[1] * 6, 0, 0), "novel": facts(0)},
                "small": {"seen": facts(*[1] * 8), "heldout": facts(*[0] * 8), "novel": facts(0)},
                "back": {"seen": facts(0, 0, *[1] * 6), "heldout": facts(1, *[0] * 7), "novel": facts(0)}}
    found = comparisons.comparisons([rows(measured)], {})
    assert [(r["model"], r["base"], r["what"]) for r in found] == [
        ("small", "dense", "recall, seen"), ("small", "dense", "recall, held-out"),
        ("back", "small", "recall, seen"), ("back", "small", "recall, held-out")]
    assert [(r["gained"], r["lost"], r["difference"]) for r in found] == [
        (0, 0, 0), (0, 6, -0.75), (0, 2, -0.25), (1, 0, 0.125)]
    assert [r["p"] for r in found] == pytest.approx([1, 2 / 64, 0.5, 1])
    assert [r["p_holm"] for r in found] == pytest.approx([1, 8 / 64, 1, 1])
    assert all(row["detectable"] is None for row in found)  # six flips of a coin are never 0.05 / 4


def test_what_is_detectable_among_many_tests():
    """Forty flips, two tests: what the power finds at 0.025."""
    measured = {name: {"seen": facts(*[1] * 100), "heldout": facts(*[right] * 40, *[0] * 60)}
                for name, right in (("dense", 1), ("small", 0))}
    found = comparisons.comparisons([rows(measured)], {})
    assert found[1]["detectable"] == detectable(100, 40, 0.025) > detectable(100, 40)


def test_tasks_are_compared_on_held_out_people_by_their_main_metric():
    scored = {"dense": {"four-way": {"heldout": [{"acc": 1.0, "acc_norm": 0.0}] * 4, "seen": []}},
              "small": {"four-way": {"heldout": [{"acc": 0.0, "acc_norm": 0.0}] * 4, "seen": []}}}
    tasks = {"four-way": {"heldout": asked(*"abcd")}}  # "back" was asked no task
    found = comparisons.comparisons([rows(scored=scored)], tasks)
    row, = [row for row in found if not row["what"].startswith("recall")]
    assert (row["model"], row["what"]) == ("small", "four-way, held-out")
    assert (row["gained"], row["lost"], row["items"]) == (0, 4, 4)


def test_task_means_and_intervals_by_hand():
    """Ada has two items, both right, Ben one, which is wrong. So few have exact bounds: (2/3)² + (2/3)² of people's
    deviations, times 2 / 9, is the variance that 1.125 independent items have."""
    scored = {"last word": {"novel": [{"exact": 1.0, "logprob": -1.0}, {"exact": 0.0, "logprob": -2.0},
                                      {"exact": 1.0, "logprob": 0.0}]}}
    models = [{**model("dense"), "scores": scored}, {**model("small", "dense"), "scores": None}]
    comparisons.add_tasks(models, {"last word": {"novel": asked("Ada", "Ben", "Ada")}}, seed=0)
    found = models[0]["tasks"]["last word"]["novel"]
    assert found["exact"] == pytest.approx([2 / 3, *exact_interval(0.75, 1.125)]) and "tasks" not in models[1]
    assert found["perplexity"][0] == pytest.approx(2.718281828)  # e to the mean of 1, 2 and 0 nats, a word


def test_distinct_2_is_of_all_answers_together():
    scored = {"instructions": {"novel": [{"pass": 1.0, "form": 1.0, "text": "a b"},
                                         {"pass": 0.0, "form": 1.0, "text": "a b"}]}}
    models = [{**model("dense"), "scores": scored}]
    comparisons.add_tasks(models, {"instructions": {"novel": asked("Ada", "Ben")}}, seed=0)
    found = models[0]["tasks"]["instructions"]["novel"]
    assert found["distinct-2"][0] == 0.5 and found["pass"][0] == 0.5
    assert found["form"] == pytest.approx([1, 0.025**0.5, 1])  # 2 of 2 right: an interval has a width there too (E14)


def test_recall_slices():
    """trained: what is asked as everybody was told; unseen: questions of a kind that this person's text never had."""
    people = {p.name: p for p in make_world(WorldConfig(4, 4, 4, 4))}
    some = facts_about(list(people.values())[:4])
    slices = comparisons.recall_slices(some, people)
    trained, unseen = ([some[i] for i in slices[name]] for name in ("trained", "unseen"))
    assert {f.attribute for f in trained} == {"city", "employer", "university"}
    assert {f.attribute for f in unseen} == {"year", "profession"}
    assert all(not people[f.person].taught for f in unseen)
    assert len(trained) == 12 and len(unseen) == 4


def test_the_noise_floor_compares_each_fact_with_itself(monkeypatch):
    """Asked in reverse, a model that is right on the first three facts answers the same: nothing is gained or lost."""
    known = [SimpleNamespace(person=f"p{i // 2}", right=i < 3) for i in range(7)]
    asked = []

    def answer(subject, questions, encoding):
        asked.append(questions)
        return [{"correct": f.right} for f in questions]
    monkeypatch.setattr(comparisons, "answer", answer)
    world = SimpleNamespace(facts=lambda split, people: known, encoding=None, calibration=lambda config: torch.zeros(1),
                            trained=True)
    run = SimpleNamespace(config=SimpleNamespace(test_people=9, compressions={}), world=world)
    run.draw = lambda k: run
    dense = SimpleNamespace(about={"id": "dense", "tag": "dense"})
    row, = comparisons.noise_floor(run, [dense], {"dense": {"heldout": [{"correct": f.right} for f in known]}})
    assert asked == [known[::-1]] and (row["gained"], row["lost"], row["items"]) == (0, 0, 7)


def test_a_compression_made_again_is_asked_about_held_out_people(monkeypatch):
    """GPTQ again from the text of another draw; RTN, which reads none, is not. What it says is kept as a step."""
    asked, kept = [], []
    monkeypatch.setattr(comparisons, "light", lambda subject: subject)
    monkeypatch.setattr(comparisons, "answer", lambda subject, facts, encoding: asked.append(facts) or ["said"])
    monkeypatch.setattr(comparisons, "compressed_subject", lambda run, dense, tag: SimpleNamespace(
        about={"id": f"{tag} of {run.number}", "settings": {}}))

    def draw(number):
        """The run of a draw, whose number is its text."""
        config = SimpleNamespace(test_people=9, number=number,
                                 compressions={"G": ("quantize", "gptq", {}), "R": ("quantize", "rtn", {})})
        return SimpleNamespace(config=config, world=world, number=number, draw=draw, once_json=lambda name, s, c, make:
                               kept.append(name) or make())
    world = SimpleNamespace(facts=lambda split, people: (split, people), encoding=None, trained=True,
                            calibration=lambda config: torch.tensor([config.number]))
    (subject, given), = comparisons.compressed_again(draw(0), None)
    assert (subject.about["id"], given, kept) == ("G of 99", ["said"], ["G of 99.noise"])
    assert asked == [("heldout", 9)]
