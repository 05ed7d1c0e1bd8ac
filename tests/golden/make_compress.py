"""
Writes compress.json, compress_edges.json and calibrate.json: inputs, settings and results of everything in compress.py,
to check a port against. README.md beside this file says how.

    python tests/golden/make_compress.py
"""
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from golden import files  # noqa: E402
from golden.files import check, draw, numbers, packed, short  # noqa: E402

CASES = [  # call, settings, problem
    ("rtn", dict(bits=3), "plain"),
    ("rtn", dict(bits=2, group_size=8, symmetric=True), "plain"),
    ("rtn", dict(bits=4, group_size=5), "odd rows"),
    ("gptq", dict(bits=3), "plain"),
    ("gptq", dict(bits=4, group_size=8, symmetric=True), "plain"),
    ("gptq", dict(bits=2, group_size=6, block_size=4), "plain"),
    ("gptq", dict(bits=3, group_size=8, act_order=True), "plain"),
    ("gptq", dict(bits=8, damp=0.05), "plain"),
    ("gptq", dict(bits=3, group_size=8, search=True), "plain"),
    ("gptq", dict(bits=2, search=True), "plain"),
    ("gptq", dict(bits=3, refit=True), "plain"),
    ("gptq", dict(bits=4, group_size=8, act_order=True, refit=True), "plain"),
    ("gptq", dict(bits=3), "odd rows"),
    ("magnitude", dict(sparsity=0.5), "plain"),
    ("magnitude", dict(n_m=[2, 4]), "plain"),
    ("wanda", dict(sparsity=0.4), "plain"),
    ("wanda", dict(n_m=[4, 8]), "dead input"),
    ("sparsegpt", dict(sparsity=0.5), "plain"),
    ("sparsegpt", dict(sparsity=0.7, block_size=8), "plain"),
    ("sparsegpt", dict(n_m=[2, 4]), "plain"),
    ("sparsegpt", dict(sparsity=0.5, refit=True), "plain"),
    ("sparsegpt", dict(n_m=[1, 3], bits=4, group_size=6), "plain"),
    ("sparsegpt", dict(sparsity=0.5, bits=3, damp=0.1), "plain"),
]
EDGES = [
    ("factor", dict(), "odd rows"), ("factor", dict(damp=0.2, act_order=True), "odd rows"),
    ("factor", dict(damp=0.0), "few tokens"), ("factor", dict(damp=0.0), "rank 11 of 12"),
    ("factor", dict(damp=0.0), "dead input"), ("factor", dict(), "dead input"), ("factor", dict(), "quiet input"),
    ("factor", dict(act_order=True), "tied diagonal"),
    ("rtn", dict(bits=3), "halves"), ("rtn", dict(bits=3, symmetric=True), "halves"), ("rtn", dict(bits=2), "thirds"),
    ("rtn", dict(bits=8, group_size=100), "tiny rows"), ("rtn", dict(bits=3, symmetric=True), "odd rows"),
    ("gptq", dict(bits=3, damp=0.0), "halves"), ("gptq", dict(bits=2, damp=0.0), "thirds"),
    ("gptq", dict(bits=3, damp=0.0), "few tokens"), ("gptq", dict(bits=4, damp=0.0), "rank 11 of 12"),
    ("gptq", dict(bits=3, damp=0.1), "dead input"), ("gptq", dict(bits=3, damp=0.0, act_order=True), "dead input"),
    ("gptq", dict(bits=3, group_size=4), "quiet input"),
    ("gptq", dict(bits=3, group_size=3, act_order=True), "tied diagonal"),
    ("gptq", dict(bits=3, mask=True), "masked"),
    ("gptq", dict(bits=3, group_size=5, act_order=True, mask=True), "masked"),
    ("gptq", dict(bits=2, group_size=5, block_size=7, mask=True, search=True), "masked"),
    ("gptq", dict(bits=4, group_size=5, mask=True, refit=True), "masked"),
    ("gptq", dict(bits=3, group_size=6, act_order=True, mask=True, refit=True), "masked"),
    ("gptq", dict(bits=3, damp=0.0, refit=True), "few tokens"), ("gptq", dict(bits=3, refit=True), "dead input"),
    ("gptq", dict(bits=3, group_size=4, refit=True), "zero group"),
    ("gptq", dict(bits=8, group_size=4, refit=True), "odd rows"),
    ("gptq", dict(bits=3, search=True, act_order=True, group_size=16), "search"),
    ("gptq", dict(bits=2, search=True), "search"),
    ("gptq", dict(bits=4, group_size=11, search=True, refit=True), "search"),
    ("gptq", dict(bits=3, search=True), "bumpy"),
    ("magnitude", dict(sparsity=0.4), "ties"), ("magnitude", dict(sparsity=0.0), "ties"),
    ("magnitude", dict(sparsity=1.0), "ties"),
    ("magnitude", dict(n_m=[2, 5]), "ties"), ("magnitude", dict(n_m=[1, 3]), "ties"),
    ("wanda", dict(sparsity=0.45), "ties"), ("wanda", dict(n_m=[1, 4]), "dead pair"),
    ("wanda", dict(sparsity=0.3), "dead pair"),
    ("sparsegpt", dict(sparsity=0.45, damp=0.0), "ties"), ("sparsegpt", dict(n_m=[2, 4], damp=0.0), "ties"),
    ("sparsegpt", dict(sparsity=0.5, damp=0.0), "dead input"), ("sparsegpt", dict(sparsity=0.5, bits=3), "dead input"),
    ("sparsegpt", dict(sparsity=0.0), "masked"), ("sparsegpt", dict(sparsity=1.0), "masked"),
    ("sparsegpt", dict(sparsity=0.5, mask=True), "masked"),
    ("sparsegpt", dict(sparsity=0.1, mask=True, block_size=6), "masked"),
    ("sparsegpt", dict(n_m=[2, 4], mask=True, bits=3, group_size=8), "masked"),
    ("sparsegpt", dict(n_m=[1, 3], block_size=4), "masked"), ("sparsegpt", dict(n_m=[3, 3]), "dead input"),
    ("sparsegpt", dict(n_m=[2, 4], refit=True), "zero group"),
    ("sparsegpt", dict(sparsity=0.6, bits=2, refit=True), "masked"),
    ("sparsegpt", dict(sparsity=0.6, bits=3, group_size=9, block_size=6), "masked"),
]
WALKS = [  # method, settings: each on the dense model; the last on the result of "magnitude", whose zeros stay
    ("gptq", dict(bits=3, group_size=4)), ("sparsegpt", dict(n_m=[2, 4], bits=4)), ("magnitude", dict(sparsity=0.5)),
    ("wanda", dict(sparsity=0.25, bits=3)), ("rtn", dict(bits=2, targets=["mlp.down", "blocks.0.attn.q"])),
    ("gptq", dict(bits=4, damp=0.1, act_order=True)),
]
MODEL = dict(vocab_size=11, context=10, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, n_hidden=12, activation="swiglu")


