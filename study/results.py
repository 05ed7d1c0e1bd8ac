"""
Reading results.json and predictions.jsonl: what may be wrong in a file that was edited by hand is one clear line.

The layout of results.json is Compress and Compare's (Boggust et al., VIS 2024, arXiv 2408.03274): `operations`,
`metrics`, and `models` with `id`, `base`, `operation` and `metrics`. Everything that the study adds is optional:
intervals, verdicts, comparisons, claims, sweeps, layers. Here names, bases and numbers are checked, because every
picture rests on them; a malformed optional part spoils one view of the page, which then says so.

What it leaves out: any computation of a result.
"""
import json
import os
from pathlib import Path

NUMBER = (int, float)  # NaN and the infinities are numbers here; True and False are not
WORDS = {NUMBER: "a number", dict: "an object", list: "a list", str: "a string", bool: "true or false"}
PREDICTION = {"model": str, "split": str, "person": str, "attribute": str, "question": str, "gold": str, "answer": str,
              "correct": bool}


def read_results(path):
    """The study in a results.json, checked. Raises OSError or a ValueError of one line."""
    study = parsed(read_text(path), path)
    try:
        check(study)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return study


def read_predictions(path):
    """The rows of a predictions.jsonl, each checked."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: an answer may hold U+2028
        if line.strip():
            row = parsed(line, f"{path} line {number}")
            for key, kind in PREDICTION.items():
                field(row, key, kind, f"{path} line {number}")
            field(row, "logprob", NUMBER, f"{path} line {number}", optional=True)
            rows.append(row)
    return rows


def keep_apart(out, *read):
    """Raise ValueError where `out` is one of the files that are read."""
    for path in read:
        if os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
            raise ValueError(f"--out is {path}, which is read: name another file")


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def parsed(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not complete JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None


def field(entry, key, kind, where, optional=False):
    """entry[key], which must be of the kind; None where it may be missing and is. `where` names the entry."""
    must_be(entry, dict, where)
    value = entry.get(key)
    if value is not None:
        return must_be(value, kind, f"{where}, {key!r}")
    if not optional:
        raise ValueError(f"{where} has no {key!r}")


def must_be(value, kind, where):
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise ValueError(f"{where} must be {WORDS[kind]}, got {str(value)[:40]!r}")
    return value


def check(study):
    """Raise ValueError unless every name is unique, every name that is used exists, every measurement is a number, and
    following `base` from any model ends at a model without one.
    """
    known = {}
    for part, key in (("operations", "name"), ("metrics", "name"), ("models", "id")):
        names = [field(entry, key, str, f"{part}[{i}]") for i, entry in enumerate(field(study, part, list, "results"))]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{part} lists {min(twice)!r} twice")
        known[part] = set(names)
    if not known["models"]:
        raise ValueError("models is empty: there is nothing to show")
    for key in ("name", "headline"):
        field(study, key, str, "results", optional=True)
    for i, row in enumerate(field(study, "comparisons", list, "results", optional=True) or []):
        must_be(row, dict, f"comparisons[{i}]")
    for operation in study["operations"]:
        if operation.get("kind") not in (None, "compress", "repair"):
            raise ValueError(f"operation {operation['name']!r} must compress or repair, got {operation['kind']!r}")
    for model in study["models"]:
        check_model(model, known)
    base = {model["id"]: model.get("base") for model in study["models"]}
    for start in base:
        walked = [start]
        while base[walked[-1]] is not None:
            walked.append(base[walked[-1]])
            if walked[-1] in walked[:-1]:
                raise ValueError(f"models go in a circle: {' <- '.join(walked)}")


def check_model(model, known):
    """Raise ValueError unless one model's base, operation, measurements and intervals can be drawn."""
    me = f"model {model['id']!r}"
    base = field(model, "base", str, me, optional=True)
    if base is not None and base not in known["models"]:
        raise ValueError(f"{me} has the base {base!r}, which is not among the models")
    operation = field(model, "operation", dict, me, optional=True)
    if operation is not None:
        field(operation, "name", str, f"{me}, operation")
    for key in ("tag", "kind"):
        field(model, key, str, me, optional=True)
    measured = field(model, "metrics", dict, me)
    intervals = field(model, "intervals", dict, me, optional=True) or {}
    for name in (*measured, *intervals):
        if name not in known["metrics"]:
            raise ValueError(f"{me} has {name!r}, which is not among the metrics")
    for name in measured:
        field(measured, name, NUMBER, f"{me}, metrics", optional=True)
    for name in intervals:
        ends = field(intervals, name, list, f"{me}, intervals", optional=True)
        if ends is not None and len(ends) != 2:
            raise ValueError(f"{me}: the interval of {name!r} must be [low, high], got {len(ends)} numbers")


# ---- what a study says about one of its models

def number(value):
    """The value if it can be drawn: a finite number; else None."""
    drawable = isinstance(value, NUMBER) and not isinstance(value, bool) and abs(value) < float("inf")
    return value if drawable else None


def estimate(model, metric):
    """(value, low, high) of one metric of one model, or None where the value or its interval was not measured: the
    study gives no interval where compression took too little to divide by.
    """
    ends = (model.get("intervals") or {}).get(metric) or [None, None]
    found = [number(x) for x in (model["metrics"].get(metric), *ends)]
    return None if None in found else tuple(found)


def repaired_bases(study):
    """[(a model that was repaired, [its repairs that have the metric "displaced"])], controls first."""
    groups = {m["id"]: (m, []) for m in study["models"]}
    for m in study["models"]:
        if m.get("base") in groups and "displaced" in m["metrics"]:
            groups[m["base"]][1].append(m)
    return sorted((g for g in groups.values() if g[1]), key=lambda g: not is_control(g[0]))


def is_control(model):
    return model.get("kind") == "control"
