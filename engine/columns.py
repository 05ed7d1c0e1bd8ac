"""
The fast sweep over the columns of a weight: GPTQ and SparseGPT as `compress.py` runs them on a model.

The algorithms themselves are `gptq_loop` and `sparsegpt_loop` in compress.py: read those first. Here are the same
numbers (in float64 no code differs, tests hold the two together), five to eight times as fast at 768 x 768.

One factorization instead of three. The papers factor H, invert it, and factor the inverse. We factor once: H = R Rᵀ
with R upper triangular, a Cholesky factorization read from the last row up. Then U = R⁻¹, as (R⁻¹)ᵀ R⁻¹ = (R Rᵀ)⁻¹,
and H⁻¹ is never formed. All that the sweep needs of U is near its diagonal:

    U_jj = 1 / R_jj                      an error e in column j costs e² R_jj² / 2
    U_bb = R_bb⁻¹                        b a block of columns: the diagonal blocks of triangular inverses are inverses
    w_b = W_b + D_done R_done,b U_bb     a block as Algorithm 1 has it when all before it are done, W_b the original

The last line: the steps add up to D = E U, so E = D R, and the papers' update w_b = W_b - E U_done,b becomes ours
because R U = 1 has zeros above its diagonal.

Lazy batches (GPTQ, "Step 2") are nested twice: an error is applied at once to the few columns around its own, to the
rest of its block after at most STEP columns, and to all others when it is their turn. `python tests/bench_compress.py`
prints the time beside that of the arithmetic which no order of work avoids.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from engine.grids import Quantized, check_damp, check_finite, check_hessian, grid, smallest

STEP = 16  # columns updated one at a time before their errors are applied to the rest of the block


class Factor(NamedTuple):
    """What a sweep needs of H; layers that read the same inputs share it."""
    R: Tensor             # (in, in) upper: R Rᵀ = H + damp * mean(diag H) * I, rows and columns in `order`
    order: Tensor | None  # (in,) the columns of W in the order they are swept; None: as they are
    damp: float           # the share of the mean diagonal that was added in the end
    retries: int          # how often it had to be raised


class Swept(NamedTuple):
    """The result of one sweep over the columns."""
    weight: Tensor | None        # (out, in) float32; None where `quantized` has it
    keep: Tensor | None          # (out, in) bool; None if nothing was pruned
    quantized: Quantized | None
    loss: Tensor | None = None   # (out,) sum over j of (w_j - q_j)² / (2 U_jj²): row i has (D H_damped Dᵀ)_ii / 2
    repeated: int = 0            # rows that were swept twice: see refit.search

    def dequantize(self):
        """(out, in) float32."""
        return self.weight if self.quantized is None else self.quantized.dequantize()


# ---- the factorization

def live_diagonal(H):
    """(diagonal (n,) float64, its mean) of H. A dead input (zero in all of the data) is left out of the mean, and has
    1e-12 of the mean for its own entry, so that H can be factored without damping."""
    diagonal = H.diagonal().double()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    return diagonal.masked_fill(dead, 1e-12 * mean), mean


def factor(H, n, damp=0.01, act_order=False, dtype=torch.float32):
    """For the H (n, n) of n inputs: the upper triangular R (of dtype), R Rᵀ = H + damp * mean(diag H) * I -> Factor.

    Where H has not full rank at this damping, it is raised to ten times itself, at least 1e-6, until H has; how often
    is in the result. `act_order` puts the columns with the largest diagonal first, on a tie the first of them. Raises
    ValueError for an H that is not positive semidefinite: one that needs more than its own mean diagonal added.
    """
    check_damp(damp)
    H, order = check_hessian(H, n), None
    diagonal, mean = live_diagonal(H)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        H, diagonal = H[order][:, order], diagonal[order]
    H, diagonal = H.flip(0, 1), diagonal.flip(0)  # its ordinary lower Cholesky factor is our R, read backwards
    tries = [(torch.float64, 0.0)]
    if dtype != torch.float64:  # float32 will do while every pivot stands well above its rounding error
        tries.insert(0, (torch.float32, 1e-4))
    for retries in range(10):
        for precision, least in tries:
            damped = H.to(precision, copy=True)
            damped.diagonal().copy_(diagonal + damp * mean)
            rounding = max(torch.finfo(H.dtype).eps, torch.finfo(precision).eps)
            L, failed = torch.linalg.cholesky_ex(damped)
            if not failed and not noisy(L, damped.diagonal(), least, rounding, damp * mean):
                return Factor(L.to(dtype).flip(0, 1), order, damp, retries)
        if damp >= 1:
            break
        damp = max(10 * damp, 1e-6)
    raise ValueError(f"H is not positive semidefinite: not even with {damp:g} of its mean diagonal {mean:.3g} added")


def noisy(L, diagonal, least, rounding, added):
    """Whether some pivot L_jj² of the Cholesky factor L of H is at most `least` of its H_jj, or mere rounding error.

    A pivot is what the inputs before j cannot explain of input j: v H vᵀ with v = L_jj (L⁻¹)_j. Entries of H that are
    off by about rounding * sqrt(H_ii H_kk) change that by about rounding * sum(v_i² H_ii); on random H of rank n - 1
    the last pivot was never above 2 times that. No pivot is below what was `added` to the diagonal.
    """
    if bool((L.diagonal().square() <= least * diagonal).any()):
        return True
    if added > 16 * rounding * float(diagonal.max()):
        return False
    identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, identity, upper=False)
    return bool((16 * rounding * (inverse.square() @ diagonal) >= 1).any())


def inverse(R):
    """R⁻¹ of an upper triangular R, computed in float64: of a Factor's R the U of Algorithm 1."""
    identity = torch.eye(len(R), dtype=torch.float64, device=R.device)
    return torch.linalg.solve_triangular(R.double(), identity, upper=True).to(R.dtype).contiguous()


