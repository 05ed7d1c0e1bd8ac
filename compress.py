"""
Every compressor of the study, by hand: a weight matrix goes in, a smaller one that does nearly the same comes out.

What it does: round-to-nearest and GPTQ (Frantar et al. 2023, arXiv 2210.17323, Algorithm 1); magnitude, Wanda (Sun et al. 2024,
arXiv 2306.11695, Section 3) and SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, Algorithm 1, Sections 3.2-3.5).

The one idea. A layer computes X Wᵀ. Replacing W by Q costs, per token,

    mean |x (W - Q)ᵀ|² = tr(D H Dᵀ),    D = W - Q,  H = mean of x xᵀ,

so the small matrix H is all there is to know about the data, and every row of W is a problem of its own. GPTQ and SparseGPT walk
through the columns; each is rounded (or zeroed), and the error made is pushed onto the columns still free. The paper's update is

    e_j = (w_j - q_j) / U_jj,    W[:, j:] -= e_j U[j, j:],    UᵀU = H⁻¹,  U upper triangular    (Algorithm 1)

with w_j the column as it stands at its turn. Ours gives the same numbers without inverting H. Let H = R Rᵀ with R upper triangular
(a Cholesky factorization run from the last row up). Then U = R⁻¹, because (R⁻¹)ᵀ R⁻¹ = (R Rᵀ)⁻¹. Summing the updates,
D = E U, that is E = D R, and column k of it says, with E_k = (w_k - q_k) R_kk:

    w_k = W_k + sum over j < k of D_j R_jk / R_kk        D_j = W_j - q_j against the *original* column

One factorization instead of three (factor, invert, factor again), and the better conditioned one. QuIP (Chee et al. 2023,
arXiv 2307.13304, Section 3) proves the two forms equal for any H. U_jj = 1 / R_jj is all that is left of U: it weighs an error.
"""
import copy
import time
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

STEP = 16  # columns rounded one by one before the rest of their block hears of it: the lazy batch, inside the lazy batch


class Quantized(NamedTuple):
    """A weight on a grid: row i, column j stands for scale[i, g] * (codes[i, j] - zero[i, g]) with g = group[j]."""
    codes: Tensor  # (out, in) uint8 in [0, 2**bits - 1]
    scale: Tensor  # (out, groups) float32, above zero
    zero: Tensor   # (out, groups) uint8 in [0, 2**bits - 1]: the code of the weight 0
    group: Tensor  # (in,) int64: the group of each column
    bits: int

    def dequantize(self):
        """(out, in) float32."""
        return self.scale[:, self.group] * (self.codes.float() - self.zero[:, self.group].float())


class Factor(NamedTuple):
    """What the column sweep needs to know of H, shared by all layers that read the same inputs."""
    R: Tensor      # (in, in) upper: R Rᵀ = H + damp * mean(diag H) * I, in the order of `order`
    order: Tensor  # (in,) the columns of W in the order they are swept
    damp: float    # the share of the mean diagonal that was added in the end
    retries: int   # how often it had to be raised


class Swept(NamedTuple):
    """What one sweep over the columns leaves behind."""
    weight: Tensor            # (out, in) Q
    keep: Tensor | None       # (out, in) bool; None if nothing was pruned
    quantized: Quantized | None
    loss: float               # sum of (w_j - q_j)² / (2 U_jj²), which is 1/2 tr(D H_damped Dᵀ)


# ---- checks: bad input is named with its numbers before any work is done

def _weight(W):
    """W (out, in) as float64 if it came so, else as float32: the precision of the sweep."""
    if W.dim() != 2 or 0 in W.shape:
        raise ValueError(f"W must be a matrix (out, in) of at least 1 x 1, got shape {tuple(W.shape)}")
    W = W.detach().to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    if not W.isfinite().all():
        raise ValueError(f"W holds {int((~W.isfinite()).sum())} values that are NaN or infinite, of {W.numel()}")
    return W


