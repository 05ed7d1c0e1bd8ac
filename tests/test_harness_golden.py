"""The scorer against the EleutherAI harness: the GPT of golden/world.json, values that golden/make_harness.py made."""
import json
import os

import pytest

from golden import make_world
from golden.files import read
from world.facts import Fact
from world.score import Subject, choose_option

FILE, CODE = read("world.json"), make_world.Code()
PEOPLE, ENCODING = CODE.people(FILE["world"]["people"]), CODE.encoding(FILE["world"]["merges"])
MODEL = CODE.model(FILE["gpt"]["gpt"]).float()


@pytest.mark.parametrize("batch_size", [1, 100])
def test_scores_are_the_harness(batch_size):
    """E1, E2: log-probabilities, acc and acc_norm of every item, spaces and tokens on the border among them."""
    with open(os.path.join(os.path.dirname(__file__), "golden", "harness.json")) as f:
        rows = json.load(f)["items"]
    facts = [Fact("", "", "", r["question"], r["options"][r["gold"]], tuple(r["options"])) for r in rows]
    given = choose_option(Subject(MODEL), facts, ENCODING, batch_size, start=[])
    assert len(rows) == 30 and 0 < sum(r["acc"] for r in rows) < 30
    for row, found in zip(rows, given, strict=True):
        assert found["logprobs"] == pytest.approx(row["logprobs"], abs=1e-4), row["question"]
        assert (found["picked"] == row["gold"], found["picked_norm"] == row["gold"]) == (row["acc"], row["acc_norm"])