# ---- the sweep

def spans(low, high, *steps):
    """The spans between low, high and the multiples of the steps: spans(0, 10, 4, 5) -> 0-4, 4-5, 5-8, 8-10."""
    edges = sorted({low, high, *(i for step in steps for i in range(-(-low // step) * step, high, step))})
    return list(zip(edges, edges[1:]))


def current(W, R, lo, hi, U=None):
    """Columns lo .. hi - 1 once all before lo are done, by the last of the three lines at the top: (columns, out). W
    (in, out) holds W - Q in the rows that are done; U is these columns' block of U."""
    if lo == 0:
        return W[:hi].clone()
    U = inverse(R[lo:hi, lo:hi]) if U is None else U
    return torch.addmm(W[lo:hi], (R[:lo, lo:hi] @ U).T, W[:lo])  # W_b + D_done R_done,b U_bb, transposed


def sweep_few(A, V, r, low, high, keep, n_m):
    """Algorithm 1, innermost loop: a few columns, one after another, in units of their grid -> Q; all (columns, out).

    A is changed in place, and ends as each column stood at its turn. V (columns, columns) is U_jk / U_jj above the
    diagonal, r (columns, 1) R_jj = 1 / U_jj. low, high (out,) bound the codes, or are None: no rounding. keep
    (columns, out) is 0 where a weight must go, or None; for n_m it is completed here, just before its M columns.
    """
    Q, E = torch.empty_like(A), torch.empty_like(A[0])
    N, M = n_m or (0, 0)
    for j, (w, q, v) in enumerate(zip(A.unbind(), Q.unbind(), V.unbind())):
        if n_m and j % M == 0:
            cell = keep[j:j + M]  # (M, out)
            score = (A[j:j + M] * r[j:j + M]).abs_().mul_(cell)  # |w_j| / U_jj, 0 where a weight is gone already
            cell.mul_(~smallest(score, len(score) - N, dim=0))
        if low is not None:
            torch.clamp(torch.round(w, out=q), low, high, out=q)  # q_j = quant(w_j)
            if keep is not None:
                q.mul_(keep[j])
        else:
            torch.mul(w, keep[j], out=q)
        torch.sub(w, q, out=E)
        A.addr_(v, E, alpha=-1)  # w_k -= (w_j - q_j) U_jk / U_jj for the k > j of these few; v is zero up to j
    return Q


def sweep(W, factored, bits=None, group_size=None, symmetric=False, keep=None, sparsity=None, n_m=None, block_size=128,
          narrow=None):
    """One pass over the columns of W (out, in): round them (bits), zero some (keep, sparsity or n_m), or both ->
    Swept.

    keep (out, in) bool is False where a weight was pruned before; narrow, a `refit.Narrowed`, is asked for the scale of
    each grid. Works on a transposed copy, so that a column of W is contiguous. A grid, and a mask, is chosen on columns
    to which every error made before them has been applied, wherever the blocks begin. ValueError where they overflow.
    """
    (out, n), R, order = W.shape, factored.R, factored.order
    size, M = min(group_size or n, n), n_m[1] if n_m else 1
    block, step = (max(width // M, 1) * M for width in (block_size, STEP))  # both hold whole patterns
    r = R.diagonal()[:, None]                  # (in, 1) R_jj = 1 / U_jj
    W = W if order is None else W[:, order]
    W = W.T.clone(memory_format=torch.contiguous_format)  # (in, out); becomes W - Q where a column is done
    Q = torch.empty_like(W, dtype=torch.uint8 if bits else W.dtype)  # codes, or weights
    if keep is not None:
        keep = (keep if order is None else keep[:, order]).T.to(W.dtype, copy=True)
    elif sparsity is not None or n_m is not None:
        keep = torch.ones_like(W)  # 1 = stays
    scale, zero, low, high, grids = 1.0, 0.0, None, None, []  # without bits: units of 1, so that one loop serves both
    loss = W.new_zeros(out, dtype=torch.float64)
    for i1, i2 in spans(0, n, block):
        U = inverse(R[i1:i2, i1:i2])           # (columns, columns)
        A = current(W, R, i1, i2, U)           # (columns, out)
        V = (U / U.diagonal()[:, None]).triu_(1)
        if sparsity is not None:  # the block's mask, by the loss each zero would cause (SparseGPT, Algorithm 1)
            score = (A * r[i1:i2]).abs_().mul_(keep[i1:i2]).T.reshape(1, -1)  # (1, out * columns) |w_j| / U_jj
            keep[i1:i2] *= ~smallest(score, round(sparsity * score.numel())).view(out, i2 - i1).T
        for j1, j2 in spans(i1, i2, step, size):
            here, few, later = slice(j1, j2), slice(j1 - i1, j2 - i1), slice(j2 - i1, None)
            # a grid for the group that begins here, and may reach beyond its block
            if bits is not None and j1 % size == 0:
                end = min(j1 + size, n)
                members = A[j1 - i1:end - i1] if end <= i2 else current(W, R, j1, end)  # (members, out)
                members = members if keep is None else members * keep[j1:end]
                scale, zero = grid(members.T, bits, symmetric)  # (out,)
                if narrow is not None:
                    scale = narrow(members, scale, zero, bits, r[j1:end].square())
                low, high = -zero, 2**bits - 1 - zero
                grids.append((scale, zero))
            # a few columns, one at a time
            a = A[few] / scale  # (columns, out)
            q = sweep_few(a, V[few, few], r[here], low, high, keep[here] if keep is not None else None, n_m)
            # their errors, to the rest of the block
            E = (a - q).mul_(scale)
            loss += (E * r[here]).square_().sum(0).div_(2)
            A[later].addmm_(V[few, later].T, E, alpha=-1)
            W[here] -= q * scale
            Q[here] = q + zero
    check_finite(W, "W - Q after the sweep")  # errors that later columns make up for may grow beyond the type of W
    return collect(Q.T, keep.T if keep is not None else None, order, grids, size, bits, loss)


def collect(Q, keep, order, grids, size, bits, loss):
    """The columns in their own order again -> Swept. grids: (scale, zero) of each group, in the order of the sweep."""
    back = slice(None) if order is None else torch.argsort(order)
    keep = keep[:, back].bool().contiguous() if keep is not None else None
    if not bits:
        return Swept(Q[:, back].float().masked_fill(~keep, 0.0), keep, None, loss)  # masked_fill: -0 becomes 0
    scale, zero = (torch.stack(t, dim=1) for t in zip(*grids))  # (out, groups)
    group = (torch.arange(Q.shape[1], device=Q.device) // size)[back]
    codes = Q[:, back].to(torch.uint8).contiguous()
    return Swept(None, keep, Quantized(codes, scale.float(), zero.to(torch.uint8), group, bits), loss)
