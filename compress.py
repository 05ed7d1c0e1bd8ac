"""
Every compressor of the study, by hand: a model goes in, a smaller one that answers nearly the same comes out.

What it does: round-to-nearest and GPTQ (Frantar et al. 2023, arXiv 2210.17323); magnitude pruning (Han et al. 2015,
arXiv 1506.02626), Wanda (Sun et al. 2024, arXiv 2306.11695) and SparseGPT (Frantar & Alistarh 2023, arXiv
2301.00774), each a pure function of a weight W (out, in) and of H (in, in), the mean of x xᵀ over the layer's inputs.
Then the one walk over a model that collects H, and the script that writes a packed checkpoint. How GPTQ and SparseGPT
work is in `sweep.py`; read it first.

What it leaves out: embedding and head, which stay as they are; activations, which stay in floating point.

    python compress.py --method gptq --bits 3 --group-size 32      # out/dense.safetensors; written beside it
    python compress.py --method sparsegpt --n-m 2 4 --bits 4     # half of the weights, 4 bits for the others

Where we deviate: the grids of GPTQ's groups are narrower than their weights where that costs less (`search`). On
request scales and codes, or the weights that stay, are fitted once more when the sweep is over (`refit`). N:M keeps N
of every M (NVIDIA's and Wanda's meaning; SparseGPT counts the zeros). Masks have exactly the promised number of zeros,
ties included. An input that is zero in all of the data keeps its weights, rounded. A group's grid is fitted to fully
compensated columns, so the result does not depend on `block_size`. Symmetric grids always reach the largest weight.
GPTQ is greedy: on a weight of a few rows it can lose to rounding; the report has both errors.
"""
import argparse
import contextlib
import copy
import functools
import os
import time
from dataclasses import dataclass, fields

import torch
import torch.nn as nn

from engine.columns import (Quantized, Swept, better_rows, check_bits, check_count, check_hessian, check_pattern, check_weight,
                   factor, grid, smallest, sweep)
from engine.columns import refit as refitted

# ---- one weight: quantization

