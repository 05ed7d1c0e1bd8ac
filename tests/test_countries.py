"""real/facts/countries.jsonl: the facts are what the table makes of them, and no question gives its answer away."""
import json
import sys

import numpy as np

from checkpoint_files import HERE


def test_the_facts_are_what_the_table_makes_of_them():
    sys.path.insert(0, str(HERE.parent / "real" / "facts"))
    import make_countries
    lines = (HERE.parent / "real" / "facts" / "countries.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines]
    assert facts == make_countries.country_facts()
    table = {row["country"].removeprefix("the "): row for row in make_countries.read_table()}
    assert len(table) == 197
    asked = {(f["entity"], f["attribute"]) for f in facts}
    assert len({f["question"] for f in facts}) == len(facts) == 2 * len(asked) > 1600
    for f in facts:
        row = table[f["entity"]]
        asked = row["capital"] if f["attribute"] == "country" else f["entity"]
        assert f["answer"] == row[f["attribute"]] and asked in f["question"]
        assert f["options"].count(f["answer"]) == 1 and len(set(f["options"])) == len(f["options"]) in (6, 8)
        assert not set(f["options"]) & {"-", *row["also true"].split(", ")}
        answer = row["capital"] if f["attribute"] == "country" else f["answer"]
        assert not make_countries.gives_away(f["entity"], answer)
    for attribute in make_countries.QUESTIONS:
        places = [f["options"].index(f["answer"]) for f in facts if f["attribute"] == attribute]
        counts = np.bincount(places)
        assert counts.max() - counts.min() <= 2  # a guesser who always takes one place is at chance


def test_giving_away():
    from make_countries import gives_away
    for pair in (("Mexico", "Mexico City"), ("Tunisia", "Tunis"), ("Spain", "Spanish"), ("Sierra Leone", "leone"),
                 ("São Tomé and Príncipe", "Sao Tome"), ("Afghanistan", "afghani")):
        assert gives_away(*pair), pair
    for pair in (("Kenya", "Nairobi"), ("the Philippines", "Manila"), ("Sri Lanka", "rupee")):
        assert not gives_away(*pair), pair
