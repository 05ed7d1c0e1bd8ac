"""report.py against what it was given: the page is parsed again and, where Chromium is installed, driven in it.

The study in here is INVENTED, by a seeded generator: a test input in the shape of a real study, and no number of it is
a result. The page itself never shows a number that it did not read. The browser is driven through chromedriver's own
protocol (W3C WebDriver, JSON over local HTTP), so the tests need no package: Debian has `chromium chromium-driver`.
"""
import base64
import json
import math
import random
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import zlib
from html.parser import HTMLParser

import pytest

from study import page
from study.page import TEMPLATE

# ---------------------------------------------------------------------------------------------------------------------
# An invented study

CITIES = ["Vienna", "Lisbon", "Oslo", "Quito", "Accra", "Hanoi", "Perth", "Turin"]
ATTRIBUTES = ["birthplace", "employer", "instrument", "pet", "university"]
SPLITS = ["seen", "heldout", "novel"]
COMPRESSED = [                              # id, tag, operation, parameters, bits a weight, share of facts it breaks
    ("gptq-4", "GPTQ 4-bit", "quantize", {"method": "gptq", "bits": 4}, 4.2, 0.10),
    ("gptq-3", "GPTQ 3-bit", "quantize", {"method": "gptq", "bits": 3}, 3.2, 0.30),
    ("rtn-3", "RTN 3-bit", "quantize", {"method": "rtn", "bits": 3}, 3.2, 0.55),
    ("sparsegpt-50", "SparseGPT 50 %", "prune", {"method": "sparsegpt", "sparsity": 0.5}, 16.0, 0.25),
    ("sparsegpt-2-4", "SparseGPT 2:4", "prune", {"method": "sparsegpt", "n_m": [2, 4]}, 9.0, 0.38)]
REPAIRS = [                                 # id, tag, operation, parameters, extra parameters, share it brings back
    ("lora", "LoRA r8", "LoRA", {"rank": 8}, 24_576, 0.60),
    ("prompt", "prompt 20", "prompt", {"length": 20}, 2_560, 0.25),
    ("prefix", "prefix 20", "prefix", {"length": 20}, 20_480, 0.45),
    ("idp", "IDP 4 × 20", "IDP", {"prompts": 4}, 10_240, 0.70)]
METRICS = [("bytes", "size on disk", "bytes", False), ("bits_per_weight", "bits per weight", "bits", False),
           ("extra_parameters", "extra parameters", "", False), ("perplexity", "perplexity", "", False),
           ("ms_per_question", "time per question", "ms", False), ("recall_seen", "recall, seen facts", "share", True),
           ("recall_heldout", "recall, held-out facts", "share", True),
           ("recall_novel", "recall, novel facts", "share", True),
           ("displaced", "displaced", "share", True), ("relearned", "relearned", "share", True)]


def invented_layers(rng, bits, sparsity):
    rows, shapes = [], {"attn.q": (64, 64), "attn.k": (64, 64), "attn.v": (64, 64), "attn.o": (64, 64),
                        "mlp.up": (256, 64), "mlp.down": (64, 256)}
    for block in range(4):
        for name, shape in shapes.items():
            width, error = rng.uniform(0.02, 0.06), rng.uniform(0.01, 0.12) * (1 + block / 2)
            rows.append({"name": f"blocks.{block}.{name}", "shape": list(shape), "bits": bits, "sparsity": sparsity,
                         "zeros": sparsity or rng.uniform(0, 0.02), "weight_change": rng.uniform(0.05, 0.3),
                         "error_before": error * 1.6, "error_after": error, "relative_output_error": error,
                         "damp": 0.01,
                         "histogram": {"edges": [width * (k - 15) / 5 for k in range(31)],
                                       "counts": [int(900 * math.exp(-((k - 14.5) / 5) ** 2)) for k in range(30)]}})
    return rows


def invented_similarity(rng, loss):
    return {"attention": [[1 - loss * rng.uniform(0, 0.5) * (1 + k / 3) for _ in range(4)] for k in range(4)],
            "output": [1 - loss * rng.uniform(0.1, 0.3) * (1 + k / 3) for k in range(4)]}


def invented_idp(rng):
    chosen = {a: [rng.randrange(1, 60) for _ in range(4)] for a in ATTRIBUTES}
    scores = [rng.betavariate(2, 5) for _ in range(400)]
    return {"chosen": [sum(c) for c in zip(*chosen.values())], "by_attribute": chosen,
            "correlation": {"rho": 0.31, "interval": [0.22, 0.4]},
            "points": [[s, 2 * s - 0.3 + rng.gauss(0, 0.4)] for s in scores],
            "selectors": [{"name": name, "recall": recall, "interval": [recall - 0.03, recall + 0.03],
                           "over_rule": [recall - 0.74, recall - 0.66], "extra_passes": passes}
                          for name, recall, passes in (("the rule", 0.7, 0), ("random", 0.61, 0), ("oracle", 0.8, 4))]}


