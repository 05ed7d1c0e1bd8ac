"""
Writes compress.json: small inputs, settings and results of every algorithm in compress.py, to check a port against.

    python tests/golden/make_compress.py
"""
import json
import os
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import compress  # noqa: E402

CASES = [  # method, settings, problem
    ("rtn", dict(bits=3), "plain"),
    ("rtn", dict(bits=2, group_size=8, symmetric=True), "plain"),
    ("rtn", dict(bits=4, group_size=5), "odd rows"),
    ("gptq", dict(bits=3), "plain"),
    ("gptq", dict(bits=4, group_size=8, symmetric=True), "plain"),
    ("gptq", dict(bits=2, group_size=6, block_size=4), "plain"),
    ("gptq", dict(bits=3, group_size=8, act_order=True), "plain"),
    ("gptq", dict(bits=8, search=True), "plain"),
    ("gptq", dict(bits=3, group_size=8, search=True), "plain"),
    ("gptq", dict(bits=2, search=True), "plain"),
    ("gptq", dict(bits=3, refit=True), "plain"),
    ("gptq", dict(bits=4, group_size=8, act_order=True, refit=True), "plain"),
    ("gptq", dict(bits=3), "odd rows"),
    ("gptq", dict(bits=3, damp=0.0), "few tokens"),
    ("gptq", dict(bits=3, damp=0.1), "dead input"),
    ("magnitude", dict(sparsity=0.5), "plain"),
    ("magnitude", dict(n_m=(2, 4)), "plain"),
    ("wanda", dict(sparsity=0.4), "plain"),
    ("wanda", dict(n_m=(4, 8)), "dead input"),
    ("sparsegpt", dict(sparsity=0.5), "plain"),
    ("sparsegpt", dict(sparsity=0.7, block_size=8), "plain"),
    ("sparsegpt", dict(n_m=(2, 4)), "plain"),
    ("sparsegpt", dict(sparsity=0.5, refit=True), "plain"),
    ("sparsegpt", dict(n_m=(1, 3), bits=4, group_size=6), "plain"),
    ("sparsegpt", dict(sparsity=0.5, bits=3), "dead input"),
]


def problems():
    """{name: (W (out, in), H (in, in))} in float64, rounded to seven digits so that the file is short and exact."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def short(t):
        return torch.tensor([[float(f"{x:.7g}") for x in row] for row in t.tolist()], dtype=torch.float64)

    def second_moment(X):
        return short(X.T @ X / len(X))
    mix = draw(22, 22) / 22**0.5 + 0.3 * torch.eye(22, dtype=torch.float64)
    X = draw(60, 22) @ mix
    dead = X[:, :16].clone()
    dead[:, 5] = 0
    odd = torch.stack([draw(12).abs(), -draw(12).abs(), torch.zeros(12, dtype=torch.float64),
                       torch.full((12,), 0.3, dtype=torch.float64)])  # all positive, all negative, all zero, constant
    return {"plain": (short(draw(7, 22)), second_moment(X)), "odd rows": (short(odd), second_moment(X[:, :12])),
            "few tokens": (short(draw(5, 12)), second_moment(X[:4, :12])),
            "dead input": (short(draw(6, 16)), second_moment(dead))}


def run(method, settings, W, H):
    """The results of one case, as lists."""
    result = getattr(compress, method)(W, *([H] if method not in ("rtn", "magnitude") else []), **settings)
    if method in ("rtn", "gptq"):
        return {name: getattr(result, name).tolist() for name in ("codes", "scale", "zero", "group")}
    if method == "sparsegpt":
        return {"weight": result[0].tolist(), "keep": result[1].int().tolist()}
    return {"keep": result.int().tolist()}


def main():
    given = problems()
    cases = [{"method": method, "settings": settings, "problem": name, "result": run(method, settings, *given[name])}
             for method, settings, name in CASES]
    lists = {name: {"W": W.tolist(), "H": H.tolist()} for name, (W, H) in given.items()}
    path = HERE / "compress.json"
    temporary = path.with_suffix(".tmp")
    body = ",\n".join(json.dumps(case) for case in cases)
    temporary.write_text(f'{{"problems": {json.dumps(lists)},\n"cases": [\n{body}\n]}}\n', encoding="utf-8")
    os.replace(temporary, path)
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
