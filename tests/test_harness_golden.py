"""The scorer against the EleutherAI harness: one model, the same items, values that golden/make_harness.py made."""
import json
import os

import pytest
import torch

from world.facts import Fact, WorldConfig, make_encoding, make_world, statements, train_bpe
from model import GPT, GPTConfig
from world.score import Subject, choose

PEOPLE = make_world(WorldConfig(seen=40, heldout=20, validation=10, novel=5, vocab_size=500, seed=2))
ENCODING = make_encoding(train_bpe(statements(PEOPLE[:70]), 500))
MODEL = GPT(GPTConfig(vocab_size=ENCODING.n_vocab, context=64, n_layer=2, n_head=2, n_embd=32))
MODEL.init_weights(torch.Generator().manual_seed(5))


@pytest.mark.parametrize("batch_size", [1, 100])
def test_scores_are_the_harness(batch_size):
    """E1, E2: log-probabilities, acc and acc_norm of every item, spaces and tokens on the border among them."""
    with open(os.path.join(os.path.dirname(__file__), "golden", "harness.json")) as f:
        rows = json.load(f)["items"]
    given = choose(Subject(MODEL), [Fact("", "", "", r["question"], r["options"][r["gold"]], tuple(r["options"])) for r in rows], ENCODING, batch_size,
                   start=[])
    assert len(rows) == 30 and 0 < sum(r["acc"] for r in rows) < 30
    for row, found in zip(rows, given, strict=True):
        assert found["logprobs"] == pytest.approx(row["logprobs"], abs=1e-4), row["question"]
        assert (found["picked"] == row["gold"], found["picked_norm"] == row["gold"]) == (row["acc"], row["acc_norm"])
