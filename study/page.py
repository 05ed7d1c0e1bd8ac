"""One page to see what compression did: out/results.json and out/predictions.jsonl into out/report.html.

The page is one file. It opens from the disk, can be mailed, and asks the network for nothing: the study's numbers, the
styles and the drawing code are all inside it. This file checks the numbers and puts them in; how they are drawn is
report_template.html, plain JavaScript and SVG, written to be read.

The layout of results.json is Compress and Compare's (Boggust et al., VIS 2024, arXiv 2408.03274): `operations`,
`metrics`, and `models` with `id`, `base`, `operation` and `metrics`. STUDY below is that layout and what we add to it:
intervals, verdicts, and what was seen inside the layers.

Left out on purpose: any computation. A number the page shows was measured by the study, or is a count or a difference
of such numbers; a number that was not measured is said to be missing, never filled in.

    python -m study page                         # out/results.json -> out/report.html
    python -m study page --results elsewhere/results.json --out page.html
"""
import argparse
import base64
import json
import math
import zlib
from pathlib import Path

from engine.script import write_text

TEMPLATE = Path(__file__).with_name("report.html")
SLOT = "@@STUDY@@"                            # where the template wants the data


RESULTS, PAGE = "out/results.json", "out/report.html"


# ---------------------------------------------------------------------------------------------------------------------
# The layout, as data. A key ending in "?" may be missing or null; [x] is a list of x; {str: x} has any keys.
# Keys not named here are let through: the page ignores them.

NUMBER = (int, float)                         # NaN and the infinities are numbers here; True and False are not
PARAMETERS = (dict, list)                     # of an operation: ranges by name, or (in older files) names only
WORDS = {NUMBER: "a number", PARAMETERS: "an object or a list", dict: "an object", list: "a list", str: "a string",
         int: "a whole number", bool: "true or false"}

LAYER = {"name": str, "shape?": [int], "bits?": NUMBER, "sparsity?": NUMBER, "zeros?": NUMBER, "damp?": NUMBER,
         "weight_change?": NUMBER, "error_before?": NUMBER, "error_after?": NUMBER, "relative_output_error?": NUMBER,
         "histogram?": {"edges": [NUMBER], "counts": [NUMBER]}}
MODEL = {"id": str, "tag?": str, "base?": str, "operation?": {"name": str, "parameters?": dict},
         "metrics": {str: NUMBER}, "intervals?": {str: [NUMBER]}, "verdict?": str, "layers?": [LAYER],
         "similarity?": {"attention?": [[NUMBER]], "output?": [NUMBER]},
         "idp?": {"chosen?": [NUMBER], "by_attribute?": {str: [NUMBER]},
                  "correlation?": {"rho": NUMBER, "interval?": [NUMBER]}, "points?": [[NUMBER]],
                  "selectors?": [{"name": str, "recall": NUMBER, "interval?": [NUMBER], "over_rule?": [NUMBER],
                                  "extra_passes?": NUMBER}]}}
OPERATION = {"name": str, "parameters?": PARAMETERS, "description?": str, "kind?": str}      # "compress" or "repair"
METRIC = {"name": str, "label?": str, "unit?": str, "higher_is_better?": bool, "description?": str}
STUDY = {"name?": str, "hypothesis?": str, "command?": str, "created?": str, "seconds?": NUMBER, "seed?": int,
         "settings?": dict, "versions?": dict, "times?": [{"step": str, "seconds": NUMBER, "reused?": bool}],
         "operations": [OPERATION], "metrics": [METRIC], "models": [MODEL], "verdicts?": [{"base": str, "text": str}],
         "context?": {"alone": NUMBER, "behind_24_tokens": NUMBER}}

PREDICTION = {"model": str, "split": str, "person": str, "attribute": str, "question": str, "gold": str, "answer": str,
              "correct": bool, "logprob?": NUMBER}


def match(value, shape, where: str) -> None:
    """Raise ValueError, naming the place, unless `value` has the shape. A null inside a list or a map is a number that
    was not measured, and passes."""
    if isinstance(shape, list):
        match(value, list, where)
        for i, item in enumerate(value):
            if item is not None or isinstance(shape[0], (list, dict)):
                match(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, dict) and str in shape:
        match(value, dict, where)
        for key, item in value.items():
            if item is not None:
                match(item, shape[str], f"{where}.{key}")
    elif isinstance(shape, dict):
        match(value, dict, where)
        for key, inner in shape.items():
            name = key.rstrip("?")
            if value.get(name) is not None:
                match(value[name], inner, f"{where}.{name}")
            elif not key.endswith("?"):
                raise ValueError(f"{where} has no {name!r}")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        raise ValueError(f"{where} must be {WORDS[shape]}, got {str(value)[:40]!r}")