def _hessian(H, n):
    """H (n, n), in floating point."""
    if tuple(H.shape) != (n, n):
        raise ValueError(f"H must be ({n}, {n}) for a weight of {n} inputs, got {tuple(H.shape)}")
    H = H.detach().to(torch.promote_types(H.dtype, torch.float32))
    if not H.sum().isfinite() and not H.isfinite().all():  # the sum is the cheap look; a finite H may overflow it
        raise ValueError(f"H holds {int((~H.isfinite()).sum())} values that are NaN or infinite, of {H.numel()}")
    size = float(H.abs().max())
    skew = max(float((rows - H[:, i:i + 64].T).abs().max()) for i, rows in zip(range(0, n, 64), H.split(64)))  # in cache
    if skew > 1e-4 * size:
        raise ValueError(f"H must be symmetric, but H and its transpose differ by {skew:.3g} (largest entry {size:.3g})")
    if float(H.diagonal().min()) < 0:
        raise ValueError(f"H is a mean of squares, its diagonal cannot be {float(H.diagonal().min()):.3g}")
    if H[H.diagonal() == 0].any():
        raise ValueError("H has a zero on its diagonal beside entries that are not: no mean of x xᵀ does")
    return H


def _at_least(value, low, name):
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    return value


def _bits(bits):
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    return int(bits)


def _groups(group_size, block_size):
    _at_least(block_size, 1, "block_size")
    if group_size is not None:
        _at_least(group_size, 1, "group_size")


def _pattern(sparsity, n_m):
    if (sparsity is None) == (n_m is None):
        raise ValueError(f"give either sparsity or n_m, got sparsity={sparsity!r} and n_m={n_m!r}")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    if n_m is not None and not (len(n_m) == 2 and all(isinstance(i, int) for i in n_m) and 1 <= n_m[0] <= n_m[1]):
        raise ValueError(f"n_m must be two integers N, M with 1 <= N <= M (keep N of every M), got {n_m!r}")


# ---- the grid: round to nearest

