"""tests/golden/idp.json against the code of the day, and against golden/twin.py, which calls no line of ours."""
import pytest
import torch

from golden import make_idp, twin
from golden.files import differing, floats, read

FILE, MODELS = read("idp.json"), read("model.json")["models"]
CASES = {case["name"]: case for case in FILE["cases"]}
POOLS = [name for name, case in CASES.items() if "model" in case]


def test_golden():
    code = make_idp.Code()
    assert differing(lambda case: make_idp.result(code, MODELS, case), FILE) == []


def test_the_file_is_the_one_that_the_script_writes():
    assert make_idp.cases() == [{k: v for k, v in case.items() if k != "result"} for case in FILE["cases"]]


@pytest.mark.parametrize("name", POOLS)
def test_the_rule(name):
    """A row at a time, its padding cut off: scores of the whole attention matrix, then the chosen prompt alone."""
    given, result = CASES[name]["given"], CASES[name]["result"]
    made = MODELS[CASES[name]["model"]]
    config, w, prompts = made["config"], floats(made["weights"]), [floats(p) for p in given["prompts"]]
    for b, ids in enumerate(given["ids"]):
        ids = ids if given["lengths"] is None else ids[:given["lengths"][b]]
        row = twin.scores(config, w, prompts, ids)
        torch.testing.assert_close(torch.from_numpy(row), floats(result["scores"][b]), rtol=1e-6, atol=1e-7)
        m = twin.chosen(result["scores"][b])
        assert m == twin.chosen(row) == result["chosen"][b]
        logits = twin.behind(config, w, prompts, m, ids)
        torch.testing.assert_close(logits, floats(result["logits"][b]), rtol=1e-6, atol=1e-6)
        text = list(ids)
        for _ in range(5):
            text.append(int(twin.behind(config, w, prompts, m, text)[-1].argmax()))
        assert text == result["text"][b]


def test_ties():
    """By hand; and two prompts that are there twice, of which the first of either pair is chosen by some row."""
    case = CASES["by hand"]
    assert case["result"]["chosen"] == [1, 0, 0, 1, 0, 1, 1] == [twin.chosen(row) for row in case["given"]["scores"]]
    assert set(CASES["the same prompt twice"]["result"]["chosen"]) == {0, 1}


def test_the_rows_choose_differently():
    """Else a port that always takes one prompt would pass; and sums of attention, not means, would choose others."""
    for name in POOLS:
        assert len(set(CASES[name]["result"]["chosen"])) > 1, name
    for name in POOLS[1:4]:
        given, result = CASES[name]["given"], CASES[name]["result"]
        sums = [[s * len(p) for s, p in zip(row, given["prompts"])] for row in result["scores"]]
        assert [twin.chosen(row) for row in sums] != result["chosen"], name
