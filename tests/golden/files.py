"""
What the makers of the golden files share: short numbers, the comparison, one case a line.

A file holds {"cases": [{"name", ..., "given": {...}, "result": {...}}, ...]} and other inputs. A maker draws what is
given, and asks the code of the day for the result; the tests ask it again, of what the file holds.
"""
import json
import math
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]


# ---- the inputs

def short(t, digits=6):
    """The tensor, each number rounded to so many digits: short in the file, and exact."""
    return torch.tensor([float(f"{x:.{digits}g}") for x in t.flatten().tolist()], dtype=torch.float64).view(t.shape)


def draw(seed, *shape):
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(seed, below, *shape):
    """Whole numbers 0 .. below - 1, token ids say."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def numbers(t, digits=8):
    """A tensor as nested lists; floats in so many digits."""
    if isinstance(t, dict):
        return {key: numbers(value, digits) for key, value in t.items()}
    if isinstance(t, (list, tuple)):
        return [numbers(x, digits) for x in t]
    if isinstance(t, torch.Tensor):
        return numbers(t.tolist(), digits)
    if t is None or isinstance(t, str):
        return t
    return float(f"{t:.{digits}g}") if isinstance(t, float) else int(t)


def floats(values):
    """Nested lists as a tensor in float64, and each list in a dict."""
    if isinstance(values, dict):
        return {key: floats(value) for key, value in values.items()}
    return torch.tensor(values, dtype=torch.float64)


# ---- comparing

def same(got, expected, rel=1e-6, abs_=1e-7):
    """Whether two results agree: whole numbers exactly, others to `rel` relative and `abs_` absolute."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[k], expected[k], rel, abs_) for k in expected)
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return False
        return all(same(a, b, rel, abs_) for a, b in zip(got, expected))
    if isinstance(expected, float):
        return isinstance(got, (int, float)) and math.isclose(got, expected, rel_tol=rel, abs_tol=abs_)
    return got == expected


def check(what, make, expected, **tolerance):
    """[what] if `make()` is not as expected."""
    try:
        return [] if same(make(), expected, **tolerance) else [what]
    except Exception as error:  # whatever a changed code may raise
        return [f"{what}: {type(error).__name__}"]


def differing(result, file, **tolerance):
    """The names of the cases whose `result(case)` is not the one that the file holds; one that raises counts, too."""
    return [what for case in file["cases"]
            for what in check(case["name"], lambda: result(case), case["result"], **tolerance)]


# ---- the files

def packed(content):
    """JSON without spaces."""
    return json.dumps(content, separators=(",", ":"))


def read(name):
    """The content of a golden file."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def write(name, cases, result, **inputs):
    """Write a golden file, an input and a case a line: cases [{"name", ..., "given"}], result(case) what comes out."""
    from engine.files import write_text
    lines = [packed({**case, "result": result(case)}) for case in cases]
    parts = [f"{packed(key)}: {{\n" + ",\n".join(f"{packed(k)}: {packed(v)}" for k, v in value.items()) + "\n}"
             for key, value in inputs.items()]
    write_text(HERE / name, "{" + ",\n".join([*parts, '"cases": [\n' + ",\n".join(lines) + "\n]"]) + "}\n")
    print(f"{name}: {len(lines)} cases, {(HERE / name).stat().st_size:,} bytes")
