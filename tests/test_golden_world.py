"""tests/golden/world.json against the code of the day, and against the rules spelled out here: BPE by counting, answers
token by token from golden/twin.py, scores as sums over a whole row."""
import math
import re
from collections import Counter

import pytest
import torch

from golden import make_world, twin
from golden.files import differing, floats, read

FILE = read("world.json")
CASES = {case["name"]: case for case in FILE["cases"]}
PHRASES, WORLD, CONFIG = FILE["phrases"], FILE["world"], FILE["gpt"]["gpt"]["config"]
WEIGHTS = floats(FILE["gpt"]["gpt"]["weights"])
TOKENS = [chr(b) for b in range(256)] + [a + b for a, b in WORLD["merges"]]  # a byte is a character (latin-1)
EOT = len(TOKENS)
PIECE = re.compile(r" ?[^\W\d_]+| ?\d{1,2}| ?(?:[^\s\w]|_)+|\s+")


def encode(text):
    """Token ids: the text in pieces, each its bytes, which the merges join in the order in which they were learned."""
    ids = []
    for piece in PIECE.findall(text):
        parts = list(piece.encode().decode("latin-1"))
        for a, b in WORLD["merges"]:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (a, b):
                    parts[i:i + 2] = [a + b]
                i += 1
        ids += [TOKENS.index(part) for part in parts]
    return ids


def decode(ids):
    """The text of token ids."""
    return "".join(TOKENS[i] for i in ids).encode("latin-1").decode(errors="replace")


def log_p(ids):
    """(T, V) log-probabilities of what follows each token of a row."""
    return twin.logits(CONFIG, WEIGHTS, ids).log_softmax(-1)


def test_golden():
    code = make_world.Code()
    assert differing(lambda case: make_world.result(code, FILE, case), FILE, **make_world.TOLERANCE) == []


def test_the_file_is_the_one_that_the_script_writes():
    code = make_world.Code()
    made = make_world.inputs(code, train=False)
    assert {key: FILE[key] for key in made} == made
    assert make_world.cases(code, made) == [{k: v for k, v in case.items() if k != "result"} for case in FILE["cases"]]


def test_sentences():
    """Every fact of all but novel people in three phrasings; then the questions of two attributes, of half of them."""
    told = [p for p in WORLD["people"] if p["split"] != "novel"]
    lines = [f"{phrase.format(p['name'])} {p['values'][a]}." for p in told for a in PHRASES["values"]
             for phrase in PHRASES["statements"][a]]
    asked = [a for a in PHRASES["questions"] if PHRASES["questions"][a] not in PHRASES["statements"][a]]
    questions = [f"{PHRASES['questions'][a].format(p['name'])} {p['values'][a]}."
                 for p in told if p["taught"] for a in asked]
    assert asked == ["year", "profession"] and 0 < len(questions) < len(lines)
    assert lines + questions == WORLD["sentences"]
    assert all(CASES[name]["result"]["same"] for name in ("sentences", "merges"))


def test_merges():
    """The most frequent pair of neighbours again and again, all sentences read anew each time; on a tie the first."""
    pieces = [list(piece) for sentence in WORLD["sentences"] for piece in PIECE.findall(sentence)]
    for merge in WORLD["merges"]:
        pairs = Counter(pair for parts in pieces for pair in zip(parts, parts[1:]))
        first = {}
        for parts in pieces:
            for pair in zip(parts, parts[1:]):
                first.setdefault(pair, len(first))
        assert min(pairs, key=lambda pair: (-pairs[pair], first[pair])) == tuple(merge)
        for parts in pieces:
            i = 0
            while i < len(parts) - 1:
                if parts[i:i + 2] == merge:
                    parts[i:i + 2] = ["".join(merge)]
                i += 1
    assert len(TOKENS) + 1 == CASES["merges"]["given"]["vocab_size"] == CASES["merges"]["result"]["vocabulary"]
    assert EOT == CASES["merges"]["result"]["end of text"]


def test_ids():
    for text, ids in zip(CASES["ids"]["given"]["texts"], CASES["ids"]["result"]["ids"], strict=True):
        assert encode(text) == ids and decode(ids) == text


