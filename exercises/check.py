"""
Check the exercises: of each function right, where the first number differs, or not written yet. Seconds, one process.

    python exercises/check.py                         # all of exercises/fill.py
    python exercises/check.py rtn gptq                # two of them
    python exercises/check.py --file my.py            # of a copy
    python exercises/check.py --solutions             # of exercises/solutions.py: all are right

Exit status 0 where all that was asked for is right, 1 where something is wrong or missing, 2 for a file that does not
run.

Where the expected numbers come from: the examples in the text, which a hand can follow; tests/golden; complex numbers
(rotate); loops over single numbers (attention, mean_attention); torch's kl_div (distillation); whole numbers of Python
(pack4).
"""
import argparse
import cmath
import math
import os
import pathlib
import runpy
import sys
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.script import guard  # noqa: E402  before torch: Ctrl-C is one line

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from engine.files import read_json  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"


# ---- what is checked: each yields (what is tried, arguments, expected results, tolerance)

def rotate():
    """Turning is multiplication by exp(i angle) of a complex number."""
    one, cos, sin = tensor([[[[1., 2, 3, 4]]]]), tensor([[0., 1]]), tensor([[1., 0]])
    yield "the example", (one, cos, sin), tensor([[[[-3., 2, 1, 4]]]]), 1e-6
    x, angle = draw(0, 2, 3, 4, 6), draw(1, 4, 3)
    turned = [[[[complex(token[i], token[i + 3]) * cmath.exp(1j * angle[t, i].item()) for i in range(3)]
                for t, token in enumerate(head)] for head in row] for row in x.tolist()]
    turned = torch.tensor(turned, dtype=torch.complex128)
    yield "4 tokens, 3 pairs", (x, angle.cos(), angle.sin()), torch.cat([turned.real, turned.imag], -1), 1e-9


def attention():
    """A loop over every head, query and key."""
    q, k, v = (tensor(t).view(1, 1, 2, 1) for t in ([0, math.log(3)], [0., 1], [4., 8]))
    yield "the example", (q, k, v), tensor([4., 7]).view(1, 1, 2, 1), 1e-6
    for what, nh, nkv, T, S in (("as many heads as keys", 2, 2, 3, 3), ("4 query heads on 2 key heads", 4, 2, 3, 3),
                                ("the last 2 of 5 tokens", 2, 1, 2, 5)):
        q, k, v = draw(2, 2, nh, T, 4), draw(3, 2, nkv, S, 4), draw(4, 2, nkv, S, 4)
        yield what, (q, k, v), looped_attention(q, k, v), 1e-9


def cached_attention():
    """Token by token is what the loop gives at once."""
    empty = tensor([]).view(2, 1, 1, 0, 1)
    one, four = tensor([1.]).view(1, 1, 1, 1), tensor([4.]).view(1, 1, 1, 1)
    yield "the example, first token", (0 * one, 0 * one, four, empty), (four, tensor([0., 4]).view(2, 1, 1, 1, 1)), 1e-6
    past = tensor([0., 4]).view(2, 1, 1, 1, 1)
    yield ("the example, second token", (math.log(3) * one, one, 2 * four, past),
           (tensor([7.]).view(1, 1, 1, 1), tensor([0., 1, 4, 8]).view(2, 1, 1, 2, 1)), 1e-6)
    q, k, v = draw(2, 2, 4, 6, 4), draw(3, 2, 2, 6, 4), draw(4, 2, 2, 6, 4)
    whole = looped_attention(q, k, v)
    for at, T in ((3, 1), (4, 2)):
        cache = torch.stack([k[:, :, :at], v[:, :, :at]])
        new, longer = (t[:, :, at:at + T] for t in (q, k, v)), torch.stack([k, v])[:, :, :, :at + T]
        yield f"{T} new behind {at}", (*new, cache), (whole[:, :, at:at + T], longer), 1e-9


def looped_attention(q, k, v):
    """Causal attention by three loops: q (B, nh, T, hs), k and v (B, nkv, S, hs)."""
    (B, nh, T, hs), (nkv, S) = q.shape, k.shape[1:3]
    y = torch.zeros_like(q)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (B, nh, T))).tolist():
        g, last = h * nkv // nh, S - T + t
        weight = [math.exp(sum((q[b, h, t] * k[b, g, s]).tolist()) / math.sqrt(hs)) for s in range(last + 1)]
        for s, w in enumerate(weight):
            y[b, h, t] += w / sum(weight) * v[b, g, s]
    return y