# ---- the inputs

def second_moment(X):
    return short(X.T @ X / len(X), 7)


def inputs(seed, tokens, n):
    """Correlated inputs, some louder than others."""
    mix = draw(seed, n, n) / n**0.5 + 0.3 * torch.eye(n, dtype=torch.float64)
    return draw(seed + 1, tokens, n) @ mix * torch.linspace(0.3, 1.5, n, dtype=torch.float64)


def problems():
    """{name: {"W": (out, in), "H": (in, in)}} for compress.json."""
    X = inputs(0, 60, 22)
    dead = X[:, :16].clone()
    dead[:, 5] = 0
    odd = torch.stack([draw(2, 12).abs(), -draw(3, 12).abs(), torch.zeros(12, dtype=torch.float64),
                       torch.full((12,), 0.3, dtype=torch.float64)])  # all positive, all negative, all zero, constant
    return {"plain": {"W": short(draw(4, 7, 22)), "H": second_moment(X)},
            "odd rows": {"W": short(odd), "H": second_moment(X[:, :12])},
            "dead input": {"W": short(draw(5, 6, 16)), "H": second_moment(dead)}}


def edges():
    """The same for compress_edges.json, whose cases are about the problems of compress.json, too."""
    X = inputs(10, 60, 18)
    eye = torch.eye(8, dtype=torch.float64)
    # grids of steps of 1, weights halfway between their values, zero-points too (row 2 and 3)
    halves = torch.tensor([[-2, 5, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5], [-3.5, 3.5, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5],
                           [-1.5, 5.5, 1, 2, 0.25, 3, 4, -1], [-2.5, 4.5, 1, 2, 0.25, 3, 4, -1],
                           [-3, 4, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], dtype=torch.float64)
    # halves, but for the rounding of float32
    thirds = torch.tensor([[0, 1, 0.5, 0.5, 1 / 6, 5 / 6, 0.2, 0.4], [0, 7, 3.5, 3.5, 7 / 6, 35 / 6, 1, 2],
                           [0, 0.1, 0.05, 0.05, 0.1 / 6, 0.5 / 6, 0.02, 0.04]], dtype=torch.float64)
    zeros = torch.zeros(8, dtype=torch.float64)
    tiny = torch.stack([draw(11, 8) * 1e-42, draw(12, 8) * 1e-36, zeros, draw(13, 8) * 1e30])
    ties = torch.tensor([[1, -1, 1, 1, -1, 1, 1, 1, 1, -1], [2, 1, -2, 1, 1, 2, 1, -1, 2, 1],
                         [1, 1, 1, 1, 1, 3, 1, 1, 1, 1]], dtype=torch.float64)
    pair = inputs(14, 40, 10)
    pair[:, 8:] = 0  # of N:M's last, shorter group both inputs are dead
    quiet = pair[:, :8] * torch.tensor([1, 1, 1e-23, 1, 1, 1, 1, 1], dtype=torch.float64)
    rank = inputs(18, 11, 12)  # fewer rows than columns, and yet a Cholesky factorization does not fail: rounding error
    group = draw(17, 5, 12)
    group[:, 4:8] = 0  # a group of zeros,
    group[1] = 0       # a row of zeros,
    group[2] *= 1e-3   # and a small one
    tied = torch.eye(9, dtype=torch.float64) + 0.3 * (inputs(18, 50, 9).T @ inputs(18, 50, 9) / 50).sign()
    tied = tied @ tied.T
    tied = tied / tied.diagonal().sqrt() / tied.diagonal().sqrt()[:, None] * torch.tensor([2, 1, 1, 2, 1, 1, 2, 1, 1.0])
    tied = (tied + tied.T) / 2
    tied.diagonal().copy_(torch.tensor([2, 1, 1, 2, 1, 1, 2, 1, 1.0]))
    heavy = draw(20, 16, 22) ** 3  # a few weights far from the others: what a narrower grid gains on
    bumpy = bumpy_row()
    mask = draw(21, 6, 18).abs() > 0.5
    return {
        "few tokens": {"W": short(draw(22, 5, 12)), "H": second_moment(X[:4, :12])},
        "rank 11 of 12": {"W": short(draw(23, 5, 12)), "H": rank.T @ rank / 11},  # all digits: not of full rank
        "quiet input": {"W": short(draw(24, 4, 8)), "H": (quiet.T @ quiet / 40).float().double()},  # 1e-46: 0
        "tied diagonal": {"W": short(draw(25, 4, 9)), "H": short(tied, 7)},
        "halves": {"W": halves, "H": eye}, "thirds": {"W": thirds, "H": eye}, "tiny rows": {"W": short(tiny), "H": eye},
        "ties": {"W": ties, "H": torch.eye(10, dtype=torch.float64)},
        "dead pair": {"W": short(draw(26, 4, 10)), "H": second_moment(pair)},
        "masked": {"W": short(draw(27, 6, 18)), "H": second_moment(X), "mask": mask},
        "zero group": {"W": short(group), "H": second_moment(X[:, :12])},
        "search": {"W": short(heavy), "H": second_moment(inputs(28, 70, 22))},
        "bumpy": {"W": bumpy, "H": eye}}


def bumpy_row():
    """(1, 8): 0.95 of its 3-bit grid loses more than the whole, 0.9 or less would lose less: a search ends before."""
    for seed in range(1000):
        row = short(draw(1000 + seed, 1, 8))
        costs = []
        for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
            low, high = float(row.min().clamp(max=0)), float(row.max().clamp(min=0))
            scale = shrink * (high - low) / 7
            zero = round(-low / ((high - low) / 7))
            q = ((row / scale).round() + zero).clamp(0, 7).sub(zero).mul(scale)
            costs.append(float((row - q).square().sum()))
        if costs[1] > 1.02 * costs[0] and min(costs[2:]) < 0.98 * costs[0]:
            return row
    raise AssertionError("no such row")


# ---- the results

class Code:
    """The code under test, imported when this is made: tests/test_golden_mutants.py changes it first."""

    def __init__(self):
        import compress
        from engine import columns
        from engine.settings import CompressConfig
        from model import GPT, GPTConfig
        self.compress, self.columns, self.config = compress, columns, CompressConfig
        self.gpt, self.sizes = GPT, GPTConfig

    def model(self):
        """An empty GPT for the weights of calibrate.json, in float64."""
        return self.gpt(self.sizes(**MODEL)).double()


def run(code, call, settings, W, H, mask=None):
    """The results of one case, as lists."""
    settings = {k: tuple(v) if k == "n_m" else v for k, v in settings.items()}
    if call == "factor":
        f = code.columns.factor(H, len(H), **settings, dtype=torch.float64)
        order = torch.arange(len(H)) if f.order is None else f.order
        return {"R": numbers(f.R, 9), "order": order.tolist(), "damp": f.damp, "retries": f.retries}
    if settings.pop("mask", False):
        settings["mask"] = mask
    result = getattr(code.compress, call)(W, *([H] if call not in ("rtn", "magnitude") else []), **settings)
    if call in ("magnitude", "wanda"):
        return {"keep": numbers(result)}
    if call == "sparsegpt":
        named = {"weight": result[0], "keep": result[1]}
    else:
        named = {name: getattr(result, name) for name in ("codes", "scale", "zero", "group")}
    if call != "rtn" and not settings.get("refit"):  # the loss that Algorithm 1 adds up, a row
        config = code.config(call, **{k: v for k, v in settings.items() if k != "mask"})
        f = code.columns.factor(H, len(H), config.damp, config.act_order, torch.float64)
        swept = code.compress.compress_weight(W, H, f, config, settings.get("mask"))
        named["loss"] = swept.loss
        if settings.get("search"):
            named["repeated"] = torch.tensor(swept.repeated)
    return {name: numbers(t) for name, t in named.items()}


def text_model(code):
    """(GPT in float64, ids (N, T), lengths (N,)): what calibrate.json is about."""
    model = code.model()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(short(draw(100 + i, *p.shape) * (1 if p.dim() == 1 else 0.4) + (p.dim() == 1)))
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    return model, ids, torch.tensor([6, 3, 1, 4])


def walk(code, model, ids, lengths):
    """{name of a layer: H} and the number of tokens, of the model as it is; layers that share H are there once."""
    sums = {}
    for index, _, hessians, tokens in code.compress.calibrate(model, ids, lengths, rows=2):
        first = {}
        for name, H in hessians.items():
            first.setdefault(id(H), (f"blocks.{index}.{name}", H))
        sums.update({name: numbers(H, 9) for name, H in first.values()})
    return {"tokens": tokens, "H": sums}


def compressed(code, model, ids, lengths):
    """[{"report": {key: a value a layer}, "logits" (N, T, V)}] of every entry of WALKS; histograms of the first."""
    results, pruned = [], None
    for method, settings in WALKS:
        settings = {k: tuple(v) if k in ("n_m", "targets") else v for k, v in settings.items()}
        base = pruned if settings.get("act_order") else model
        new, report = code.compress.compress(base, ids, method, lengths, **settings)
        pruned = new if method == "magnitude" else pruned
        left_out = {"seconds", "histogram"} if results else {"seconds"}
        columns = {key: [v if isinstance(v, (str, dict)) else numbers(v) for v in (row[key] for row in report)]
                   for key in report[0] if key not in left_out}
        results.append({"report": columns, "logits": numbers(new(ids).detach())})
    return results


# ---- comparing

def differences(code, files):
    """The cases of {file name: content} that the code does not reproduce; one that raises counts, too."""
    found = []
    given = {}
    for name in ("compress.json", "compress_edges.json"):
        given.update({key: {k: torch.tensor(v, dtype=torch.bool if k == "mask" else torch.float64)
                            for k, v in problem.items()} for key, problem in files[name]["problems"].items()})
        for case in files[name]["cases"]:
            what, problem = f"{name}: {case['call']} {case['settings']} on {case['problem']}", given[case["problem"]]
            found += check(what, lambda: run(code, case["call"], case["settings"], **problem), case["result"])
    file = files["calibrate.json"]
    model = code.model()
    model.load_state_dict({k: torch.tensor(v, dtype=torch.float64) for k, v in file["weights"].items()}, strict=False)
    text = model, torch.tensor(file["ids"]), torch.tensor(file["lengths"])
    found += check("calibrate.json: H", lambda: walk(code, *text), file["walk"])
    found += check("calibrate.json: compress", lambda: compressed(code, *text), file["compressed"])
    return found


# ---- the files

def read():
    """{file name: content} of the three files."""
    return {name: files.read(name) for name in ("compress.json", "compress_edges.json", "calibrate.json")}


def main():
    """Make the three files again."""
    from engine.files import write_text
    code, known = Code(), {}
    for name, given, cases in (("compress.json", problems(), CASES), ("compress_edges.json", edges(), EDGES)):
        known.update(given)
        body = [packed({"call": call, "settings": settings, "problem": problem,
                            "result": run(code, call, settings, **known[problem])})
                for call, settings, problem in cases]
        lists = {key: {k: numbers(t, 17) for k, t in problem.items()} for key, problem in given.items()}
        problem_lines = ",\n".join(f"{packed(key)}: {packed(problem)}" for key, problem in lists.items())
        write_text(HERE / name, '{"problems": {\n' + problem_lines + '},\n"cases": [\n' + ",\n".join(body) + "\n]}\n")
    model, ids, lengths = text_model(code)
    content = {"config": MODEL, "weights": {k: numbers(p.detach(), 17) for k, p in model.named_parameters()},
               "ids": ids.tolist(), "lengths": lengths.tolist(), "walk": walk(code, model, ids, lengths),
               "runs": [[method, settings] for method, settings in WALKS],
               "compressed": compressed(code, model, ids, lengths)}
    lines = ",\n".join(f"{packed(key)}: {packed(value)}" for key, value in content.items())
    write_text(HERE / "calibrate.json", "{" + lines + "}\n")
    for name, content in read().items():
        print(f"{name}: {len(content.get('cases', content.get('runs')))} cases, {(HERE / name).stat().st_size:,} bytes")
    print("not reproduced:", differences(code, read()) or "none")


if __name__ == "__main__":
    main()
