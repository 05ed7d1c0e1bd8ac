"""
What stands beside the published sweeps, each asked for by name: `search` and `refit`. Neither is in the papers.

search: a group's grid is fitted to its columns as all errors before them left them. These are spread wider than
without the errors of their own block, as the reference code has them, and a wider grid has larger steps:
`compress.gptq` says what that costs. With search the error is below the reference's in every case of
tests/test_compress.py.
refit: only later columns can make up for the error of a column. Once all are settled, what is still free is an ordinary
least-squares problem under the damped H that the sweep used.

Related: the GPTQ reference code's option `mse` tries narrower grids, too; conjugate gradients on the weights that
pruning left are in ALPS (Meng et al. 2024, arXiv 2406.07831).
"""
import math

import torch

from engine.columns import live_diagonal, spans, sweep
from engine.grids import Quantized, check_ends, check_finite, check_hessian

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # what the search multiplies a grid's range with


# ---- search

def search(W, factored, bits, group_size=None, symmetric=False, keep=None, block_size=128):
    """GPTQ's sweep of W (out, in) with grids as narrow as costs least -> Swept; arguments as in `columns.sweep`.

    In a few rows later errors push a weight far beyond a narrowed grid. A row whose loss is above what rounding on the
    widest grids costs on average is swept again on those, and the better result stays; `repeated` counts such rows.
    """
    chosen = Narrowed(W)
    swept = sweep(W, factored, bits, group_size, symmetric, keep, block_size=block_size, narrow=chosen)
    rows = (swept.loss > chosen.expected()).nonzero()[:, 0]
    if not len(rows):
        return swept
    again = sweep(W[rows], factored, bits, group_size, symmetric, None if keep is None else keep[rows],
                  block_size=block_size)
    better = again.loss < swept.loss[rows]
    codes, scale, zero = (kept.index_copy(0, rows[better], new[better])
                          for kept, new in zip(swept.quantized, again.quantized[:3]))
    loss = swept.loss.index_copy(0, rows[better], again.loss[better])
    return swept._replace(quantized=Quantized(codes, scale, zero, *swept.quantized[3:]), loss=loss, repeated=len(rows))


class Narrowed:
    """Chooses narrower grids during a sweep of W (out, in), and adds up what the widest ones would have cost."""

    def __init__(self, W):
        self.wide_loss = W.new_zeros(len(W), dtype=torch.float64)
        self.rows = torch.zeros(len(W), dtype=torch.bool, device=W.device)  # where any grid was narrowed

    def __call__(self, A, scale, zero, bits, weight):
        """The scale (out,) to take for the columns A (columns, out), whose widest grid is (scale, zero)."""
        self.wide_loss += scale.square() * (weight.sum() / 24)  # a rounding error squared is step² / 12 on average
        best = narrower(A, scale, zero, bits, weight)
        self.rows |= best < scale
        return best

    def expected(self):
        """(out,) the average loss on the widest grids of rows that took narrower ones; infinite for the others."""
        return self.wide_loss.masked_fill(~self.rows, float("inf"))


def narrower(A, scale, zero, bits, weight):
    """Of this scale (out,) and its multiples in SHRINK, the one that costs the columns A (columns, out) least: the sum
    of weight * (a - q)², weight (columns, 1). The zero-point is the same, as both ends of the grid move alike."""
    best, least, low, high = scale, torch.full_like(scale, float("inf")), -zero, 2**bits - 1 - zero
    for shrink in SHRINK:
        tried = (shrink * scale).float().clamp(min=torch.finfo(torch.float32).tiny).to(A.dtype)
        now = torch.div(A, tried).round_().clamp_(low, high).mul_(tried).sub_(A).square_().mul_(weight).sum(0)  # (out,)
        better = now < least
        if not better.any():
            break  # the still narrower ones cut off still more
        best, least = torch.where(better, tried, best), torch.minimum(now, least)
    return best


# ---- refit