def grid(W, bits, symmetric=False):
    """Scale and zero-point of the grid that spans the last dimension of W (..., n), and 0: two tensors (...).

    Asymmetric: from min to max. Symmetric: from -|max| to |max| with the zero-point in the middle; the step is 2 |max| / (2**bits - 1),
    so that even the positive end, half a step beyond the last code, is rounded by no more than half a step.
    """
    top = 2**bits - 1
    low, high = W.amin(-1).clamp(max=0), W.amax(-1).clamp(min=0)  # 0 is always on the grid: a pruned weight stays pruned
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high / top - low / top).float()  # divided before subtracted: the range itself may overflow
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0).to(W.dtype)  # all zero: any step will do
    zero = torch.full_like(scale, 2**(bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
    return scale, zero


def rtn(W, bits, group_size=None, symmetric=False):
    """Round every weight of W (out, in) to the nearest of 2**bits values -> Quantized.

    One grid a row, or one for each group_size columns of a row; the last group may be shorter.
    """
    W, bits = _weight(W), _bits(bits)
    out, n = W.shape
    size = min(_at_least(group_size, 1, "group_size"), n) if group_size is not None else n
    groups = -(-n // size)
    padded = torch.nn.functional.pad(W, (0, groups * size - n)).view(out, groups, size)  # zeros never widen a grid
    scale, zero = grid(padded, bits, symmetric)  # (out, groups)
    codes = (padded / scale[:, :, None]).round().add_(zero[:, :, None]).clamp_(0, 2**bits - 1)  # (out, groups, size)
    codes = codes.view(out, groups * size)[:, :n]
    group = torch.arange(n, device=W.device) // size
    return Quantized(codes.to(torch.uint8).contiguous(), scale.float(), zero.to(torch.uint8), group, bits)


# ---- the sweep over the columns: GPTQ, SparseGPT, and both at once

def factor(H, n, damp=0.01, act_order=False, dtype=torch.float32):
    """For the H (n, n) of n inputs: the upper triangular R (of dtype) with R Rᵀ = H + damp * mean(diag H) * I -> Factor.

    A dead input (zero in all of the data) is left out of the mean and depends on nothing. Where H has not full rank at this damping,
    the damping is raised tenfold until it has; how often is in the result. `act_order` puts the columns with the largest diagonal first.
    Raises ValueError if H is so far from positive semidefinite that no damping up to 10 helps.
    """
    if not 0 <= damp < float("inf"):
        raise ValueError(f"damp must be a finite number of at least 0, got {damp}")
    H = _hessian(H, n)
    diagonal = H.diagonal().double()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(n, device=H.device)
    back = order.flip(0)
    reverse = H[back][:, back] if act_order else H.flip(0, 1)  # its ordinary lower Cholesky factor is our R, read backwards
    diagonal = diagonal[back].masked_fill(dead[back], 1e-12 * mean)
    # L_jj² is the share of input j that the others before it cannot explain. float32 will do while that stands well above its
    # rounding error, else float64 has to; below the rounding error of H itself it is noise, and H has not full rank.
    tries = [(torch.float32, 1e-4), (torch.float64, torch.finfo(H.dtype).eps)][dtype == torch.float64:]
    for retries in range(10):
        for precision, noise in tries:
            damped = reverse.to(precision, copy=True)
            damped.diagonal().copy_(diagonal + damp * mean)
            L, failed = torch.linalg.cholesky_ex(damped)
            if not failed and bool((L.diagonal().square() > noise * damped.diagonal()).all()):
                return Factor(L.to(dtype).flip(0, 1), order, damp, retries)
        if damp >= 10:
            break
        damp = max(10 * damp, 1e-6)
    raise ValueError(f"H is not positive semidefinite: no Cholesky factor even with damp={damp:g} of its mean diagonal {mean:.3g}")


def _cuts(low, high, *steps):
    """The spans between low, high and all multiples of the steps in between: _cuts(0, 10, 4, 5) -> 0-4, 4-5, 5-8, 8-10."""
    edges = sorted({low, high, *(i for step in steps for i in range(-(-low // step) * step, high, step))})
    return list(zip(edges, edges[1:]))


def _columns(A, V, keep, low, high):
    """Algorithm 1, innermost loop: a few columns, one after another, in units of their grid -> Q; all (columns, out).

    A is changed in place: it holds each column as it stood at its turn. V (columns, columns) is U_jk / U_jj above the diagonal.
    low, high (out,) bound the codes, or are None: no rounding. keep (columns, out) is 0 where a weight must go, or None: all stay.
    """
    Q, E = torch.empty_like(A), torch.empty_like(A[0])
    keep = keep.unbind() if keep is not None else None
    for j, (w, q, v) in enumerate(zip(A.unbind(), Q.unbind(), V.unbind())):
        if low is not None:
            torch.clamp(torch.round(w, out=q), low, high, out=q)  # q_j = quant(w_j)
        else:
            q.copy_(w)
        if keep is not None:
            q.mul_(keep[j])
        torch.sub(w, q, out=E)
        A.addr_(v, E, alpha=-1)  # w_k -= (w_j - q_j) U_jk / U_jj for the columns k > j of these few; v is zero up to j
    return Q


def _free(W, R, lo, hi):
    """Columns lo .. hi - 1 as Algorithm 1 has them once all before lo are done: (columns, out).

    W (in, out) holds the error D = W - Q in the rows that are done. With it, the best that the free columns can do is
    W_free + D_done R_done,free R_free,free⁻¹ (where the gradient of tr(D H Dᵀ), H = R Rᵀ, is zero). R is triangular, so the first of
    the free columns need its block of their own only, whose inverse is their block of U.
    """
    if lo == 0:
        return W[:hi].clone()
    pushed = R[:lo, lo:hi].T @ W[:lo]  # (columns, out)
    return torch.linalg.solve_triangular(R[lo:hi, lo:hi].T, pushed, upper=False).add_(W[lo:hi])


def sweep(W, factor, bits=None, group_size=None, symmetric=False, keep=None, sparsity=None, n_m=None, block_size=128):
    """One pass over the columns of W (out, in): round them (bits), zero some of them (keep, sparsity or n_m), or both -> Swept.

    Works on a transposed copy, so that a column of W is contiguous. The lazy batches (GPTQ, Step 2) are nested twice: a column's
    error reaches the few columns around it at once, its block after at most STEP columns, and the others when it is their turn.
    A grid, and a mask, is chosen on columns that know of every error made before them, wherever the blocks begin.
    """
    (out, n), R, order = W.shape, factor.R, factor.order
    size, M = min(group_size or n, n), n_m[1] if n_m else 1
    unit = size if size <= block_size else M
    block = max(block_size // unit, 1) * unit  # blocks hold whole groups or lie within one
    d = R.diagonal()[:, None]                  # (in, 1) R_jj = 1 / U_jj
    W = W.T.index_select(0, order)             # (in, out), and from here on all is transposed; W - Q where a column is done
    Q = torch.empty_like(W)                    # in units of the grid
    pruned = keep is not None or sparsity is not None or n_m is not None
    keep = keep.T[order].to(W.dtype) if keep is not None else torch.ones_like(W) if pruned else None  # 1 = stays
    scale, low, high, grids, loss = 1.0, None, None, [], 0.0
    for i1, i2 in _cuts(0, n, block, size):
        A = _free(W, R, i1, i2)                         # (columns, out)
        U = torch.linalg.inv(R[i1:i2, i1:i2].double())  # (columns, columns) this block of U, upper
        V = (U / U.diagonal()[:, None]).to(W.dtype).triu_(1)  # what (w_j - q_j) is multiplied by on its way to column k > j
        if sparsity is not None:  # the block's mask at once, by the loss each weight would cause: (w_j / U_jj)² (SparseGPT, 3.3)
            score = (A * d[i1:i2]).abs().T.reshape(1, -1)  # (1, out * columns)
            keep[i1:i2] = ~smallest(score, round(sparsity * score.numel())).view(out, i2 - i1).T
        for j1, j2 in _cuts(i1, i2, STEP, size, M if n_m else STEP):
            few, later, here = slice(j1 - i1, j2 - i1), slice(j2 - i1, None), slice(j1, j2)
            if n_m is not None and j1 % M == 0:  # N:M is chosen as late as possible, just before its M columns (SparseGPT, 3.4)
                score = (A[j1 - i1:j1 - i1 + M] * d[j1:j1 + M]).abs().T  # (out, M)
                keep[j1:j1 + M] = ~smallest(score, max(score.shape[1] - n_m[0], 0)).T
            if bits is not None and j1 % size == 0:
                members = A[j1 - i1:j1 - i1 + size] if j1 + size <= i2 else _free(W, R, j1, min(j1 + size, n))
                scale, zero = grid((members if keep is None else members * keep[j1:j1 + size]).T, bits, symmetric)  # (out,)
                low, high = -zero, 2**bits - 1 - zero
                grids.append((scale, zero))
            a = A[few] / scale  # (columns, out)
            Q[here] = _columns(a, V[few, few], keep[here] if pruned else None, low, high)
            E = (a - Q[here]) * scale
            loss += 0.5 * float((E * d[here]).square().sum(dtype=torch.float64))
            A[later].addmm_(V[few, later].T, E, alpha=-1)
            W[here] -= Q[here] * scale
    back = torch.argsort(order)
    keep = keep[back].T.bool().contiguous() if pruned else None
    if bits is None:
        return Swept(Q[back].T.float().masked_fill(~keep, 0.0), keep, None, loss)  # masked_fill: -0 becomes 0
    scale, zero = (torch.stack(t, dim=1) for t in zip(*grids))  # (out, groups)
    group = torch.arange(n, device=W.device) // size
    codes = (Q.T + zero[:, group]).to(torch.uint8)[:, back].contiguous()  # (out, in)
    quantized = Quantized(codes, scale.float(), zero.to(torch.uint8), group[back], bits)
    return Swept(quantized.dequantize(), keep, quantized, loss)


def gptq(W, H, bits, group_size=None, symmetric=False, act_order=False, damp=0.01, block_size=128, mask=None):
    """GPTQ (Algorithm 1) of W (out, in) under H (in, in) -> Quantized.

    group_size  columns that share a grid, in the order they are swept; None: one grid a row. Each is fitted to compensated columns.
    act_order   sweep the columns with the largest diag H first; the result is back in its own order, `group` says who shares
    damp        share of the mean diagonal of H added to it, raised if H needs more (see `factor`)
    block_size  columns in a lazy batch: a matter of speed, the result does not depend on it
    mask        (out, in) bool, True = keep; the others come out as exact zeros and their loss is compensated like any other
    """
    W, bits = _weight(W), _bits(bits)
    _groups(group_size, block_size)
    if mask is not None and (mask.shape != W.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(W.shape)}, got {mask.dtype} of {tuple(mask.shape)}")
    return sweep(W, factor(H, W.shape[1], damp, act_order, W.dtype), bits, group_size, symmetric, mask, block_size=block_size).quantized


def sparsegpt(W, H, sparsity=None, n_m=None, bits=None, group_size=None, damp=0.01, block_size=128):
    """SparseGPT (Algorithm 1) of W (out, in) under H (in, in) -> (W_new (out, in) float32, keep-mask (out, in) bool).

    sparsity    the share of zeros, exactly round(sparsity * weights) of them in every block of block_size columns; or
    n_m         (N, M): at most N weights that are not zero in every aligned group of M inputs
    bits        quantize what is kept in the same pass (Section 3.5), on grids as in `gptq`
    """
    W = _weight(W)
    _pattern(sparsity, n_m)
    _groups(group_size, block_size)
    if n_m is not None and group_size is not None and group_size % n_m[1] and group_size < W.shape[1]:
        raise ValueError(f"group_size must be a multiple of M, got {group_size} and N:M {n_m[0]}:{n_m[1]}")
    bits = _bits(bits) if bits is not None else None
    swept = sweep(W, factor(H, W.shape[1], damp, dtype=W.dtype), bits, group_size, sparsity=sparsity, n_m=n_m, block_size=block_size)
    return swept.weight, swept.keep


# ---- pruning without compensation: a criterion, a mask, and zeros

def smallest(score, k):
    """(rows, n) bool: True at exactly k smallest entries of each row of score (rows, n); the first ones win a tie."""
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = score.kthvalue(k, dim=1, keepdim=True).values  # (rows, 1)
    below, tied = score < limit, score == limit
    return below | tied & (tied.cumsum(1) <= k - below.sum(1, keepdim=True))


def _keep(score, sparsity, n_m):
    """Keep-mask (rows, n) of score (rows, n): in every row the largest but round(sparsity * n), or the N largest of each M."""
    if n_m is None:
        return ~smallest(score, round(sparsity * score.shape[1]))
    (rows, n), (N, M) = score.shape, n_m
    padded = torch.nn.functional.pad(score, (0, -n % M), value=-1.0)  # below every score: padding goes first
    return ~smallest(padded.view(-1, M), M - N).view(rows, -1)[:, :n].contiguous()


def magnitude(W, sparsity=None, n_m=None):
    """Keep-mask (out, in) bool: the weights of largest magnitude, in the whole layer or N of every M inputs (Han et al. 2015)."""
    score = _weight(W).abs()
    _pattern(sparsity, n_m)
    return _keep(score.view(1, -1) if n_m is None else score, sparsity, n_m).view(score.shape)


def wanda(W, H, sparsity=None, n_m=None):
    """Keep-mask (out, in) bool: the largest |W_ij| * ‖X_j‖ of each output row (Wanda, Equation 1); ‖X_j‖ is sqrt(H_jj) up to a constant."""
    W = _weight(W)
    _pattern(sparsity, n_m)
    return _keep(W.abs() * _hessian(H, W.shape[1]).diagonal().sqrt().to(W.dtype), sparsity, n_m)


# ---- the walk over the model: one for all methods

METHODS = ("rtn", "gptq", "magnitude", "wanda", "sparsegpt")


def linears(block):
    """{name: layer} of a block's linear layers, in the order they run."""
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}


@torch.no_grad()
def calibrate(model, ids, lengths=None, rows=32):
    """Walk over the blocks -> (index, block, {layer name: H}, tokens), H = mean of x xᵀ over the real tokens that reach the layer.

    ids (N, T), lengths (N,) real tokens a row (padding stands on the right and counts nowhere); `rows` of them run at a time.
    Whoever walks changes the block's layers before asking for the next one: block k is calibrated on what the compressed
    blocks before it give. Only one block's H, and one activation a token, are in memory.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if lengths is None else \
        torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (N, T)
    x, tokens = model.embed(ids), int(real.sum())  # (N, T, C)
    if tokens == 0:
        raise ValueError("calibration needs at least one real token")
    for index, block in enumerate(model.blocks):
        sums, hooks, now = {}, [], {}
        for name, layer in linears(block).items():
            n = layer.in_features
            sums[name] = torch.zeros(n, n, dtype=torch.float64, device=x.device)

            def add(module, inputs, output, total=sums[name]):
                X = inputs[0][now["real"]].double()  # (tokens, in)
                total.addmm_(X.T, X)
            hooks.append(layer.register_forward_hook(add))
        for part, now["real"] in zip(x.split(rows), real.split(rows)):
            block(part)
        for hook in hooks:
            hook.remove()
        yield index, block, {name: total / tokens for name, total in sums.items()}, tokens
        x = torch.cat([block(part) for part in x.split(rows)])


def cost(D, H):
    """tr(D H Dᵀ): the mean squared output error that the change D (out, in) of a weight makes on inputs with H."""
    return float(((D.double() @ H) * D.double()).sum())


def compress_layer(W, H, method, bits=None, group_size=None, symmetric=False, act_order=False, sparsity=None, n_m=None,
                   damp=0.01, block_size=128):
    """One weight by one method -> (weight, keep-mask or None, Quantized or None, {"damp", "retries"} where H was factored)."""
    if method == "rtn":
        quantized = rtn(W, bits, group_size, symmetric)
        return quantized.dequantize(), None, quantized, {}
    if method in ("magnitude", "wanda"):
        keep = magnitude(W, sparsity, n_m) if method == "magnitude" else wanda(W, H, sparsity, n_m)
        return W.float() * keep, keep, None, {}
    how = factor(H, W.shape[1], damp, act_order)
    swept = sweep(_weight(W), how, bits, group_size, symmetric, None, sparsity, n_m, block_size)
    return swept.weight, swept.keep, swept.quantized, {"damp": how.damp, "retries": how.retries}


def compress(model, ids, method, lengths=None, **settings):
    """A compressed copy of the model and one report row (dict) a layer.

    ids       (N, T) calibration tokens, lengths (N,) as in `calibrate`
    method    one of METHODS; settings are those of the function of that name
    Embedding and head are never touched. The given model keeps its tensors, and what is unchanged is shared with it. Quantized layers
    become kernels.PackedLinear, N:M sparse ones too; unstructured pruned ones stay nn.Linear, with exact zeros.
    """
    from kernels import PackedLinear, pack, pack_sparse  # here, not above: kernels needs Quantized
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    tensors = [*model.parameters(), *model.buffers()]
    model, report = copy.deepcopy(model, {id(t): t for t in tensors}), []
    for index, block, hessians, tokens in calibrate(model, ids, lengths):
        for name, layer in linears(block).items():
            began, W, H = time.time(), layer.weight.detach(), hessians[name]
            new, keep, quantized, how = compress_layer(W, H, method, **settings)
            plain = rtn(W, settings["bits"], settings.get("group_size"), settings.get("symmetric", False)).dequantize() \
                if keep is None else W * magnitude(W, settings.get("sparsity"), settings.get("n_m"))
            size = cost(W, H)
            report.append({
                "name": f"blocks.{index}.{name}", "shape": list(W.shape), "bits": quantized.bits if quantized else None,
                "group_size": settings.get("group_size"), "zeros": float((new == 0).float().mean()),
                "sparsity": float((~keep).float().mean()) if keep is not None else 0.0, "tokens": tokens, **how,
                "weight_change": float((new - W).norm() / W.norm()), "error_before": cost(plain - W, H),
                "error_after": cost(new - W, H), "relative_output_error": cost(new - W, H) / size if size else 0.0,
                "seconds": time.time() - began})
            if quantized:
                layer = PackedLinear(pack(quantized), layer.bias)
            elif settings.get("n_m"):
                layer = PackedLinear(pack_sparse(new, settings["n_m"]), layer.bias)
            else:
                pruned = nn.Linear(*reversed(W.shape), bias=layer.bias is not None, device="meta")
                pruned.weight, pruned.bias = nn.Parameter(new.to(W.dtype)), layer.bias
                layer = pruned
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, layer)
    return model, report
