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
from study.results import check, estimate, is_control, number, read_predictions, read_results, read_text, repaired_bases

RESULTS, PAGE = "out/results.json", "out/report.html"
PARTS = {name: Path(__file__).with_name(f"report.{name}") for name in ("html", "css", "js")}
POINTS = 250  # of a pool, at most, that the page draws
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

STEP = 13  # a log-probability x is kept as round(STEP ln(1 + |x|)): to 0.04 near 0, to 4 % far from it


def by_fact(predictions, models):
    """({string: word}, {fact: row}, {model: {row: (word said, correct, log-probability or None)}}) of the predictions.

    Words are numbered from 1, facts from 0; a fact is what `fold` says, in words. Raises ValueError for a model that is
    not among `models`, or that answers a fact twice.
    """
    words, rows, answers = {}, {}, {}

    def word(string):
        return words.setdefault(string, len(words) + 1)

    for p in predictions:
        if p["model"] not in models:
            raise ValueError(f"predictions are by {p['model']!r}, which is not among the models")
        named = p["person"] != "" and p["person"] in p["question"]
        before, _, after = p["question"].partition(p["person"]) if named else (p["question"], "", "")
        fact = (*(word(p[key]) for key in ("split", "person", "attribute", "gold")), word(before),
                word(after) if named else 0)
        row, mine = rows.setdefault(fact, len(rows)), answers.setdefault(p["model"], {})
        if row in mine:
            raise ValueError(f"predictions: {p['model']!r} answers {p['question']!r} twice")
        mine[row] = (word(p["answer"]), p["correct"], p.get("logprob"))
    return words, rows, answers


def fold(predictions, study):
    """The predictions as the page holds them, at a fiftieth of their size: (a dict, bytes).

    `words` holds every string once; word k is words[k - 1], and 0 is none. `facts` are columns, a word a fact: split,
    person, attribute, gold answer, then the question as what stands before the person's name and after it (0: the
    question does not name them). `said` holds, for each attribute, the words that any model answered.

    `columns` are the models, each after its base: its id; `odd`, the facts where being right is not the same as saying
    the gold text; `strange`, the log-probabilities that are no numbers, {fact: what else}; and `logprob`, whether any
    was measured. The bytes are, model by model, a whole number a fact for what it said (0: the same as its base; 1: the
    gold text; else 2 + its place in `said`), then one for its log-probability: the difference of its code (see STEP)
    from its base's. Seven bits a byte, the lowest first, the eighth bit set while more follow; the sign is the lowest.

    Raises ValueError as `by_fact` does, and when a model answers only some of the facts: the file was cut off.
    """
    base = {model["id"]: model.get("base") for model in study["models"]}
    words, rows, answers = by_fact(predictions, base)
    facts, said, columns, out, codes = list(rows), {}, [], bytearray(), {None: [0] * len(rows)}
    depth = {None: -1}
    for model in answers:
        chain = [model]
        while chain[-1] is not None:
            chain.append(base[chain[-1]])
        depth[model] = len(chain)
    for model in sorted(answers, key=depth.get):
        mine, before = answers[model], answers.get(base[model], {})
        if len(mine) != len(rows):
            raise ValueError(f"predictions: {model!r} answers {len(mine)} of {len(rows)} facts; was the file cut off?")
        column = {"id": model, "odd": [], "strange": {}, "logprob": any(x is not None for _, _, x in mine.values())}
        codes[model] = []
        for row, (_, _, attribute, gold, _, _) in enumerate(facts):
            answer, correct, logprob = mine[row]
            place = said.setdefault(attribute, {}).setdefault(answer, len(said[attribute]))
            as_base = row in before and before[row][0] == answer
            write_whole(out, 0 if as_base else 1 if answer == gold else 2 + place)
            if correct != (answer == gold):
                column["odd"].append(row)
            if column["logprob"] and number(logprob) is None:
                column["strange"][row] = logprob
            codes[model].append(code(number(logprob) or 0.0))
        if column["logprob"]:
            for mine_code, base_code in zip(codes[model], codes.get(base[model], codes[None])):
                moved = mine_code - base_code
                write_whole(out, 2 * abs(moved) - (moved < 0))
        columns.append(column)
    return {"words": list(words), "facts": [list(column) for column in zip(*rows)], "columns": columns,
            "said": {attribute: list(places) for attribute, places in said.items()}}, bytes(out)


def code(x):
    return int(math.copysign(round(STEP * math.log1p(abs(x))), x))


def write_whole(out, n):
    """Append a whole number, seven bits a byte, the lowest first."""
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)


# ---- into the page

def spoken(value, digits=5):
    """JSON has no NaN and no infinity; the page shows them as words, and draws nothing for them. Other floats keep five
    significant digits: more than any of our measurements has, at a third of the length."""
    if isinstance(value, float):
        if math.isnan(value):
            return "not a number"
        if math.isinf(value):
            return "infinite" if value > 0 else "minus infinite"
        return float(f"{value:.{digits}g}")
    if isinstance(value, list):
        return [spoken(item, digits) for item in value]
    if isinstance(value, dict):
        return {key: spoken(item, digits) for key, item in value.items()}
    return value


def embed(data):
    """Bytes, deflated, in letters; the browser inflates them by itself (its DecompressionStream reads what zlib
    writes). None of base64's 64 letters means anything to HTML, so whatever the names and answers hold, it can neither
    end the script nor be spoilt by an encoding."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def slim(model):
    """A model without what the page does not draw: each draw's numbers, similarity text by text, and more points of a
    pool than eyes tell apart."""
    model = {key: part for key, part in model.items() if key != "seeds"}
    if isinstance(model.get("similarity"), dict):
        model["similarity"] = {key: part for key, part in model["similarity"].items() if key != "texts"}
    if isinstance(model.get("idp"), dict) and isinstance(model["idp"].get("points"), list):
        points = model["idp"]["points"]
        kept = points[::1 + (len(points) - 1) // POINTS] if points else points
        model["idp"] = {**model["idp"], "points": spoken(kept, 4)}
    return model


def page(study, predictions):
    """The whole page as a string. Raises ValueError when the study or the predictions cannot be drawn."""
    check(study)
    facts, answers = fold(predictions, study)
    data = {"study": {**study, "models": [slim(model) for model in study["models"]]},
            "confirmed": {model["id"]: model.get("confirmed") for model in study["models"]}, "step": STEP, **facts}
    text = json.dumps(spoken(data), separators=(",", ":"), allow_nan=False)
    slots = {"TITLE": figure.escape(title(study)), "NAME": figure.escape(study.get("name") or ""),
             "HEADLINE": as_sentence(study.get("headline") or ""), "BEST": as_sentence(best_repair(study)),
             "LEAST": as_sentence(at_least(study)),
             "PICTURE": figure.picture(study) if repaired_bases(study) else "",
             "STUDY": embed(text.encode("ascii")), "ANSWERS": embed(answers),
             "CSS": read_text(PARTS["css"]), "JS": lean(read_text(PARTS["js"]))}
    return re.sub("@@([A-Z]+)@@", lambda slot: slots[slot[1]], read_text(PARTS["html"]))


def lean(code):
    """The code without lines of comment and without indents: a seventh shorter. The readable form is report.js."""
    return re.sub(r"^ *(//.*\n)?", "", code, flags=re.MULTILINE)


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