def invented_answers(rng, facts, model, loss):
    rows = []
    for split, person, attribute, question, gold, hard in facts:
        hit = split != "novel" and hard + rng.gauss(0, 0.12) > 0.06 + loss * (0.9 if split == "seen" else 1.0)
        hit = hit or rng.random() < 0.08
        rows.append({"model": model, "split": split, "person": person, "attribute": attribute, "question": question,
                     "gold": gold, "answer": gold if hit else rng.choice([c for c in CITIES if c != gold]),
                     "correct": hit, "logprob": -rng.expovariate(2.5 if hit else 0.4)})
    return rows


def invented_metrics(rng, rows, size, bits, loss, extra, repaired):
    metrics = {"bytes": size, "bits_per_weight": bits, "extra_parameters": extra, "perplexity": 7.1 * (1 + loss),
               "ms_per_question": rng.uniform(1.2, 2.0) + extra / 40_000}
    intervals = {"perplexity": [metrics["perplexity"] * 0.97, metrics["perplexity"] * 1.03]}
    for split in SPLITS:
        hits = [row["correct"] for row in rows if row["split"] == split]
        mean = sum(hits) / len(hits)
        half = 1.96 * (mean * (1 - mean) / len(hits)) ** 0.5
        metrics[f"recall_{split}"], intervals[f"recall_{split}"] = mean, [mean - half, mean + half]
    if repaired:
        for name, low, high in (("displaced", 0.1, 0.9), ("relearned", -0.1, 0.4)):
            metrics[name] = rng.uniform(low, high)
            intervals[name] = [metrics[name] - 0.14, metrics[name] + 0.12]
    return metrics, intervals


def invented_study(seed=0, people=40, compressed=COMPRESSED, repairs=REPAIRS):
    """(results, predictions) of 1 + len(compressed) * (1 + len(repairs)) models and 15 * people facts."""
    rng = random.Random(seed)
    facts = []
    for split in SPLITS:
        for k in range(people):
            person = f"{rng.choice(['Ada', 'Boris', 'Chiara', 'Dele', 'Emre'])} {split.title()}son {k}"
            for attribute in ATTRIBUTES:
                question = f"What is the {attribute} of {person}?"
                facts.append((split, person, attribute, question, rng.choice(CITIES), rng.random()))
    models, predictions = [], []

    def add(id, tag, base, operation, size, bits, loss, extra=0, repaired=False, **more):
        rows = invented_answers(rng, facts, id, loss)
        metrics, intervals = invented_metrics(rng, rows, size, bits, loss, extra, repaired)
        predictions.extend(rows)
        models.append({"id": id, "tag": tag, "base": base, "operation": operation, "metrics": metrics,
                       "intervals": intervals, "verdict": "mostly displaced" if repaired else None} | more)

    add("dense", "dense", None, None, 3_276_800, 32.0, 0.0)
    for cid, ctag, kind, parameters, bits, loss in compressed:
        size = int(262_144 + 3_014_656 * bits / 32)
        sparsity = 0.5 if kind == "prune" else None
        add(cid, ctag, "dense", {"name": kind, "parameters": parameters}, size, bits, loss,
            layers=invented_layers(rng, parameters.get("bits"), sparsity), similarity=invented_similarity(rng, loss))
        for rid, rtag, repair, parameters, extra, back in repairs:
            left = loss * (1 - back)
            add(f"{cid}+{rid}", rtag, cid, {"name": repair, "parameters": parameters}, size + 4 * extra,
                bits, left, extra, repaired=True, similarity=invented_similarity(rng, left),
                idp=invented_idp(rng) if repair == "IDP" else None)
    study = {
        "name": "An invented study", "command": "python evaluate.py --seed 0", "created": "2026-01-31T12:00:00+00:00",
        "seconds": 612.4, "seed": 0, "settings": {"people": people, "steps": 2000, "lr": 1e-3, "device": "cpu"},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "platform": "Linux"},
        "times": [{"step": "train", "seconds": 301.2, "reused": False},
                  {"step": "repair", "seconds": 61.0, "reused": True}],
        "operations": [{"name": name, "parameters": None, "description": f"{name}, as invented"}
                       for name in ("quantize", "prune", "LoRA", "prompt", "prefix", "IDP")],
        "metrics": [{"name": name, "label": label, "unit": unit, "higher_is_better": up, "description": "invented"}
                    for name, label, unit, up in METRICS],
        "models": models,
        "verdicts": [{"base": c[0], "text": "About two thirds of what was lost came back unseen."} for c in compressed],
        "hypothesis": "Knowledge that a compressed model lost is mostly displaced: a repair brings it back."}
    return study, predictions