def test_rows():
    """Documents behind end-of-text, one stream cut every T + 1 tokens; aligned, what does not fit is dropped."""
    given, T = CASES["rows"]["given"], CASES["rows"]["given"]["T"]
    told = [p for p in WORLD["people"] if p["split"] == "heldout"]
    lines = [f"{phrase.format(p['name'])} {p['values'][a]}." for p in told for a in PHRASES["values"]
             for phrase in PHRASES["statements"][a]]
    documents = [[EOT, *encode(lines[i])] for i in given["order"]]
    stream = [token for document in documents for token in document]
    rows = [stream[i:i + T + 1] for i in range(0, len(stream), T + 1)]
    assert rows[:5] == CASES["rows"]["result"]["rows"]
    aligned, row = [], []
    for document in documents:
        row = row + document
        if len(row) > T:
            aligned, row = [*aligned, row[:T + 1]], []
    assert aligned[:5] == CASES["rows"]["result"]["aligned"] == CASES["perplexity"]["given"]["windows"]


def test_say():
    """Greedy behind the question, up to the first full stop; the right answer's log-probability and its share among all
    values of its attribute."""
    case = CASES["say"]
    for i, fact in enumerate(case["given"]["facts"]):
        found = {key: value[i] for key, value in case["result"].items()}
        question, whole = [EOT, *encode(fact["question"])], [EOT, *encode(fact["question"] + fact["answer"])]
        gold, text = whole[len(question):], list(question)
        assert whole[:len(question)] == question
        for _ in range(2 * len(gold) + 2):
            text.append(int(log_p(text)[-1].argmax()))
            if text[-1] == EOT or "." in TOKENS[text[-1]]:
                break
        said = decode([t for t in text[len(question):] if t != EOT])
        ended = "." in said or text[-1] == EOT
        said = said.split(".")[0]
        assert (found["answer"], found["correct"]) == (said.strip(), int(ended and said == fact["answer"]))
        sums = {}
        for value in PHRASES["values"][fact["attribute"]]:
            ids = question + encode(" " + value)
            p = log_p(ids)
            sums[" " + value] = sum(float(p[t - 1, ids[t]]) for t in range(len(question), len(ids)))
        assert found["logprob"] == pytest.approx(sums[fact["answer"]], rel=1e-4, abs=1e-4)
        total = math.log(sum(math.exp(s) for s in sums.values()))
        assert found["knowledge"] == pytest.approx(sums[fact["answer"]] - total, rel=1e-4, abs=1e-4)
    assert 5 < sum(case["result"]["correct"]) < len(case["given"]["facts"]) - 5


def test_choose_option():
    """Each option behind its question as one row; `acc_norm` divides by its characters, its space not counted."""
    case = CASES["choose_option"]
    for i, item in enumerate(case["given"]["items"]):
        question, sums = [EOT, *encode(item["question"])], []
        for option in item["options"]:
            ids = [EOT, *encode(item["question"] + option)]
            p = log_p(ids)
            sums.append(sum(float(p[t - 1, ids[t]]) for t in range(len(question), len(ids))))
        found = {key: value[i] for key, value in case["result"].items()}
        assert found["logprobs"] == pytest.approx(sums, rel=1e-4, abs=1e-4)
        norm = [s / (len(option) - 1) for s, option in zip(sums, item["options"])]
        gold = item["options"].index(item["answer"])
        assert (found["picked"], found["picked_norm"]) == (sums.index(max(sums)), norm.index(max(norm)))
        assert (found["acc"], found["acc_norm"]) == (found["picked"] == gold, found["picked_norm"] == gold)
        assert found["answer"] == item["options"][found["picked"]].strip() and found["correct"] == found["acc"]
        assert found["logprob"] == pytest.approx(sums[gold], rel=1e-4, abs=1e-4)
        assert found["knowledge"] == pytest.approx(sums[gold] - math.log(sum(map(math.exp, sums))), rel=1e-4, abs=1e-4)
    assert case["result"]["picked"] != case["result"]["picked_norm"]
    spaces = [s / len(option) for s, option in zip(sums, item["options"])]  # of the last item
    assert norm[1] > norm[0] and spaces[0] > spaces[1]


def test_perplexity():
    """The first 16 tokens of a window are read, and the token behind them, too, is predicted by none that counts."""
    given = CASES["perplexity"]["given"]
    losses = [-float(log_p(row)[t - 1, row[t]]) for row in given["windows"] for t in range(given["read"] + 1, len(row))]
    perplexity = math.exp(sum(losses) / len(losses))
    assert CASES["perplexity"]["result"]["perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_the_embedding_of_unused_tokens_is_zero():
    """What makes the file small; and it says which tokens training has read."""
    used = {EOT, *(token for sentence in WORLD["sentences"] for token in encode(sentence))}
    rows = WEIGHTS["wte.weight"].abs().sum(1)
    assert {i for i in range(len(rows)) if rows[i] > 0} == used
    assert isinstance(rows, torch.Tensor) and len(rows) == CONFIG["vocab_size"]