def check_study(study) -> None:
    """Raise ValueError unless the study has the layout above and its parts fit each other: names are unique, every name
    that is used exists, and following `base` from any model ends at a model without one."""
    match(study, STUDY, "results")
    known = {}
    for part, key in (("operations", "name"), ("metrics", "name"), ("models", "id")):
        names = [entry[key] for entry in study[part]]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{part} lists {min(twice)!r} twice")
        known[part] = set(names)
    if not known["models"]:
        raise ValueError("models is empty: there is nothing to show")

    for model in study["models"]:
        check_model(model, known)
    base = {model["id"]: model.get("base") for model in study["models"]}
    for model in base:
        walked = [model]
        while base[walked[-1]] is not None:
            walked.append(base[walked[-1]])
            if walked[-1] in walked[:-1]:
                raise ValueError(f"models go in a circle: {' <- '.join(walked)}")
    for operation in study["operations"]:
        if operation.get("kind") not in (None, "compress", "repair"):
            raise ValueError(f"operation {operation['name']!r} must compress or repair, got {operation['kind']!r}")
    for verdict in study.get("verdicts") or []:
        if verdict["base"] not in known["models"]:
            raise ValueError(f"a verdict is about {verdict['base']!r}, which is not among the models")


def check_model(model: dict, known: dict[str, set]) -> None:
    """Raise ValueError unless what one model names exists and what belongs together has the same length."""
    me = f"model {model['id']!r}"
    if model.get("base") is not None and model["base"] not in known["models"]:
        raise ValueError(f"{me} has the base {model['base']!r}, which is not among the models")
    for name in (*model["metrics"], *(model.get("intervals") or {})):
        if name not in known["metrics"]:
            raise ValueError(f"{me} has {name!r}, which is not among the metrics")
    for name, interval in (model.get("intervals") or {}).items():
        if interval is not None and len(interval) != 2:
            raise ValueError(f"{me}: the interval of {name!r} must be [low, high], got {len(interval)} numbers")
    for layer in model.get("layers") or []:
        histogram = layer.get("histogram")
        if histogram and len(histogram["edges"]) != len(histogram["counts"]) + 1:
            raise ValueError(f"{me}, layer {layer['name']!r}: {len(histogram['edges'])} histogram edges do not fit "
                             f"{len(histogram['counts'])} counts")
    idp = model.get("idp") or {}
    for attribute, counts in (idp.get("by_attribute") or {}).items():
        if len(counts or []) != len(idp.get("chosen") or []):
            raise ValueError(f"{me}: {attribute!r} counts {len(counts or [])} prompts, but the pool has "
                             f"{len(idp.get('chosen') or [])}")
    if any(len(point) != 2 for point in idp.get("points") or []):
        raise ValueError(f"{me}: every point of idp must be [attention score, gain]")


# ---------------------------------------------------------------------------------------------------------------------
# Answers: one line a model and fact in the file; in the page one row a fact, one column a model, each string once


def fold(predictions: list[dict], ids: set[str]) -> dict:
    """The predictions as the page holds them, at a twentieth of their size.

    `words` holds every string once; word k is words[k - 1], and 0 is none. `facts` are columns, a word a fact: split,
    person, attribute, gold answer, then the question as what stands before the person's name and after it (0: the
    question does not name them). `answers`, for each model: `said`, a word a fact (0: the gold answer's own text);
    `odd`, the facts where being right is not the same as saying that text; `logprob`, in hundredths of a nat.
    Raises ValueError when a model answers a fact twice, or answers only some of the facts: the file was cut off.
    """
    words, rows, answers = {}, {}, {}

    def word(string):
        return words.setdefault(string, len(words) + 1)

    for p in predictions:
        if p["model"] not in ids:
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

    columns = {}
    for model, mine in answers.items():
        if len(mine) != len(rows):
            raise ValueError(f"predictions: {model!r} answers {len(mine)} of {len(rows)} facts; was the file cut off?")
        said, odd, logprob = zip(*(mine[row] for row in range(len(rows))))
        columns[model] = {"said": list(said), "odd": [row for row, is_odd in enumerate(odd) if is_odd],
                          "logprob": list(logprob)}
    return {"words": list(words), "facts": [list(column) for column in zip(*rows)], "answers": columns}


def hundredths(x):
    return round(100 * x) if x is not None and math.isfinite(x) else x


# ---------------------------------------------------------------------------------------------------------------------
# Into the page


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


def embed(data) -> str:
    """The data as JSON, deflated, in letters: a third of its length, and the browser inflates it by itself (its
    DecompressionStream reads what zlib writes). None of base64's 64 letters means anything to HTML, so whatever the
    names and answers hold, it can neither end the script nor be spoilt by an encoding."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def page(study: dict, predictions: list[dict], template: str) -> str:
    """The whole page as a string. Raises ValueError when the study or the predictions are not what STUDY and PREDICTION
    say."""
    check_study(study)
    data = spoken({"study": study} | fold(predictions, {model["id"] for model in study["models"]}))
    before, after = template.split(SLOT)
    return before + embed(data) + after


def read_json(text: str, where: str):
    """json.loads with an error that names the place in one line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not complete JSON: {error}") from None


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def write_report(results: str | Path = RESULTS, out: str | Path = PAGE) -> Path:
    """Reads results and the predictions.jsonl beside it, writes the page, returns its path."""
    results, out = Path(results), Path(out)
    study = read_json(read(results), str(results))
    beside = results.with_name("predictions.jsonl")
    predictions = []
    for number, line in enumerate(read(beside).split("\n"), 1):         # not splitlines: an answer may hold U+2028
        if line.strip():
            predictions.append(read_json(line, f"{beside} line {number}"))
            match(predictions[-1], PREDICTION, f"{beside} line {number}")
    text = page(study, predictions, read(TEMPLATE))
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