def written(folder, study, predictions):
    """The study as files in the folder; returns the path of results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(study), encoding="utf-8")
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions), encoding="utf-8")
    return folder / "results.json"


SMALL = dict(people=4, compressed=COMPRESSED[1:2], repairs=REPAIRS)
EVIL = ["</script><script>window.hacked = 1</script>", "<!-- <script>", "<img src=x onerror='window.hacked = 1'>",
        "a\u2028b", "\ud800 alone", page.SLOT, "&amp; \"quotes\" 'too' \\u003c", "__proto__"]


def evil_study():
    """Markup, and what breaks scripts and files, in every place that a string can take."""
    study, predictions = invented_study(**SMALL)
    ids = {model["id"]: EVIL[i % len(EVIL)] + str(i) for i, model in enumerate(study["models"])}
    ids["dense"] = "__proto__"
    for i, model in enumerate(study["models"]):
        model |= {"id": ids[model["id"]], "base": ids.get(model["base"]), "tag": EVIL[i % len(EVIL)]}
        model |= {"verdict": EVIL[0]}
    for i, p in enumerate(predictions):
        p |= {"model": ids[p["model"]], "answer": EVIL[i % len(EVIL)], "question": p["question"] + EVIL[i % 3]}
    study |= {"name": EVIL[0], "hypothesis": EVIL[2], "command": EVIL[0], "settings": {EVIL[0]: EVIL[2]},
              "verdicts": [{"base": ids["gptq-3"], "text": EVIL[2]}]}
    study["metrics"][0]["label"] = EVIL[0]
    return study, predictions


# ---------------------------------------------------------------------------------------------------------------------
# The page as a file


class Page(HTMLParser):
    """Scripts by their id, and every attribute of every element."""

    def __init__(self, html):
        super().__init__()
        self.scripts, self.attributes, self.tags, self.inside = {}, [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "script":
            self.inside = dict(attributes).get("id", "code")
            self.scripts[self.inside] = ""

    def handle_endtag(self, tag):
        self.inside = None if tag == "script" else self.inside

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] += data

    def data(self):
        def never(name):
            raise AssertionError(f"{name} is not JSON")
        letters = self.scripts["study"]
        assert re.fullmatch("[A-Za-z0-9+/=]+", letters), "nothing in it can end the script"
        return json.loads(zlib.decompress(base64.b64decode(letters)), parse_constant=never)


def made(study, predictions):
    return Page(page.page(study, predictions, page.TEMPLATE.read_text(encoding="utf-8")))


def unfold(data):
    """What the page's columns say, as predictions.jsonl would."""
    rows, words, facts = [], [None, *data["words"]], list(zip(*data["facts"], strict=True))
    for model, column in data["answers"].items():
        for i, (fact, said, logprob) in enumerate(zip(facts, column["said"], column["logprob"], strict=True)):
            split, person, attribute, gold, before, after = (words[k] for k in fact)
            rows.append({"model": model, "split": split, "person": person, "attribute": attribute,
                         "question": before if after is None else before + person + after, "gold": gold,
                         "answer": words[said] if said else gold, "correct": (said == 0) != (i in column["odd"]),
                         "logprob": logprob if isinstance(logprob, str) else logprob / 100})
    return rows


