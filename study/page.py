"""
One page to see what compression did: out/results.json and out/predictions.jsonl into out/report.html.

The page is one file. It opens from the disk, can be mailed, and loads nothing: the study's numbers, the styles and the
drawing code are all inside it. This file checks the numbers, writes the first screen (question, answer, picture),
packs the rest and joins the three parts that stand beside it: report.html, report.css and report.js (plain JavaScript
and SVG).

    python -m study page                         # out/results.json -> out/report.html
    python -m study page --results elsewhere/results.json --out page.html

What it leaves out: any computation of a result. A number on the page was measured by the study, or is a count or a
difference of such numbers; a number that was not measured is said to be missing.
"""
import argparse
import base64
import json
import math
import re
import zlib
from pathlib import Path

from engine.script import write_text
from study import figure
from study.results import (check, confirmed, estimate, is_control, number, read_predictions, read_results, read_text,
                           repaired_bases)

RESULTS, PAGE = "out/results.json", "out/report.html"
PARTS = {name: Path(__file__).with_name(f"report.{name}") for name in ("html", "css", "js")}
QUESTION = "When a language model is compressed, is its knowledge forgotten or only displaced?"


# ---- the first screen: what the study says, in words

def title(study):
    """The question of the study; another study (of Compress and Compare, say) goes by its own name."""
    if repaired_bases(study):
        return QUESTION
    return study.get("name") or "What compression did"


def headline(study):
    """One sentence that follows from the tests: how many repairs bring back facts that they never read about."""
    if isinstance(study.get("headline"), str):
        return study["headline"]
    repairs = [m for base, made in repaired_bases(study) if not is_control(base) for m in made]
    if not repairs:
        return ""
    able = [m for m in repairs if estimate(m, "displaced")]
    if not able:
        return "Compression took too little to say whether it was forgotten or displaced."
    sure = confirmed(study)
    found = sum(sure[m["id"]] is True for m in able)
    if not found:
        return f"None of {len(able)} repairs is confirmed to bring back facts that it never read about."
    return (f"Part of what compression took was displaced: {found} of {len(able)} repairs "
            f"bring{'s' * (found == 1)} back facts {'it' if found == 1 else 'they'} never read about.")


def best_repair(study):
    """One sentence on the repair that brings back most, confirmed ones first; empty where nothing can be divided."""
    sure = confirmed(study)
    able = [(base, m) for base, made in repaired_bases(study) if not is_control(base)
            for m in made if estimate(m, "displaced")]
    if not able:
        return ""
    base, model = max(able, key=lambda pair: (sure[pair[1]["id"]] is True, estimate(pair[1], "displaced")[0]))
    share, low, high = (f"{100 * x:.0f}".replace("-", "−") for x in estimate(model, "displaced"))
    extra = number(model["metrics"].get("extra_parameters"))
    return (f"{model.get('tag') or model['id']} brings back most: {share} % "
            f"(95 % interval {low} to {high}) of the held-out recall that "
            f"{base.get('tag') or base['id']} took" + (f", with {extra:,.0f} extra parameters" if extra else "")
            + ("." if sure[model["id"]] else "; the corrected test does not confirm it."))


# ---- answers: one line a model and fact in the file; in the page one row a fact, one column a model

