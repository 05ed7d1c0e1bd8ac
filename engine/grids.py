"""
Weights on a grid, the checks of every compressor's input, and the choice of the k smallest.

A grid of 2**bits values stands for all the weights that share it: scale * (code - zero). It always has the value 0, so
that a pruned weight stays zero.
"""
from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """A weight on a grid: row i, column j is scale[i, g] * (codes[i, j] - zero[i, g]) with g = group[j]."""
    codes: Tensor  # (out, in) uint8 in [0, 2**bits - 1]
    scale: Tensor  # (out, groups) float32, above zero
    zero: Tensor   # (out, groups) uint8 in [0, 2**bits - 1]: the code of the weight 0
    group: Tensor  # (in,) int64: the group of each column
    bits: int

    def dequantize(self):
        """(out, in) float32."""
        if self.scale.shape[1] == 1:
            return (self.codes.float() - self.zero).mul_(self.scale)
        return (self.codes.float() - self.zero[:, self.group]).mul_(self.scale[:, self.group])


# ---- checks: bad input is named with its numbers before any work is done

def check_weight(W):
    """W (out, in) as float64 if it is float64, else as float32: the precision of all that follows."""
    if W.dim() != 2 or 0 in W.shape:
        raise ValueError(f"W must be a matrix (out, in) of at least 1 x 1, got shape {tuple(W.shape)}")
    W = W.detach().to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    check_finite(W, "W")
    return W


def check_finite(t, name):
    if not t.sum().isfinite() and not t.isfinite().all():  # the sum is the quick test; finite numbers may overflow it
        raise ValueError(f"{name} holds {int((~t.isfinite()).sum())} values that are NaN or infinite, of {t.numel()}")


def check_hessian(H, n):
    """H (n, n) in float32 or float64, symmetric, with |H_ij|² <= H_ii H_jj as every mean of x xᵀ has it.

    An input so quiet that its square underflows (H_jj = 0 where H_ij is not) is treated as zero in all of the data.
    Raises ValueError for an H that cannot be a mean of x xᵀ.
    """
    if tuple(H.shape) != (n, n):
        raise ValueError(f"H must be ({n}, {n}) for a weight of {n} inputs, got {tuple(H.shape)}")
    rounding = 4 * torch.finfo(H.dtype).eps if H.is_floating_point() else 0.0
    H = H.detach().to(torch.float64 if H.dtype == torch.float64 else torch.float32)
    check_finite(H, "H")
    diagonal = H.diagonal()
    if float(diagonal.min()) < 0:
        raise ValueError(f"H is a mean of squares, its diagonal cannot be {float(diagonal.min()):.3g}")
    size = float(H.abs().max())
    root = diagonal.clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # smaller squares may have become 0
    for i in range(0, n, 64):  # bands of rows that fit a cache
        band = H[i:i + 64, i:]
        skew = float((band - H[i:, i:i + 64].T).abs().max())
        if skew > 1e-4 * size:
            raise ValueError(f"H must be symmetric, but differs from its transpose by {skew:.3g} (largest: {size:.3g})")
        excess = float((band.abs() / root[i:i + 64, None] / root[i:]).max())
        if excess > 1 + max(1e-3, rounding):
            raise ValueError(f"H is not positive semidefinite: |H_ij| is {excess:.3g} times sqrt(H_ii H_jj), "
                             "which no mean of x xᵀ exceeds")
    dead = diagonal == 0
    return H.masked_fill(dead | dead[:, None], 0.0) if H[dead].any() else H


def check_count(value, name):
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_damp(damp):
    if type(damp) not in (int, float) or not 0 <= damp < float("inf"):
        raise ValueError(f"damp must be a finite number of at least 0, got {damp!r}")


def check_grid(bits, group_size, n_m=None):
    """bits and group_size, where given; a group must hold whole patterns of M."""
    if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if group_size is not None:
        check_count(group_size, "group_size")
        if n_m and group_size % n_m[1]:
            raise ValueError(f"group_size must be a multiple of M for N:M, got {group_size} and {n_m[0]}:{n_m[1]}")


def check_pattern(sparsity, n_m):
    """Exactly one of a share of zeros and (N, M)."""
    if (sparsity is None) == (n_m is None):
        raise ValueError(f"give either sparsity or n_m, got sparsity={sparsity!r} and n_m={n_m!r}")
    if sparsity is not None and (type(sparsity) not in (int, float) or not 0 <= sparsity <= 1):
        raise ValueError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    if n_m is not None and not (isinstance(n_m, (tuple, list)) and len(n_m) == 2 and all(type(i) is int for i in n_m)
                                and 1 <= n_m[0] <= n_m[1]):
        raise ValueError(f"n_m must be two integers N, M with 1 <= N <= M (keep N of every M), got {n_m!r}")


def check_mask(mask, W):
    if mask is not None and (mask.shape != W.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(W.shape)}, got {mask.dtype} of {tuple(mask.shape)}")


# ---- grids and masks

def grid(W, bits, symmetric=False):
    """Scale and zero-point of the grid that spans the last dimension of W (..., n), and 0 -> two tensors (...).

    From min to max; symmetric: from -|max| to |max| around the zero-point 2**(bits - 1), whose positive end is half a
    step beyond the last code. The scale is rounded to float32, the type it is stored in, before it is used. Raises
    ValueError for a grid whose ends are no float32 numbers: they may lie half a step beyond the largest weight.
    """
    top = 2**bits - 1
    low, high = W.amin(-1).clamp(max=0), W.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high / top - low / top).float()  # divided before subtracted: the range itself may overflow
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0).to(W.dtype)  # all zero: any will do
    zero = torch.full_like(scale, 2**(bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
    check_ends(scale, zero, bits)
    return scale, zero


def check_ends(scale, zero, bits):
    """ValueError where the values of a grid are beyond float32, in which weights are given back."""
    ends = (scale * torch.maximum(zero, 2**bits - 1 - zero)).float()
    if not ends.isfinite().all():
        raise ValueError(f"{int((~ends.isfinite()).sum())} of {ends.numel()} grids reach beyond float32, "
                         f"{torch.finfo(torch.float32).max:.3g}: the weights are too large for {bits} bits")


def nearest(W, scale, zero, bits):
    """The codes of the grid values nearest to W, of W's shape; halves go to the even multiple of scale."""
    return ((W / scale).round() + zero).clamp(0, 2**bits - 1)


def smallest(score, k, dim=1):
    """Bool like score (2-D): True at exactly k smallest of each row (dim 1) or column (dim 0); the first win a tie."""
    if k < 1:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = score.kthvalue(k, dim, keepdim=True).values
    chosen = score <= limit
    if int(chosen.count_nonzero()) > k * limit.numel():  # more are tied for the last place than have room
        below = score < limit
        chosen = below | chosen & ((chosen & ~below).cumsum(dim) <= k - below.sum(dim, keepdim=True))
    return chosen


def keep_largest(score, sparsity, n_m):
    """Keep-mask (rows, n) of score (rows, n): in a row all but the round(sparsity * n) smallest; or N of every M."""
    if n_m is None:
        return ~smallest(score, round(sparsity * score.shape[1]))
    (rows, n), (N, M) = score.shape, n_m
    padded = torch.nn.functional.pad(score, (0, -n % M), value=-1.0)  # below every score: padding goes first
    return ~smallest(padded.view(-1, M), M - N).view(rows, -1)[:, :n].contiguous()