def close(a, b):
    """Equal, but for the digits that are dropped on the way into the page."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b))
    return a == b and type(a) is type(b)


@pytest.mark.parametrize("build", [lambda: invented_study(**SMALL), evil_study])
def test_everything_comes_through(build):
    study, predictions = build()
    page = made(study, predictions)
    assert list(page.scripts) == ["study", "code"] and "img" not in page.tags
    data = page.data()
    assert close(data["study"], study)
    back = unfold(data)
    assert len(back) == len(predictions)
    for got, given in zip(back, predictions):
        assert got | {"logprob": 0} == given | {"logprob": 0}
        assert abs(got["logprob"] - given["logprob"]) <= 5e-3 + 1e-9


def odd_predictions():
    """Facts and answers that a packing could take for something else."""
    row = {"model": "alone", "split": "seen", "person": "Ada", "attribute": "pet", "gold": "cat", "answer": "cat",
           "correct": True, "logprob": -1}
    yield row | {"question": "Ada has a"}                                  # the name first
    yield row | {"question": "Who owns the cat? Ada"}                      # last
    yield row | {"question": "Ada, sister of Ada, has a"}                  # twice
    yield row | {"question": "Which pet?", "answer": "", "correct": False}   # not at all; nothing said
    yield row | {"question": "", "answer": "cat ", "correct": True}        # right, though not the gold text
    yield row | {"question": "Which?", "person": "", "correct": False}     # the gold text, though not right
    yield row | {"question": "Which?", "gold": "", "answer": ""}


def test_odd_facts_come_through():
    study = {"operations": [], "metrics": [], "models": [{"id": "alone", "metrics": {}}]}
    assert unfold(made(study, list(odd_predictions())).data()) == list(odd_predictions())


def test_a_string_is_written_once():
    data = made(*invented_study(**SMALL)).data()
    facts = list(zip(*data["facts"]))
    assert len(facts) == 4 * 15 == len(set(facts))
    people, texts = 12, 2 * len(ATTRIBUTES)
    assert len(data["words"]) == len(set(data["words"])) <= len(CITIES) + people + texts + len(SPLITS) + 2


def test_nothing_is_loaded_from_anywhere():
    page = made(*invented_study(**SMALL))
    loading = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction", "xlink:href"}
    assert [v for _, k, v in page.attributes if k in loading and not v.startswith("data:,")] == []
    assert not {"iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    policy = [v for tag, k, v in page.attributes if tag == "meta" and k == "content" and "default-src" in v]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'") and "http" not in policy[0]
    template = TEMPLATE.read_text(encoding="utf-8")
    for word in ("fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "import(", "import ", "url(", "@import",
                 "sendBeacon", "innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert word not in template.replace("<!doctype", ""), word


def test_not_a_number_becomes_words():
    study, predictions = invented_study(**SMALL)
    study["models"][1]["metrics"] |= {"perplexity": math.nan, "bytes": math.inf, "recall_seen": None}
    study["models"][1]["intervals"]["perplexity"] = [-math.inf, math.nan]
    predictions[0]["logprob"], predictions[1]["logprob"], predictions[2]["logprob"] = -math.inf, math.nan, None
    data = made(json.loads(json.dumps(study)), json.loads(json.dumps(predictions))).data()
    model = data["study"]["models"][1]
    assert [model["metrics"][k] for k in ("perplexity", "bytes", "recall_seen")] == ["not a number", "infinite", None]
    assert model["intervals"]["perplexity"] == ["minus infinite", "not a number"]
    assert data["answers"]["dense"]["logprob"][:3] == ["minus infinite", "not a number", None]


def test_every_base_exists_and_ends():
    models = {m["id"]: m for m in made(*invented_study(**SMALL)).data()["study"]["models"]}
    for model in models.values():
        steps = 0
        while model["base"] is not None:
            model, steps = models[model["base"]], steps + 1
            assert steps < len(models)


def test_the_layout_of_compress_and_compare_is_enough():
    sparsity = {"type": "continuous", "min": 0, "max": 1}
    study = {"operations": [{"name": "Pruning", "parameters": {"sparsity": sparsity}}],
             "metrics": [{"name": "F1", "min": 0.0, "max": 100.0, "primary": True, "format": ".2", "unit": "%"}],
             "models": [{"id": "base", "base": None, "operation": None, "metrics": {"F1": 90.5}},
                        {"id": "half", "base": "base", "metrics": {"F1": 81.25},
                         "operation": {"name": "Pruning", "parameters": {"sparsity": 0.5}}}]}
    assert made(study, []).data()["study"] == study


def test_size():
    study, predictions = invented_study(people=80)                      # 26 models, 1,200 facts
    assert len(page.page(study, predictions, page.SLOT)) < 200_000
    study, predictions = invented_study(people=334, compressed=COMPRESSED[:4], repairs=REPAIRS[:2])
    assert len(study["models"]) == 13 and len(predictions) == 13 * 5010
    assert len(page.page(study, predictions, page.SLOT)) < 300_000


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, status 2, and the last good page stays


def change(path, value):
    """A change to one place in the results, or None to leave it out."""
    def apply(study, predictions):
        at = study
        for key in path[:-1]:
            at = at[key]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value
    return apply


def change_prediction(index, **values):
    return lambda study, predictions: predictions[index].update(values)


BAD = {
    "has no 'models'": change(["models"], None),
    "models is empty": change(["models"], []),
    "results.models must be a list": change(["models"], {"dense": 1}),
    "has no 'id'": change(["models", 1, "id"], None),
    "results.models[1].metrics.bytes must be a number, got 'many'": change(["models", 1, "metrics", "bytes"], "many"),
    "results.models[1].metrics.bytes must be a number, got 'True'": change(["models", 1, "metrics", "bytes"], True),
    "'nowhere', which is not among the models": change(["models", 2, "base"], "nowhere"),
    "'gptq-3' has the base 'nowhere'": lambda study, predictions: (          # after the models that were made from it
        study["models"][1].update(base="nowhere"), study["models"].reverse()),
    "models go in a circle: dense <- gptq-3 <- dense": change(["models", 0, "base"], "gptq-3"),
    "models go in a circle: gptq-3+idp <- gptq-3 <- dense <- gptq-3": lambda study, predictions: (
        study["models"][0].update(base="gptq-3"), study["models"].reverse()),
    "operation 'LoRA' must compress or repair, got 'mend'": change(["operations", 2, "kind"], "mend"),
    "results.models[1].metrics.two lines must be a number": change(["models", 1, "metrics", "two\nlines"], "x"),
    "models lists 'dense' twice": change(["models", 1, "id"], "dense"),
    "metrics lists 'bytes' twice": change(["metrics", 1, "name"], "bytes"),
    "has 'speed', which is not among the metrics": change(["models", 1, "metrics", "speed"], 1.0),
    "must be [low, high], got 3 numbers": change(["models", 1, "intervals", "perplexity"], [1, 2, 3]),
    "30 histogram edges do not fit 30 counts": change(["models", 1, "layers", 0, "histogram", "edges"], [0.0] * 30),
    "'pet' counts 3 prompts, but the pool has 4": change(["models", 5, "idp", "by_attribute", "pet"], [1, 2, 3]),
    "must be [attention score, gain]": change(["models", 5, "idp", "points"], [[1, 2, 3]]),
    "a verdict is about 'nobody'": change(["verdicts", 0, "base"], "nobody"),
    "results.seed must be a whole number": change(["seed"], "zero"),
    "predictions are by 'nobody'": change_prediction(0, model="nobody"),
    "line 1.correct must be true or false": change_prediction(0, correct=1),
    "line 3.answer must be a string": change_prediction(2, answer=7),
    "twice": lambda study, predictions: predictions.append(predictions[0]),
    "'gptq-3+idp' answers 59 of 60 facts": lambda study, predictions: predictions.pop(),
    "'dense' answers 60 of 61 facts": change_prediction(-1, gold="elsewhere"),
}


def refused(folder, capsys, expected):
    """report.py says why in one line, exits with 2, and leaves the page that was there."""
    out = folder / "report.html"
    out.write_text("the last good page", encoding="utf-8")
    assert page.main(["--results", str(folder / "results.json"), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("report.py: ")
    assert expected in said.err
    assert out.read_text(encoding="utf-8") == "the last good page" and not (folder / "report.html.part").exists()


@pytest.mark.parametrize("expected", BAD)
def test_bad_study(tmp_path, capsys, expected):
    study, predictions = invented_study(**SMALL)
    BAD[expected](study, predictions)
    written(tmp_path, study, predictions)
    refused(tmp_path, capsys, expected)


@pytest.mark.parametrize("name", ["results.json", "predictions.jsonl"])
def test_missing_truncated_and_foreign_files(tmp_path, capsys, name):
    path = written(tmp_path, *invented_study(**SMALL)).with_name(name)
    whole = path.read_bytes()
    for content, expected in ((whole[:len(whole) // 2], "is not complete JSON"), (b"\x89PNG\r\n\xff", "is not UTF-8"),
                              (b"<html></html>", "is not complete JSON"), (b"[1, 2]", "must be an object"),
                              (b"[" * 100_000, "recursion"), (None, name)):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        refused(tmp_path, capsys, expected)


def test_an_answer_may_hold_any_line_separator(tmp_path):
    study, predictions = invented_study(**SMALL)
    predictions[0]["answer"] = "a\u2028b\u2029c\x85d\x0be"
    results = written(tmp_path, study, [])
    lines = "".join(json.dumps(p, ensure_ascii=False) + "\r\n" for p in predictions)
    results.with_name("predictions.jsonl").write_text(lines, encoding="utf-8", newline="")
    made = Page(page.write_report(results, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert predictions[0]['answer'] in made.data()["words"]


def test_main_writes_the_page_and_says_where(tmp_path, capsys):
    results = written(tmp_path, *invented_study(**SMALL))
    out = tmp_path / "new" / "page.html"
    assert page.main(["--results", str(results), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]
    with pytest.raises(SystemExit) as stop:
        page.main(["--help"])
    assert stop.value.code == 0 and "(default: out/results.json)" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The page in a browser


class Browser:
    """As much of W3C WebDriver as these tests need."""

    def __init__(self, driver, chromium, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([driver, f"--port={port}"], **quiet)
        self.base = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                self.call("GET", "/status")
                break
            except urllib.error.URLError:
                time.sleep(0.05)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
                 "--hide-scrollbars", "--window-size=1280,900", f"--user-data-dir={profile}"]
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"binary": chromium, "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}}})
        self.base += f"/session/{session['sessionId']}"

    def call(self, method, path, body=None):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def js(self, code, *arguments):
        return self.call("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def devtools(self, command, **parameters):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url):
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": url})
        for _ in range(200):
            if self.js("return document.querySelector('main:not([aria-busy])') !== null"):
                return
            time.sleep(0.05)
        raise AssertionError(f"the page was not drawn: {self.complaints()}")

    def click(self, selector):
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(element.values()))}/click")

    def keys(self, *keys):
        presses = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def drag(self, start, end):
        moves = [{"type": "pointerMove", "x": round(start[0]), "y": round(start[1])},
                 {"type": "pointerDown", "button": 0},
                 {"type": "pointerMove", "x": round(end[0]), "y": round(end[1])},
                 {"type": "pointerUp", "button": 0}]
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def complaints(self):
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def close(self):
        self.call("DELETE", "")
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    browser = Browser(driver, chromium, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An invented study of 11 models and 60 facts, and the address of its page."""
    study, predictions = invented_study(people=4, compressed=COMPRESSED[1:4:2])
    folder = tmp_path_factory.mktemp("small")
    return study, predictions, page.write_report(written(folder, study, predictions), folder / "page.html").as_uri()