def rtn():
    """tests/golden/compress.json."""
    yield "the example", (tensor([[-1., 0, 2, 0.5]]), 2, 4), tensors([[0, 1, 3, 1]], [[1.]], [[1]]), 1e-6
    yield "zeros", (tensor([[0, 0]]), 3, 2), tensors([[0, 0]], [[1.]], [[0]]), 1e-6
    for file, name, columns in (("compress", "plain", 22), ("compress_edges", "halves", 8)):
        case, W, _ = golden(file, "rtn", {"bits": 3}, name)
        yield f"{name}, 3 bits", (W, 3, columns), quantized(case), 1e-6
    W = tensor([[0, 1, 2, 3, -3, -2, 0, 0], [10, 20, 30, 0, 4, 5, 6, 4]])
    yield ("two groups, 2 bits", (W, 2, 4), tensors([[0, 1, 2, 3, 0, 1, 3, 3], [1, 2, 3, 0, 2, 2, 3, 2]],
                                                   [[1, 1], [10, 2]], [[0, 3], [0, 0]]), 1e-6)


def second_moments():
    """A sum over real tokens, one by one."""
    yield "the example", (tensor([[[1., 1], [1, 0], [9, 9]]]), torch.tensor([2])), tensor([[1, 0.5], [0.5, 0.5]]), 1e-6
    X, lengths = draw(5, 3, 4, 5), torch.tensor([4, 1, 2])
    H = [[sum((X[b, t, i] * X[b, t, j]).item() for b in range(3) for t in range(lengths[b])) / 7 for j in range(5)]
         for i in range(5)]
    yield "rows of 4, 1 and 2 tokens", (X, lengths), tensor(H), 1e-9


def output_error():
    """The mean of |D x|² over the tokens themselves."""
    H = tensor([[1, 0.9], [0.9, 1]])
    yield "the example, nearest", (tensor([[-0.4, -0.4]]), H), tensor(0.608), 1e-6
    yield "the example, (1, 0)", (tensor([[-0.4, 0.6]]), H), tensor(0.088), 1e-6
    D, X = draw(6, 3, 5), draw(7, 20, 5)
    squares = [sum(sum((D[o] * x).tolist()) ** 2 for o in range(3)) for x in X]
    yield "3 rows, 20 tokens", (D, sum(x[:, None] * x for x in X) / 20), tensor(sum(squares) / 20), 1e-9


def gptq():
    """tests/golden/compress.json."""
    H = torch.eye(4, dtype=torch.float64)
    H[2, 3] = H[3, 2] = 0.9
    yield "the example", (tensor([[0, 3, 1.4, 1.4]]), H, 2, 0.0), tensors([[0, 3, 1, 2]], [[1.]], [[0]]), 1e-6
    for name, settings in (("plain", {"bits": 3}), ("odd rows", {"bits": 3}), ("plain", {"bits": 8, "damp": 0.05})):
        case, W, H = golden("compress", "gptq", settings, name)
        given = W, H, settings["bits"], settings.get("damp", 0.01)
        yield f"{name}, {settings['bits']} bits", given, quantized(case), 1e-6


def keep_n_of_m():
    """tests/golden/compress.json and compress_edges.json: ties, a short last group."""
    keep = torch.tensor([[True, False, False, True, True]])
    yield "the example", (tensor([[5., 1, 1, 1, 2]]), 2, 4), keep, 0
    edges = "compress_edges"
    for file, n_m, name in (("compress", [2, 4], "plain"), (edges, [2, 5], "ties"), (edges, [1, 3], "ties")):
        case, W, _ = golden(file, "magnitude", {"n_m": n_m}, name)
        yield f"{name}, {n_m[0]}:{n_m[1]}", (W.abs(), *n_m), torch.tensor(case["keep"]).bool(), 0