def fold(predictions, study):
    """The predictions as the page holds them, at a twentieth of their size.

    `words` holds every string once; word k is words[k - 1], and 0 is none. `facts` are columns, a word a fact: split,
    person, attribute, gold answer, then the question as what stands before the person's name and after it (0: the
    question does not name them). `answers`, for each model: `said`, a word a fact (0: the gold answer's own text);
    `odd`, the facts where being right is not the same as saying that text; `logprob`, in hundredths of a nat, as the
    difference from the model's base where both are numbers. The columns of a base stand before those made from it.
    Raises ValueError when a model answers a fact twice, or answers only some of the facts: the file was cut off.
    """
    words, rows, answers = {}, {}, {}
    base = {model["id"]: model.get("base") for model in study["models"]}

    def word(string):
        return words.setdefault(string, len(words) + 1)

    for p in predictions:
        if p["model"] not in base:
            raise ValueError(f"predictions are by {p['model']!r}, which is not among the models")
        named = p["person"] != "" and p["person"] in p["question"]
        before, _, after = p["question"].partition(p["person"]) if named else (p["question"], "", "")
        fact = (*(word(p[key]) for key in ("split", "person", "attribute", "gold")), word(before),
                word(after) if named else 0)
        row, mine = rows.setdefault(fact, len(rows)), answers.setdefault(p["model"], {})
        if row in mine:
            raise ValueError(f"predictions: {p['model']!r} answers {p['question']!r} twice")
        said = 0 if p["answer"] == p["gold"] else word(p["answer"])
        mine[row] = (said, p["correct"] != (said == 0), hundredths(p.get("logprob")))

    columns, logprobs = {}, {}

    def depth(model):
        return 0 if base[model] is None else 1 + depth(base[model])

    for model in sorted(answers, key=depth):
        mine = answers[model]
        if len(mine) != len(rows):
            raise ValueError(f"predictions: {model!r} answers {len(mine)} of {len(rows)} facts; was the file cut off?")
        said, odd, logprobs[model] = zip(*(mine[row] for row in range(len(rows))))
        before = logprobs.get(base[model]) or [None] * len(rows)
        moved = [x if number(x) is None or number(b) is None else x - b for x, b in zip(logprobs[model], before)]
        columns[model] = {"said": list(said), "odd": [row for row, is_odd in enumerate(odd) if is_odd],
                          "logprob": moved}
    return {"words": list(words), "facts": [list(column) for column in zip(*rows)], "answers": columns}


def hundredths(x):
    return round(100 * x) if number(x) is not None else x


# ---- into the page

def spoken(value):
    """JSON has no NaN and no infinity; the page shows them as words, and draws nothing for them. Other floats keep six
    significant digits: more than any of our measurements has, at a third of the length."""
    if isinstance(value, float):
        if math.isnan(value):
            return "not a number"
        if math.isinf(value):
            return "infinite" if value > 0 else "minus infinite"
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [spoken(item) for item in value]
    if isinstance(value, dict):
        return {key: spoken(item) for key, item in value.items()}
    return value


def embed(data):
    """The data as JSON, deflated, in letters: a third of its length, and the browser inflates it by itself (its
    DecompressionStream reads what zlib writes). None of base64's 64 letters means anything to HTML, so whatever the
    names and answers hold, it can neither end the script nor be spoilt by an encoding."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def page(study, predictions):
    """The whole page as a string. Raises ValueError when the study or the predictions cannot be drawn."""
    check(study)
    models = [{key: {k: v for k, v in part.items() if k != "texts"} if key == "similarity" and part else part
               for key, part in model.items()} for model in study["models"]]  # text by text: more than the page shows
    data = spoken({"study": {**study, "models": models}, "confirmed": confirmed(study)} | fold(predictions, study))
    drawable = bool(repaired_bases(study))
    slots = {"TITLE": figure.escape(title(study)), "NAME": figure.escape(study.get("name") or ""),
             "HEADLINE": figure.escape(headline(study)), "BEST": figure.escape(best_repair(study)),
             "PICTURE": figure.draw(study) if drawable else "", "STUDY": embed(data),
             "CSS": read_text(PARTS["css"]), "JS": read_text(PARTS["js"])}
    return re.sub("@@([A-Z]+)@@", lambda slot: slots[slot[1]], read_text(PARTS["html"]))


def write_report(results=RESULTS, out=PAGE):
    """Reads results and the predictions.jsonl beside it, writes the page, returns its path."""
    results, out = Path(results), Path(out)
    text = page(read_results(results), read_predictions(results.with_name("predictions.jsonl")))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def main(arguments):
    """python -m study page: see the top of this file."""
    parser = argparse.ArgumentParser(prog="study page", description="One page to see what compression did.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", default=RESULTS, help="what the study measured; predictions.jsonl lies beside it")
    parser.add_argument("--out", default=PAGE, help="the page to write")
    args = parser.parse_args(arguments)
    out = write_report(args.results, args.out)
    print(f"{out}  ({out.stat().st_size / 1e3:,.0f} kB)")