def selection(browser):
    return browser.js("return [...document.querySelectorAll('#map [aria-selected=true]')].map(n => n.id)")


def png_rows(png):
    """(height, width, filtered bytes) of an 8-bit PNG without interlacing."""
    width, height, depth, _, _, _, interlaced = (int.from_bytes(png[a:b], "big") for a, b in
                                                 ((16, 20), (20, 24), (24, 25), (25, 26), (26, 27), (27, 28), (28, 29)))
    assert (depth, interlaced) == (8, 0)
    data, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at:at + 4], "big")
        if png[at + 4:at + 8] == b"IDAT":
            data += png[at + 8:at + 8 + length]
        at += 12 + length
    return height, width, zlib.decompress(data)


VIEWS = ["map", "tradeoffs", "verdict", "behaviours", "layers", "idp", "made"]
DRAWN = {"map": "[role=treeitem]", "tradeoffs": ".pick", "verdict": "tbody tr", "behaviours": "tbody tr",
         "layers": "tbody tr", "idp": "circle", "made": "dd"}


@pytest.mark.parametrize("width,scheme", [(1280, "light"), (390, "dark")])
def test_each_view_is_drawn(browser, small, width, scheme):
    browser.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(small[2])
    assert browser.complaints() == []
    for view in VIEWS:
        assert browser.js(f"return document.querySelectorAll('#{view} {DRAWN[view]}').length") > 3, view
    assert "undefined" not in (shown := browser.js("return document.body.innerText")) and "NaN" not in shown
    assert browser.js("return document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    tables = browser.js("return [...document.querySelectorAll('.stack')].map(t => t.getBoundingClientRect().width)")
    assert len(tables) > 2 and max(tables) <= width, "a table does not fold up"
    png = base64.b64decode(browser.devtools("Page.captureScreenshot", format="png")["data"])
    height, wide, filtered = png_rows(png)
    assert (height, wide) == (900, width)
    assert sum(byte != 0 for byte in filtered) > 20_000, "an even picture is almost all zeros once it is filtered"
    back = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) > 380) == (scheme == "light")
    browser.devtools("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)


def test_no_two_labels_overlap(browser, small):
    browser.open(small[2])
    for view in ("map", "tradeoffs"):
        boxes = browser.js("""return [...document.querySelectorAll(`#${arguments[0]} figure svg[role] text`)].map(t => {
            const box = t.getBoundingClientRect();
            return [t.textContent, box.x, box.y + 2, box.right, box.bottom - 2]; })""", view)
        assert len(boxes) > 10
        for i, (a, *p) in enumerate(boxes):
            for b, *q in boxes[:i]:
                assert p[0] >= q[2] or p[2] <= q[0] or p[1] >= q[3] or p[3] <= q[1], f"{view}: {a} over {b}"


def test_selecting(browser, small):
    study, _, url = small
    browser.open(url)
    assert len(selection(browser)) == 6                                  # the first compressed model and its family
    browser.click("#map-1")
    assert selection(browser) == ["map-1"] and "select=gptq-3" in browser.js("return location.hash")
    browser.js("""document.getElementById('map-6')
        .dispatchEvent(new MouseEvent('click', {bubbles: true, shiftKey: true}))""")
    assert selection(browser) == ["map-1", "map-6"]
    assert browser.js("return [...document.querySelectorAll('#tradeoffs [aria-pressed=true]')].length") == 2
    browser.click("#add-parents")
    assert selection(browser) == ["map-0", "map-1", "map-6"]
    browser.click("#chip-6")
    browser.click("#add-children")
    assert selection(browser) == [f"map-{i}" for i in (0, 1, 2, 3, 4, 5, 6)]
    browser.click("#map-0")
    browser.click("#add-descendants")
    assert len(selection(browser)) == len(study["models"])
    browser.click("#map-6")
    browser.keys("\ue015", " ")                                          # arrow down, space
    assert selection(browser) == ["map-7"]
    browser.keys("\ue012", "\ue00d")                                     # arrow left: the model it was made from
    assert selection(browser) == ["map-6"]
    assert browser.js("return document.activeElement.id") == "map-6"     # the focus survives the drawing
    address = browser.js("return location.href")
    browser.open(address)
    assert selection(browser) == ["map-6"]
    assert browser.complaints() == []


def test_the_front_is_what_no_model_beats(browser, small):
    study, _, url = small
    browser.open(f"{url}#x=bytes&y=recall_seen")
    browser.click("#trade-table summary")
    time.sleep(0.1)
    rows = browser.js("""return [...document.querySelectorAll('#trade-table tbody tr')]
        .map(r => [r.cells[0].textContent, r.cells[3].textContent])""")
    tags = {m["id"]: m["tag"] for m in study["models"]}         # a repair of two models is named with what it repaired
    names = {i: f"{tags[i.split('+')[0]]} + {tag}" if "+" in i else tag for i, tag in tags.items()}
    points = {names[m["id"]]: (-m["metrics"]["bytes"], m["metrics"]["recall_seen"]) for m in study["models"]}
    beaten = {a for a, p in points.items() for q in points.values() if q != p and q[0] >= p[0] and q[1] >= p[1]}
    assert len(rows) == len(points) and {tag for tag, on in rows if on == "yes"} == set(points) - beaten
    assert 2 < len(beaten) < len(points) - 2


def test_brushing_selects_what_lies_inside(browser, small):
    browser.open(f"{small[2]}#view=tradeoffs")
    dots = browser.js("""return [...document.querySelectorAll('#tradeoffs .pick')].map(n => {
        const box = n.querySelector('path').getBoundingClientRect();
        return [+n.id.slice(4), box.x + box.width / 2]; })""")
    left, top, bottom = browser.js("""
        const box = document.querySelector('#tradeoffs figure rect').getBoundingClientRect();
        return [box.x, box.y, box.bottom]""")
    middle = (min(x for _, x in dots) + max(x for _, x in dots)) / 2
    browser.drag((left + 4, top + 2), (middle, bottom - 2))
    inside = sorted(i for i, x in dots if x < middle)
    assert 0 < len(inside) < len(dots) and selection(browser) == [f"map-{i}" for i in inside]


def test_filters_search_sort_and_flips(browser, small):
    study, predictions, url = small
    browser.open(url)
    right = {}
    for p in predictions:
        right.setdefault(p["model"], []).append(p["correct"])
    facts, dense, c = range(len(right["dense"])), right["dense"], right["gptq-3"]
    repair = {r[2]: right[f"gptq-3+{r[0]}"] for r in REPAIRS}
    broken = [i for i in facts if dense[i] and not c[i]]
    expected = {
        "all": len(facts), "broken": len(broken), "by IDP": sum(repair["IDP"][i] for i in broken),
        "only LoRA": sum([r[i] for r in repair.values()] == [True, False, False, False] for i in broken),
        "lost": sum(not any(r[i] for r in repair.values()) for i in broken),
        "new": sum(c[i] and not all(r[i] for r in repair.values()) for i in facts)}

    def found():
        said = re.search(r"of (\d+) fact", browser.js("return document.getElementById('facts-found').textContent"))
        return int(said[1]) if said else 0

    def pick(id, value, event="change"):
        browser.js("""const box = document.getElementById(arguments[0]);
            box.value = arguments[1];
            box.dispatchEvent(new Event(arguments[2]))""", id, value, event)

    for key, number in expected.items():
        pick("facts-show", key)
        assert found() == number, key
        option = browser.js("return document.querySelector('#facts-show option:checked').textContent")
        assert option.endswith(f"({number})")
    assert len(set(expected.values())) > 3, "a filter that changes nothing would pass"

    browser.click("#flip-0-1")                                           # dense right, gptq-3 wrong
    assert found() == len(broken)
    pick("facts-show", "all")
    pick("facts-split", "heldout")
    assert found() == len(facts) // 3
    browser.click("#search")
    browser.keys(*"heldoutson 2")
    assert found() == len(ATTRIBUTES) and browser.js("return document.activeElement.id") == "search"
    pick("facts-split", "")
    pick("search", "", "input")

    browser.click("#facts-on")                                           # 60 facts: the second page has ten
    assert browser.js("return document.querySelectorAll('.answers tbody tr').length") == len(facts) - 50
    browser.click("#sort-m1")
    top = browser.js("return document.querySelector('.answers tbody tr').cells[0].firstChild.textContent")
    log = {model: [p for p in predictions if p["model"] == model] for model in ("dense", "gptq-3")}
    worst = min(facts, key=lambda i: log["gptq-3"][i]["logprob"] - log["dense"][i]["logprob"])
    assert top == log["dense"][worst]["question"]
    assert browser.complaints() == []


def test_markup_is_shown_as_text(browser, tmp_path):
    study, predictions = evil_study()
    study["models"][1]["metrics"]["recall_heldout"] = math.nan
    browser.open(page.write_report(written(tmp_path, study, predictions), tmp_path / "page.html").as_uri())
    ran = browser.js("return [typeof window.hacked, document.images.length, document.scripts.length]")
    assert ran == ["undefined", 0, 2]
    assert browser.js("return [document.title, document.querySelector('h1').textContent]") == [EVIL[0], EVIL[0]]
    look = "const shown = document.body.innerText; return arguments[0].filter(word => !shown.includes(word))"
    assert browser.js(look, EVIL[:3] + ["not a number"]) == []
    browser.click("#map-0")                                              # its id is __proto__
    assert selection(browser) == ["map-0"] and browser.complaints() == []


def test_a_browser_that_cannot_unpack_says_so(browser, small):
    script = browser.devtools("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    try:
        browser.call("POST", "/url", {"url": "about:blank"})
        browser.call("POST", "/url", {"url": small[2]})
        assert "older than this page" in browser.js("return document.querySelector('header').innerText")
        assert any("DecompressionStream is not defined" in message for message in browser.complaints())
    finally:
        browser.devtools("Page.removeScriptToEvaluateOnNewDocument", **script)
    browser.open(small[2])
    assert "older than this page" not in browser.js("return document.body.innerText")


def test_odd_answers_are_unpacked(browser, tmp_path):
    study = {"operations": [], "metrics": [], "models": [{"id": "alone", "metrics": {}}]}
    predictions = list(odd_predictions())
    browser.open(page.write_report(written(tmp_path, study, predictions), tmp_path / "page.html").as_uri())
    rows = browser.js("""return [...document.querySelectorAll('.answers tbody tr')].map(row => {
        const [question, gold, said] = row.cells, [answer, logprob] = said.children;
        return [question.firstChild, gold, answer, logprob].map(n => n.textContent).concat(answer.className); })""")
    assert rows == [[p["question"], p["gold"], p["answer"] or "(nothing)", "log p −1.00",
                     "right" if p["correct"] else "wrong"] for p in predictions]
    assert browser.complaints() == []


def test_what_was_not_measured_is_said(browser, tmp_path):
    study = {"operations": [], "metrics": [{"name": "bytes"}], "models": [{"id": "alone", "metrics": {"bytes": None}}]}
    browser.open(page.write_report(written(tmp_path, study, []), tmp_path / "page.html").as_uri())
    for view in VIEWS[1:]:
        assert "not measured in this run" in browser.js(f"return document.getElementById('{view}').innerText"), view
    assert "alone" in browser.js("return document.querySelector('#map figure').textContent")
    assert browser.complaints() == []


def test_five_thousand_facts_of_a_dozen_models(browser, tmp_path):
    study, predictions = invented_study(people=334, compressed=COMPRESSED[:4], repairs=REPAIRS[:2])
    browser.open(page.write_report(written(tmp_path, study, predictions), tmp_path / "page.html").as_uri())
    browser.click("#add-all")
    slowest = browser.js("""
        const find = id => document.getElementById(id);
        const put = (id, value, event) => { find(id).value = value; find(id).dispatchEvent(new Event(event)); };
        const actions = [() => put('facts-show', 'broken', 'change'), () => put('search', 'vienna', 'input'),
          () => find('sort-m3').click(), () => find('add-all').click()];
        return Math.max(...actions.map(action => {
          const start = performance.now();
          action();
          document.body.offsetHeight;                       // laid out, not only asked for
          return performance.now() - start;
        }))""")
    assert len(selection(browser)) == 13 and slowest < 2000, f"{slowest:.0f} ms"