def pack4():
    """Whole numbers of Python, read as hexadecimal digits."""
    example = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0], [1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    yield "the example", (example,), torch.tensor([[124076833], [-2023406815]], dtype=torch.int32), 0
    codes = torch.randint(16, (3, 24), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
    digits = ["".join(f"{c:x}" for c in reversed(row)) for row in codes.view(-1, 8).tolist()]
    words = [int.from_bytes(int(d, 16).to_bytes(4, "big"), "big", signed=True) for d in digits]
    yield "3 rows of 24 codes", (codes,), torch.tensor(words, dtype=torch.int32).view(3, 3), 0


def distillation():
    """torch's kl_div: over all tokens, and over k of them with the rest summed up."""
    log_p = tensor([[[0.5, 0.25]]]).log()
    yield "the example", (tensor([[[0, 0, 0]]]), log_p, torch.tensor([[[0, 1]]])), tensor([[0.0588915]]), 1e-6
    logits, teacher = 2 * draw(9, 2, 3, 7), (2 * draw(10, 2, 3, 7)).log_softmax(-1)
    for k in (7, 3):
        log_p, tokens = teacher.topk(k, dim=-1)
        log_q = logits.log_softmax(-1).gather(-1, tokens)
        if k < 7:  # the rest as one more token
            log_p, log_q = (torch.cat([t, (1 - t.exp().sum(-1, keepdim=True)).log()], -1) for t in (log_p, log_q))
        expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        yield f"the {k} likeliest of 7", (logits, teacher.topk(k, dim=-1).values, tokens), expected, 1e-6


def mean_attention():
    """A loop over every head, token and prompt."""
    q, k, keys = (tensor(t).view(-1, 1, 1, 1) for t in ([1.], [0.], [0, math.log(2)]))
    yield "the example", (q, k, keys, torch.tensor([1])), tensor([[0.25, 0.5]]), 1e-6
    q, k, keys, lengths = draw(11, 2, 2, 4, 3), draw(12, 2, 2, 4, 3), draw(13, 3, 2, 5, 3), torch.tensor([4, 2])
    (B, nh, _, hs), (M, P) = q.shape, (3, 5)
    expected = torch.zeros(B, M, dtype=torch.float64)
    for b, h in torch.cartesian_prod(torch.arange(B), torch.arange(nh)).tolist():
        for t in range(lengths[b]):
            side = [keys[m, h, i] for m in range(M) for i in range(P)] + [k[b, h, s] for s in range(t + 1)]
            weight = [math.exp(sum((q[b, h, t] * key).tolist()) / math.sqrt(hs)) for key in side]
            for m in range(M):
                expected[b, m] += sum(weight[m * P:m * P + P]) / sum(weight) / P / nh / lengths[b].item()
    yield "texts of 4 and 2 tokens, 3 prompts of 5", (q, k, keys, lengths), expected, 1e-9


def displaced():
    """tests/golden/stats.json: numpy's resamples and percentiles."""
    right, draws = tensor([[2., 0, 1], [2, 1, 2]]), torch.tensor([[0, 0], [1, 1]])
    yield "the example", (right, draws), tensor([2 / 3, 0.5125, 0.9875]), 1e-6
    case = read_json(GOLDEN / "stats.json")["bootstrap"]
    for repair in (2, 3):
        three = tensor(case["right"])[:, [0, 1, repair]]
        expected = tensor([case["displaced"][repair - 2], *case["displaced_intervals"][repair - 2]])
        yield f"12 people, repair {repair - 1}", (three, torch.tensor(case["draws"])), expected, 1e-9


CHECKS = {  # name: (sitting, minutes, checks)
    "rotate": (1, 10, rotate), "attention": (1, 25, attention), "cached_attention": (1, 10, cached_attention),
    "rtn": (2, 20, rtn), "second_moments": (2, 10, second_moments), "output_error": (2, 10, output_error),
    "gptq": (2, 30, gptq), "keep_n_of_m": (2, 20, keep_n_of_m), "pack4": (2, 15, pack4),
    "distillation": (3, 20, distillation), "mean_attention": (3, 30, mean_attention), "displaced": (4, 30, displaced)}


# ---- helpers of the checks

def tensor(values):
    """In float64, so that the order of sums does not matter."""
    return torch.tensor(values, dtype=torch.float64)


def tensors(*values):
    """A tuple of them."""
    return tuple(map(tensor, values))


def draw(seed, *shape):
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def golden(file, call, settings, name):
    """(result, W, H) of the golden case of this call, these settings and this problem."""
    data, wanted = read_json(GOLDEN / f"{file}.json"), (call, settings, name)
    case = next(c for c in data["cases"] if (c["call"], c["settings"], c["problem"]) == wanted)
    return case["result"], *(tensor(data["problems"][name][key]) for key in "WH")


def quantized(result):
    """(codes, scale, zero) of a golden result."""
    return tensors(result["codes"], result["scale"], result["zero"])


# ---- the verdict

def judge(function, checks):
    """What is to be said of one function: "right (n checks)", "not written yet", or what is wrong first."""
    n = 0
    for n, (what, arguments, expected, tolerance) in enumerate(checks(), 1):
        given = [a.clone() if torch.is_tensor(a) else a for a in arguments]
        try:
            got = function(*given)
            wrong = differs(got, expected, tolerance)
        except NotImplementedError as error:
            missing = traceback.extract_tb(error.__traceback__)[-1].name
            return "not written yet" if missing == function.__name__ else f"needs {missing}, which is not written yet"
        except (Exception, SystemExit) as error:  # whatever a student's code raises is a verdict on it
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            said = traceback.format_exception_only(error)[0].partition("\n")[0]
            return f"wrong, {what}: stops in line {line} with {said}"
        if wrong:
            return f"wrong, {what}: {wrong}"
        for i, (before, after) in enumerate(zip(arguments, given)):
            if torch.is_tensor(before) and not torch.equal(before, after):
                return f"wrong, {what}: argument {i} was changed"
    return f"right ({n} checks)"


def differs(got, expected, tolerance, name="result"):
    """Where `got` first differs from `expected`, a tensor or a tuple of them, in words; "" where it does not."""
    if isinstance(expected, tuple):
        if not isinstance(got, tuple) or len(got) != len(expected):
            count = len(got) if isinstance(got, tuple) else type(got).__name__
            return f"{name} must be {len(expected)} tensors, got {count}"
        parts = (differs(g, e, tolerance, f"{name} {i}") for i, (g, e) in enumerate(zip(got, expected)))
        return next(filter(None, parts), "")
    if isinstance(got, (int, float)) and expected.dim() == 0:
        got = tensor(got)
    if not torch.is_tensor(got):
        return f"{name} must be a tensor, got {type(got).__name__}"
    if got.shape != expected.shape:
        return f"{name} must have shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if not expected.is_floating_point() and got.dtype != expected.dtype:
        return f"{name} must be of {expected.dtype}, got {got.dtype}"
    near = torch.isclose(got.double(), expected.double(), rtol=tolerance, atol=tolerance)
    if near.all():
        return ""
    at = (~near).nonzero()[0].tolist()
    there = f"{name}[{', '.join(map(str, at))}]" if at else name
    more = f" ({int((~near).sum())} of {near.numel()} differ)" if at else ""
    if torch.isclose(got.double(), expected.double(), rtol=1e-5, atol=1e-6).all():
        more += ": right but for rounding, compute in float64"
    return f"{there} is {got[tuple(at)].item():.12g}, expected {expected[tuple(at)].item():.12g}{more}"


def main():
    """The script: see the top of this file."""
    parser = argparse.ArgumentParser(prog="check.py", description="Check the exercises of the course.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"functions to check, of {', '.join(CHECKS)}; none: all")
    parser.add_argument("--file", default=str(ROOT / "exercises" / "fill.py"), help="where the functions are")
    parser.add_argument("--solutions", action="store_true", help="check exercises/solutions.py instead")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CHECKS]
    if unknown:
        raise ValueError(f"no exercise {unknown[0]!r}; there are {', '.join(CHECKS)}")
    torch.set_num_threads(1)
    path = ROOT / "exercises" / "solutions.py" if args.solutions else args.file
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not a file of functions")
    try:
        functions = runpy.run_path(str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}: line {error.lineno or 1}: {error.msg}") from None
    except OSError:
        raise
    except (Exception, SystemExit) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ValueError(f"{path}: line {line}: {traceback.format_exception_only(error)[0].strip()}") from None
    right = []
    for i, (name, (sitting, minutes, checks)) in enumerate(CHECKS.items(), 1):
        if args.names and name not in args.names:
            continue
        verdict = judge(functions[name], checks) if callable(functions.get(name)) else "not written yet"
        print(f"sitting {sitting}  {i:2d} {name:17s} {minutes:3d} min   {verdict}")
        right.append(verdict.startswith("right"))
    print(f"{sum(right)} of {len(right)} right")
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    guard(main)