def refit(W, H, swept, damp):
    """The same mask, or the same zero-points, with all else chosen anew: tr(D H Dᵀ) only falls, H damped -> Swept.

    Of pruned weights, the values that stay: `best_weights`. Of codes: the scales, then the codes one after another,
    then the scales of these. damp is the sweep's: undamped, the weights of an input a hundred times quieter than the
    others would move by several times their size, for a gain in the last digits of the error on this data.
    """
    H = check_hessian(H, W.shape[1]).to(W.dtype, copy=True)
    diagonal, mean = live_diagonal(H)
    H.diagonal().copy_(diagonal + damp * mean)
    H /= power_of_two(mean)  # so that no product overflows or underflows, whatever the inputs' unit
    unit = power_of_two(float(W.abs().max()))
    W = W / unit
    if swept.quantized is None:
        weight = best_weights(W, H, swept.weight.to(W.dtype) / unit, swept.keep.to(W.dtype)) * unit
        check_finite(weight.float(), "the refitted weight")
        return swept._replace(weight=weight.float())
    quantized = best_scales(W, H, swept.quantized._replace(scale=swept.quantized.scale / unit))
    quantized = best_scales(W, H, best_codes(W, H, quantized, swept.keep))
    scale = (quantized.scale * unit).clamp(min=torch.finfo(torch.float32).tiny)
    check_ends(scale, quantized.zero, quantized.bits)
    return swept._replace(quantized=quantized._replace(scale=scale))


def power_of_two(size):
    """The power of two at or below a size above zero; 1 for 0. Dividing by it changes no digit."""
    return 2.0 ** math.floor(math.log2(size)) if size > 0 else 1.0


def best_weights(W, H, Q, keep, steps=3):
    """Q (out, in) after `steps` steps of conjugate gradients (Hestenes & Stiefel 1952), each the best along its
    direction; keep (out, in) is 0 where a weight stays zero. A step costs one product with H."""
    r = ((W - Q) @ H).mul_(keep)  # half the gradient by -Q: what is left to gain
    P, size = r.clone(), r.square().sum(1, keepdim=True)
    for _ in range(steps):
        HP = (P @ H).mul_(keep)
        length = size / (P * HP).sum(1, keepdim=True)
        length = torch.where(length.isfinite(), length, 0.0)  # nothing left to gain in this row
        Q, r = Q + length * P, r.sub_(length * HP)
        last, size = size, r.square().sum(1, keepdim=True)
        P = r + (size / last).nan_to_num_(0.0, 0.0, 0.0) * P
    return Q


def best_scales(W, H, quantized):
    """The scale of one group after another in closed form, the codes as they are -> Quantized. Two products with H."""
    codes, scale, zero, group, bits = quantized
    G = (W - quantized.dequantize()) @ H  # (out, in)
    scale, A = scale.clone(), codes.to(W.dtype) - zero[:, group]  # (out, in): a weight in units of its scale
    for g in range(scale.shape[1]):
        at = (group == g).nonzero()[:, 0]
        AH = A[:, at] @ H[at]  # (out, in)
        length = (G[:, at] * A[:, at]).sum(1) / (AH[:, at] * A[:, at]).sum(1)
        better = scale[:, g] + length
        usable = better.isfinite() & (better > torch.finfo(torch.float32).tiny)
        better = torch.where(usable, better, scale[:, g]).float()
        G -= (better - scale[:, g])[:, None] * AH
        scale[:, g] = better
    return Quantized(codes, scale, zero, group, bits)


def best_codes(W, H, quantized, keep=None, block=128):
    """One code after another, the best while all others stand as they are -> Quantized. Where keep (out, in) is False
    the code stays.

    With G = D H, a weight q_j is best at q_j + G_j / H_jj, and the loss grows with the square of the distance from
    there: the nearest code is the best one. Source: QuantEase (Behdin et al. 2023, arXiv 2309.01885).
    """
    codes, scale, zero, group, bits = quantized
    n, top, diagonal = len(H), 2**bits - 1, H.diagonal().tolist()
    G = H @ (W - quantized.dequantize()).T  # (in, out)
    Q = codes.T.to(W.dtype, memory_format=torch.contiguous_format)  # (in, out)
    for i1, i2 in spans(0, n, block):
        S, old = scale[:, group[i1:i2]].T.contiguous(), Q[i1:i2].clone()  # (columns, out)
        free = torch.ones_like(old) if keep is None else keep[:, i1:i2].T.to(W.dtype)
        for j, s, may in zip(range(i1, i2), S, free):
            best = (G[j] / (diagonal[j] * s)).add_(Q[j]).round_().clamp_(0, top)
            change = best.sub_(Q[j]).mul_(may)
            G[j:i2].addr_(H[j:i2, j], change * s, alpha=-1)
            Q[j] += change
        G[i2:].addmm_(H[i2:, i1:i2], (Q[i1:i2] - old).mul_(S), alpha=-1)
    return Quantized(Q.T.to(torch.uint8).contiguous(), scale, zero, group, bits)