def rtn(W, bits, group_size=None, symmetric=False):
    """Round every weight of W (out, in) to the nearest of 2**bits values -> Quantized.

    One grid a row, or one for every group_size columns of a row; the last group may be shorter.
    Raises ValueError for bad input: W with NaN or infinity, bits not in 2 .. 8, group_size below 1.
    """
    W = check_weight(W)
    check_settings(bits, group_size)
    out, n = W.shape
    size = min(group_size or n, n)
    groups = -(-n // size)
    padded = nn.functional.pad(W, (0, groups * size - n)).view(out, groups, size)  # zeros never widen a grid
    scale, zero = grid(padded, bits, symmetric)  # (out, groups)
    z = zero[:, :, None]
    codes = (padded / scale[:, :, None]).round_().clamp_(-z, 2**bits - 1 - z).add_(z)  # (out, groups, size)
    codes = codes.view(out, groups * size)[:, :n].to(torch.uint8).contiguous()
    return Quantized(codes, scale.float(), zero.to(torch.uint8), torch.arange(n, device=W.device) // size, bits)


def gptq(W, H, bits, group_size=None, symmetric=False, act_order=False, damp=0.01, block_size=128, mask=None,
         search=None, refit=False):
    """GPTQ of W (out, in) under H (in, in) -> Quantized.

    group_size  columns that share a grid, in the order they are swept; None: one grid a row
    act_order   sweep the columns with the largest diag H first; the result is back in its own order, `group` says who
                shares a grid
    damp        share of the mean diagonal of H added to it, raised if H needs more (see `factor`)
    block_size  columns in a lazy batch: a matter of speed, the result does not depend on it
    mask        (out, in) bool, True = keep; the others come out as exact zeros, compensated like any other error
    search      each grid as narrow as makes the loss of its own columns, (w_j - q_j)² / U_jj², least: see `narrower`;
                False, as in the paper: each grid spans all of its weights; None: True where errors have spread the
                columns a grid is fitted to, so with more than one group, and an H that is not diagonal
    refit       when the sweep is over, scales and codes once more as cost the calibration data least: see `sweep.refit`

    Raises ValueError for bad input: NaN or infinity, shapes that do not fit, H not symmetric or not positive
    semidefinite, settings out of range. Source: Algorithm 1 of the paper; `sweep.py` says how it is done here.
    """
    W = check_weight(W)
    s = Settings("gptq", bits, group_size, symmetric, act_order, search, refit, damp=damp, block_size=block_size)
    if mask is not None and (mask.shape != W.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(W.shape)}, got {mask.dtype} of {tuple(mask.shape)}")
    return gptq_sweep(W, H, factor(H, W.shape[1], damp, act_order, W.dtype), s, mask).quantized


def gptq_sweep(W, H, how, s, keep):
    """GPTQ of W (out, in) with all that Settings s asks for -> Swept; how is the Factor of H.

    A search judges a grid by its columns as they stand when it is chosen, and in a few rows later errors push a weight
    far beyond it. A row that lost more than rounding on grids that span all loses on average is swept again on those,
    and the better of the two stays; `repeated` says how many rows that were.
    """
    def swept(W, keep, search):
        return sweep(W, how, s.bits, s.group_size, s.symmetric, keep, block_size=s.block_size, search=search)

    done = swept(W, keep, spreads(H, s.group_size) if s.search is None else s.search)
    lost = (done.loss > done.expected).nonzero()[:, 0]  # none without a search: it expects infinity
    if len(lost):
        done = better_rows(done, swept(W[lost], keep if keep is None else keep[lost], False), lost)
    return refitted(W, H, done) if s.refit else done


def spreads(H, group_size):
    """Whether some grid is fitted to columns that the errors of others have changed."""
    return bool(group_size and group_size < len(H) and H.triu(1).any())


# ---- one weight: pruning

def keep_largest(score, sparsity, n_m):
    """Keep-mask (rows, n) of score (rows, n): in a row all but the round(sparsity * n) smallest; or N of every M."""
    if n_m is None:
        return ~smallest(score, round(sparsity * score.shape[1]))
    (rows, n), (N, M) = score.shape, n_m
    padded = nn.functional.pad(score, (0, -n % M), value=-1.0)  # below every score: padding goes first
    return ~smallest(padded.view(-1, M), M - N).view(rows, -1)[:, :n].contiguous()


def magnitude(W, sparsity=None, n_m=None):
    """Keep-mask (out, in) bool: the weights of largest magnitude, in the whole layer, or N of every M inputs."""
    score = check_weight(W).abs()
    check_pattern(sparsity, n_m)
    return keep_largest(score.reshape(1, -1) if n_m is None else score, sparsity, n_m).view(score.shape)


def wanda(W, H, sparsity=None, n_m=None):
    """Keep-mask (out, in) bool: the largest |W_ij| ‖X_j‖ of each row (Equation 1), with sqrt(H_jj) for ‖X_j‖."""
    W = check_weight(W)
    check_pattern(sparsity, n_m)
    return keep_largest(W.abs() * check_hessian(H, W.shape[1]).diagonal().sqrt().to(W.dtype), sparsity, n_m)


def sparsegpt(W, H, sparsity=None, n_m=None, bits=None, group_size=None, damp=0.01, block_size=128, refit=False):
    """SparseGPT of W (out, in) under H (in, in) -> (W_new (out, in) float32, keep-mask (out, in) bool).

    sparsity    the share of zeros, exactly round(sparsity * weights) of them in every block of block_size columns; or
    n_m         (N, M): at most N weights that are not zero in every aligned group of M inputs
    bits        quantize what stays in the same pass, on grids as in `gptq`
    refit       when the mask is known, the weights that stay (or, with bits, their scales and codes) by least squares:
                see `sweep.refit`; False, as in the paper: a column is settled once and for all

    Raises ValueError as `gptq` does, and for a group_size that cuts through a pattern of M. Source: Algorithm 1 of
    the paper, with "Extension to Semi-Structured Sparsity" and "Joint Sparsification & Quantization".
    """
    W = check_weight(W)
    s = Settings("sparsegpt", bits, group_size, refit=refit, sparsity=sparsity, n_m=n_m, damp=damp,
                 block_size=block_size)
    done = sparsegpt_sweep(W, H, factor(H, W.shape[1], damp, dtype=W.dtype), s)
    return done.dequantize(), done.keep


def sparsegpt_sweep(W, H, how, s):
    """SparseGPT of W (out, in) with all that Settings s asks for -> Swept; how is the Factor of H."""
    done = sweep(W, how, s.bits, s.group_size, sparsity=s.sparsity, n_m=s.n_m, block_size=s.block_size)
    return refitted(W, H, done) if s.refit else done


def check_settings(bits, group_size, block_size=1, n_m=None):
    if bits is not None:
        check_bits(bits)
    check_count(block_size, "block_size")
    if group_size is not None:
        check_count(group_size, "group_size")
        if n_m and group_size % n_m[1]:
            raise ValueError(f"group_size must be a multiple of M for N:M, got {group_size} and {n_m[0]}:{n_m[1]}")


# ---- a model: the walk

def linears(block):
    """{name: layer} of a block's linear layers."""
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}


@torch.no_grad()
def calibrate(model, ids, lengths=None, rows=32):
    """The one walk over the blocks: yields (index, block, {layer name: H}, tokens), H the mean of x xᵀ over real
    tokens.

    ids (N, T), lengths (N,) real tokens a row: the padding behind them counts nowhere. `rows` rows run at a time.
    Whoever walks changes the block's layers before asking for the next one: block k is calibrated on what the
    compressed blocks before it give. Layers that read one tensor (q, k and v; gate and up) share one H, the same
    object. In memory beside the model: N T C floats between two blocks, what one block makes of `rows` rows, and one
    block's H, in² doubles each.
    """
    N, T = ids.shape
    lengths = torch.full((N,), T) if lengths is None else torch.as_tensor(lengths)
    if lengths.shape != (N,) or not (0 <= int(lengths.min()) and 0 < int(lengths.max()) <= T):
        raise ValueError(f"lengths must be {N} numbers in [0, {T}], not all of them 0, got {lengths.tolist()}")
    real = torch.arange(T, device=ids.device) < lengths[:, None].to(ids.device)  # (N, T)
    tokens = int(real.sum())
    x = torch.cat([model.embed(part) for part in ids.split(rows)])  # (N, T, C)
    for index, block in enumerate(model.blocks):
        sums = {}
        for part, mask in zip(x.split(rows), real.split(rows)):
            with watched(block, mask, sums):
                block(part)
        for H in {id(H): H for H in sums.values()}.values():
            H.div_(tokens)
        yield index, block, sums, tokens
        del sums
        for part in x.split(rows):
            part.copy_(block(part))  # views of x: a block's outputs take the place of its inputs


@contextlib.contextmanager
def watched(block, mask, sums):
    """While open, x xᵀ of each linear layer's inputs where mask (B, T) is true is added to sums[name] (in, in)."""
    seen = [None, None]  # the tensor that came by last, and its sum

    def look(name, layer, inputs):
        if inputs[0] is not seen[0]:
            X = inputs[0][mask].float()  # (tokens, in)
            if name not in sums:
                sums[name] = X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
            seen[:] = inputs[0], sums[name].add_(X.T @ X)
        sums[name] = seen[1]

    hooks = [layer.register_forward_pre_hook(functools.partial(look, name)) for name, layer in linears(block).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- a model: every layer of it

METHODS = {  # and the settings that belong to each, beside group_size and targets
    "rtn": ("bits", "symmetric"),
    "gptq": ("bits", "symmetric", "act_order", "search", "refit", "damp", "block_size"),
    "magnitude": ("sparsity", "n_m", "bits"),
    "wanda": ("sparsity", "n_m", "bits"),
    "sparsegpt": ("sparsity", "n_m", "bits", "refit", "damp", "block_size"),
}


@dataclass
class Settings:
    method: str = "gptq"           # one of METHODS
    bits: int | None = None        # 2 to 8; for a pruning method: what stays is quantized too
    group_size: int | None = None  # columns that share a grid; None: one grid a row
    symmetric: bool = False        # the zero-point in the middle of every grid
    act_order: bool = False        # the most active columns first
    search: bool | None = None     # narrower grids where they cost less; None: with more than one group
    refit: bool = False            # scales and codes, or the weights that stay, once more in the end
    sparsity: float | None = None  # share of weights set to zero
    n_m: tuple | None = None       # or N weights kept of every M
    damp: float = 0.01             # share of the mean diagonal that is added to H
    block_size: int = 128          # columns in a lazy batch, and for sparsegpt in a mask
    targets: tuple | None = None   # layers by name, "mlp.down" or "blocks.0.attn.q"; None: every one of every block

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in (*METHODS[self.method], "group_size", "targets"):
                raise ValueError(f"{self.method} has no setting {field.name}, got {value!r}")
        if self.prunes:
            check_pattern(self.sparsity, self.n_m)
        elif self.bits is None:
            raise ValueError(f"{self.method} needs bits, from 2 to 8")
        check_settings(self.bits, self.group_size, self.block_size, self.n_m)

    @property
    def prunes(self):
        return "sparsity" in METHODS[self.method]


def compress_weight(W, H, how, s):
    """One weight by Settings s -> Swept; how is H's Factor where the method needs it. What is zero stays zero."""
    W = check_weight(W)
    if s.method == "gptq":
        return gptq_sweep(W, H, how, s, W != 0 if (W == 0).any() else None)
    if s.method == "sparsegpt":
        return sparsegpt_sweep(W, H, how, s)
    keep = None
    if s.prunes:
        keep = magnitude(W, s.sparsity, s.n_m) if s.method == "magnitude" else wanda(W, H, s.sparsity, s.n_m)
        W = W.masked_fill(~keep, 0.0)
    quantized = rtn(W, s.bits, s.group_size, s.symmetric) if s.bits else None
    return Swept(W.float() if quantized is None else None, keep, quantized)


def output_error(D, H):
    """tr(D H Dᵀ): the mean over tokens of |x Dᵀ|², what a change D (out, in) of a weight does to its output."""
    return float(((D @ H) * D).sum(dtype=torch.float64).clamp(min=0))


def histogram(change, bins=29):
    """{"edges": bins + 1 numbers, "counts": bins whole ones} of the values in `change`: bins of one width, 0 in the
    middle of the middle one (where all that was not changed stands), out to the largest change on either side.

    The edges are rounded to four digits: they are there to be drawn.
    """
    most = float(change.abs().max())
    most = most if most > 0 else 1.0  # nothing changed: any width will do
    counts = torch.histc(change.float(), bins, -most, most).long()
    return {"edges": [float(f"{most * (2 * k / bins - 1):.4g}") for k in range(bins + 1)], "counts": counts.tolist()}


def report_row(W, new, done, plain, H, how, s):
    """What became of one weight; W, new, plain (out, in): before, after, and by the simplest method instead."""
    D, n, rms = W - new, W.shape[1], float(W.square().mean().sqrt())
    zeros, after, size = float((new == 0).float().mean()), output_error(D, H), output_error(W, H)
    return {"shape": list(W.shape), "method": s.method, "bits": s.bits or 32, "group_size": min(s.group_size or n, n),
            "zeros": zeros, "sparsity": zeros if done.keep is not None else 0.0,
            "damp": how.damp if how else 0.0, "retries": how.retries if how else 0,
            "repeated_rows": done.repeated,
            "error_before": output_error(W - plain, H), "error_after": after,
            "relative_output_error": (after / size)**0.5 if size else 0.0,
            "weight_change": float(D.norm() / W.norm().clamp(min=1e-30)),
            "histogram": histogram((new - W) / max(rms, 1e-30))}


def compress(model, ids, method, lengths=None, **settings):
    """A new, compressed GPT and one report row (dict) a layer; `model` stays as it is, and lends what did not change.

    ids (N, T) is calibration text, lengths (N,) as in `calibrate`; method and settings are those of `Settings`.
    Quantized and N:M layers become kernels.PackedLinear; other pruned ones stay nn.Linear, with exact zeros. In a
    row: error_before is tr(D H Dᵀ) of rounding to nearest, or of magnitude pruning, at the same settings, error_after
    that of the method; relative_output_error is |X Dᵀ| / |X Wᵀ| and weight_change |D| / |W|; histogram counts the
    single changes, in units of the root mean square of W, so that weight_change is its width; repeated_rows is how many
    rows GPTQ swept twice (see `gptq_sweep`); zeros and sparsity are counted in the result.
    Raises ValueError for settings that do not fit, and for a layer that holds NaN.
    """
    s = Settings(method, **settings)
    simplest = Settings("magnitude" if s.prunes else "rtn", s.bits, s.group_size, s.symmetric,
                        sparsity=s.sparsity, n_m=s.n_m, targets=s.targets)
    same = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model, report = copy.deepcopy(model, same), []  # new modules around the same tensors
    targets, ids = find_targets(model, s.targets), ids.to(model.wte.weight.device)
    for index, block, hessians, tokens in calibrate(model, ids, lengths):
        factors = {}
        for name, H64 in hessians.items():
            if f"blocks.{index}.{name}" not in targets:
                continue
            began, layer, H = time.perf_counter(), block.get_submodule(name), H64.float()
            W = layer.weight.detach().float()
            if "damp" in METHODS[method] and id(H64) not in factors:
                factors[id(H64)] = factor(H, H.shape[0], s.damp, s.act_order)
            how = factors.get(id(H64))
            done = compress_weight(W, H, how, s)
            new = done.dequantize()
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, replacement(layer, done, new, s))
            seconds = time.perf_counter() - began
            plain = new if s == simplest else compress_weight(W, H, None, simplest).dequantize()
            report.append({"name": f"blocks.{index}.{name}", **report_row(W, new, done, plain, H, how, s),
                           "tokens": tokens, "seconds": seconds})
    return model, report


def find_targets(model, targets):
    """The full names of the layers that `targets` name, all linear layers of the blocks by default."""
    found = {f"blocks.{i}.{name}" for i, block in enumerate(model.blocks) for name in linears(block)}
    wanted = {name for name in found if targets is None or any(name == t or name.endswith("." + t) for t in targets)}
    lost = [t for t in targets or () if not any(name == t or name.endswith("." + t) for name in found)]
    if lost or not wanted:
        names = sorted({name.split(".", 2)[2] for name in found})
        raise ValueError(f"no linear layer {', '.join(lost)} to compress; there are {', '.join(names) or 'none'}")
    return wanted


def replacement(layer, done, weight, s):
    """The module that stands in for the nn.Linear `layer` from now on."""
    from kernels import PackedLinear, pack, pack_sparse  # here, not above: kernels needs Quantized
    if s.n_m and s.n_m[0] < s.n_m[1]:  # N of N is no pattern at all
        return PackedLinear(pack_sparse(done.quantized or weight, s.n_m), layer.bias)
    if done.quantized:
        return PackedLinear(pack(done.quantized), layer.bias)
    pruned = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    pruned.weight, pruned.bias = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad), layer.bias
    return pruned


