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

from engine.files import write_text
from study import figure
from study.results import (check, estimate, is_control, keep_apart, number, read_predictions, read_results, read_text,
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


def shares_of_bases(study):
    """[(what was compressed, its repair that brings back most, confirmed ones first)], the largest share first; a base
    whose loss was too small to divide by is left out, and so are the controls."""
    def rank(model):
        return model.get("confirmed") is True, estimate(model, "displaced")[0]
    able = [(base, [m for m in made if estimate(m, "displaced")]) for base, made in repaired_bases(study)
            if not is_control(base)]
    pairs = [(base, max(made, key=rank)) for base, made in able if made]
    return sorted(pairs, key=lambda pair: rank(pair[1]), reverse=True)


def best_repair(study):
    """One sentence on the repair that brings back most, confirmed ones first; empty where nothing can be divided. The
    share itself stands in the study's headline, study/claims.py.
    """
    pairs = shares_of_bases(study)
    if not pairs:
        return ""
    base, model = pairs[0]
    says = f"{name(model)} on {name(base)} brings back most"
    extra = number(model["metrics"].get("extra_parameters"))
    if extra:
        says += f", with {extra:,.0f} extra parameters"
    dense = next(m for m in study["models"] if m.get("base") is None)
    recalls = [number(m["metrics"].get("recall_heldout")) for m in (base, model, dense)]
    if None not in recalls:
        says += ": held-out recall goes from {:.1f} to {:.1f} %, {:.1f} % before compression".format(
            *(100 * x for x in recalls))
    return says + ("." if model.get("confirmed") else "; the corrected test does not confirm it.")


def at_least(study):
    """One sentence on every compressor: the lower end of the interval of its best confirmed repair; empty for one."""
    found = sorted(((max(0, estimate(m, "displaced")[1]) if m.get("confirmed") else 0, name(base))
                    for base, m in shares_of_bases(study)), reverse=True)
    if len(found) < 2:
        return ""
    ends = [(math.floor(100 * low + 1e-9), base) for low, base in found]
    return "Of what was lost at least this came back: " + ", ".join(
        f"{low} % after {base}" if low else f"none shown after {base}" for low, base in ends) + "."


def as_sentence(text):
    """As markup; a number and its % stay on one line."""
    return figure.escape(text.replace(" %", "\u00a0%"))


def name(model):
    return model.get("tag") or model["id"]


# ---- answers: one line a model and fact in the file; in the page one row a fact, one column a model

def by_fact(predictions, study):
    """The predictions as the page holds them: {"facts": ..., "answered": ids of models, "said", "right", "logprob"}.

    A fact is [split, person, attribute, question, gold]. The last three are tables, a row a fact and a column a model
    that answered: what it said (None: the gold text), 1 where that is right, and the gold text's log-probability to a
    tenth, as finely as the page shows it (None: not measured).

    Raises ValueError for a model that is not in the study, that answers a fact twice, or only some of the facts: then
    the file was cut off.
    """
    answers, models = {}, {model["id"] for model in study["models"]}
    for p in predictions:
        if p["model"] not in models:
            raise ValueError(f"predictions are by {p['model']!r}, which is not among the models")
        fact = tuple(p[key] for key in ("split", "person", "attribute", "question", "gold"))
        mine = answers.setdefault(p["model"], {})
        if fact in mine:
            raise ValueError(f"predictions: {p['model']!r} answers {p['question']!r} twice")
        mine[fact] = (None if p["answer"] == p["gold"] else p["answer"], int(p["correct"]), tenth(p.get("logprob")))
    facts = list(dict.fromkeys(fact for mine in answers.values() for fact in mine))
    for model, mine in answers.items():
        if len(mine) != len(facts):
            raise ValueError(f"predictions: {model!r} answers {len(mine)} of {len(facts)} facts; was the file cut off?")
    tables = {name: [[mine[fact][k] for mine in answers.values()] for fact in facts]
              for k, name in enumerate(("said", "right", "logprob"))}
    return {"facts": facts, "answered": list(answers), **tables}


def tenth(x):
    """A number to one digit; what is no number in words, and None as it is."""
    return spoken(x) if number(x) is None else round(x, 1) + 0.0  # + 0.0: no -0.0


# ---- into the page

def spoken(value):
    """JSON has no NaN and no infinity; the page shows them as words, and draws nothing for them. Other floats keep five
    significant digits: more than any of our measurements has, at a third of the length."""
    if isinstance(value, float):
        if math.isnan(value):
            return "not a number"
        if math.isinf(value):
            return "infinite" if value > 0 else "minus infinite"
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [spoken(item) for item in value]
    if isinstance(value, dict):
        return {key: spoken(item) for key, item in value.items()}
    return value


def embed(data):
    """Data as JSON, deflated, in letters; the browser inflates them by itself (its DecompressionStream reads what zlib
    writes). None of base64's 64 letters means anything to HTML, so whatever the names and answers hold, it can neither
    end the script nor be spoilt by an encoding."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def slim(model):
    """A model without what the page does not draw: each draw's numbers, and similarity text by text."""
    model = {key: part for key, part in model.items() if key != "seeds"}
    if isinstance(model.get("similarity"), dict):
        model["similarity"] = {key: part for key, part in model["similarity"].items() if key != "texts"}
    return model


def page(study, predictions):
    """The whole page as a string. Raises ValueError when the study or the predictions cannot be drawn."""
    check(study)
    shown = {**study, "models": [slim(model) for model in study["models"]]}
    slots = {"TITLE": figure.escape(title(study)), "NAME": figure.escape(study.get("name") or ""),
             "HEADLINE": as_sentence(study.get("headline") or ""), "BEST": as_sentence(best_repair(study)),
             "LEAST": as_sentence(at_least(study)),
             "PICTURE": figure.picture(study) if repaired_bases(study) else "",
             "STUDY": embed(spoken(shown)), "ANSWERS": embed(by_fact(predictions, study)),
             "CSS": read_text(PARTS["css"]), "JS": read_text(PARTS["js"])}
    return re.sub("@@([A-Z]+)@@", lambda slot: slots[slot[1]], read_text(PARTS["html"]))


def write_report(results=RESULTS, out=PAGE):
    """Reads results and the predictions.jsonl beside it, writes the page, returns its path."""
    results, out = Path(results), Path(out)
    answers = results.with_name("predictions.jsonl")
    keep_apart(out, results, answers)
    text = page(read_results(results), read_predictions(answers))
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