# ---- the script

def settings_parser():
    """Every field of Settings as an option, with its default, and where to read and write."""
    parser = argparse.ArgumentParser(description="Compress a trained GPT and write it packed.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    s = {field.name: field.default for field in fields(Settings)}
    parser.add_argument("--method", choices=list(METHODS), default=s["method"], help="how")
    parser.add_argument("--bits", type=int, default=s["bits"], help="2 to 8; for a pruning method: of what stays")
    parser.add_argument("--group-size", type=int, default=s["group_size"], help="columns that share a grid")
    parser.add_argument("--symmetric", action="store_true", help="zero-points in the middle of the grid (rtn, gptq)")
    parser.add_argument("--act-order", action="store_true", help="most active columns first (gptq)")
    parser.add_argument("--search", action=argparse.BooleanOptionalAction, default=s["search"],
                        help="narrower grids where they cost less (gptq)")
    parser.add_argument("--refit", action=argparse.BooleanOptionalAction, default=s["refit"],
                        help="scales and codes, or the weights that stay, once more in the end (gptq, sparsegpt)")
    parser.add_argument("--sparsity", type=float, default=s["sparsity"], help="share of zeros (pruning methods)")
    parser.add_argument("--n-m", type=int, nargs=2, metavar=("N", "M"), default=s["n_m"], help="or keep N of every M")
    parser.add_argument("--damp", type=float, default=s["damp"], help="share of mean diag H added (gptq, sparsegpt)")
    parser.add_argument("--block-size", type=int, default=s["block_size"], help="columns in a batch (gptq, sparsegpt)")
    parser.add_argument("--targets", nargs="+", metavar="LAYER", default=s["targets"],
                        help='"mlp.down", "blocks.0.attn.q"; none: all')
    parser.add_argument("--in", dest="source", default="out/dense.safetensors", help="checkpoint to compress")
    parser.add_argument("--out", default=None, help="checkpoint to write; none: beside --in, named after the settings")
    parser.add_argument("--size", choices=["default", "quick"], default="default", help="of the world of --in")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the choice of calibration text")
    return parser


def print_layers(report):
    """The report rows as a table."""
    print(f"{'layer':24s} {'shape':>12s} {'bits':>4s} {'zeros':>6s} {'damp':>8s} "
          f"{'error before':>12s} {'after':>9s} {'of output':>9s} {'s':>4s}")
    for r in report:
        shape = "x".join(map(str, r["shape"]))
        print(f"{r['name']:24s} {shape:>12s} {r['bits']:4d} {r['zeros']:6.3f} {r['damp']:8.2g} "
              f"{r['error_before']:12.4g} {r['error_after']:9.3g} {r['relative_output_error']:9.4f} "
              f"{r['seconds']:4.1f}")
    retried = sum(r["retries"] > 0 for r in report)
    print(f"calibrated on {report[0]['tokens']:,} tokens; "
          f"{retried} of {len(report)} layers needed more damping than asked for")


def print_size(path, dense, model):
    """What the file holds, against all parameters of the dense model."""
    from kernels import PackedLinear
    layers = [m for m in model.blocks.modules() if isinstance(m, PackedLinear)]
    size, n, inside = os.path.getsize(path), dense.n_parameters(), ""
    if layers:
        packed, weights = sum(m.packed.nbytes for m in layers), sum(m.in_features * m.out_features for m in layers)
        inside = f" ({len(layers)} packed layers with scales: {packed:,}, {8 * packed / weights:.2f} bits a weight)"
    print(f"{path}: {size:,} bytes with embedding, norms and header{inside}; its {n:,} parameters in float32 "
          f"take {4 * n / size:.2f} times as much, in float16 {2 * n / size:.2f} times")
