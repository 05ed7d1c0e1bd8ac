"""
The column sweep: the core of GPTQ and of SparseGPT, once, as pure functions (W, H, settings) -> result.

What it does: the grid that codes stand on, the factorization of H, and one pass over the columns that rounds them,
zeroes some of them, or both. What it leaves out: `compress.py` has the methods by name, the walk over a model and the
script.

Sources: Frantar et al. 2023 (GPTQ, arXiv 2210.17323) and Frantar & Alistarh 2023 (SparseGPT, arXiv 2301.00774),
Algorithm 1 of each.

The one idea. A layer computes X Wᵀ. Replacing W by Q costs, per token,

    mean |x (W - Q)ᵀ|² = tr(D H Dᵀ),    D = W - Q,  H = mean of x xᵀ,

so the small matrix H is all there is to know about the data, and every row of W is a problem of its own. The sweep
takes the columns in order; each is replaced by what it is rounded to (or by zero), and those still free make up for
the error:

    e_j = (w_j - q_j) / U_jj,    W[:, j:] -= e_j U[j, j:],    UᵀU = H⁻¹, U upper triangular           (Algorithm 1)

with w_j the column as it stands at its turn. Each step costs e_j² / 2 in the loss tr(D H Dᵀ) / 2, whatever comes
later.

How it is done here. The papers factor H, invert it, and factor the inverse. We factor once: H = R Rᵀ with R upper
triangular, a Cholesky factorization read from the last row up. Then U = R⁻¹, as (R⁻¹)ᵀ R⁻¹ = (R Rᵀ)⁻¹, and H⁻¹ is
never formed. All that the sweep needs of U is near its diagonal:

    U_jj = 1 / R_jj                      what an error in column j costs
    U_bb = R_bb⁻¹                        b a block of columns: the diagonal blocks of triangular inverses are inverses
    w_b = W_b + D_done R_done,b U_bb     a block as Algorithm 1 has it when all before it are done, W_b the original

The last line: the steps add up to D = E U, so E = D R, and the papers' update w_b = W_b - E U_done,b becomes ours
because R U = 1 has zeros above its diagonal. Inside a block the loop is the papers'. One factorization instead of
three, and the better conditioned one; tests/test_compress.py compares the result with the papers' form in float64.
(QuIP, Chee et al. 2023, arXiv 2307.13304, proves the kindred fact that GPTQ is rounding with linear feedback from the
factors of H.)

Grids. A group's grid is fitted to its columns as all errors before them left them. These are spread wider than the
original ones, so a grid that spans them all has larger steps than one fitted too early: at 2 and 3 bits that costs more
than it gains. `narrower` is the remedy, and more than that: it takes the width that loses least.

Floor: the block updates take in² * out multiplications and additions, the factorization in³ / 3, and the loop over
the columns calls torch four or five times a column. `python tests/bench_compress.py` prints all three beside the
time.
"""
from typing import NamedTuple

import torch
from torch import Tensor

STEP = 16  # columns done one by one before the rest of their block hears of it: a lazy batch inside the lazy batch
SHRINK = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # what the search multiplies a grid's range with


class Quantized(NamedTuple):
    """A weight on a grid: row i, column j stands for scale[i, g] * (codes[i, j] - zero[i, g]) with g = group[j]."""
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


class Factor(NamedTuple):
    """What the sweep needs to know of H; layers that read the same inputs share it."""
    R: Tensor             # (in, in) upper: R Rᵀ = H + damp * mean(diag H) * I, rows and columns in `order`
    order: Tensor | None  # (in,) the columns of W in the order they are swept; None: as they are
    damp: float           # the share of the mean diagonal that was added in the end
    retries: int          # how often it had to be raised


class Swept(NamedTuple):
    """What one sweep over the columns leaves behind."""
    weight: Tensor | None        # (out, in) float32, or None where `quantized` says it
    keep: Tensor | None          # (out, in) bool; None if nothing was pruned
    quantized: Quantized | None
    loss: Tensor | None = None   # (out,) sum over j of (w_j - q_j)² / (2 U_jj²): row i has (D H_damped Dᵀ)_ii / 2
    expected: Tensor | None = None  # (out,) of rows that took narrower grids: the average loss on those that span all

    repeated: int = 0            # rows that were swept twice

    def dequantize(self):
        """(out, in) float32."""
        return self.weight if self.quantized is None else self.quantized.dequantize()


# ---- checks: bad input is named with its numbers before any work is done

def check_weight(W):
    """W (out, in) as float64 if it came so, else as float32: the precision of all that follows."""
    if W.dim() != 2 or 0 in W.shape:
        raise ValueError(f"W must be a matrix (out, in) of at least 1 x 1, got shape {tuple(W.shape)}")
    W = W.detach().to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    if not W.sum().isfinite() and not W.isfinite().all():  # the sum is the cheap look; a finite W may overflow it
        raise ValueError(f"W holds {int((~W.isfinite()).sum())} values that are NaN or infinite, of {W.numel()}")
    return W


def check_hessian(H, n):
    """H (n, n), in float32 or float64."""
    if tuple(H.shape) != (n, n):
        raise ValueError(f"H must be ({n}, {n}) for a weight of {n} inputs, got {tuple(H.shape)}")
    H = H.detach().to(torch.float64 if H.dtype == torch.float64 else torch.float32)
    if not H.sum().isfinite() and not H.isfinite().all():
        raise ValueError(f"H holds {int((~H.isfinite()).sum())} values that are NaN or infinite, of {H.numel()}")
    size = float(H.abs().max())
    bands = range(0, n, 64)  # that fit a cache
    skew = max(float((H[i:i + 64, i:] - H[i:, i:i + 64].T).abs().max()) for i in bands)
    if skew > 1e-4 * size:
        raise ValueError(f"H must be symmetric, but differs from its transpose by {skew:.3g} (largest: {size:.3g})")
    if float(H.diagonal().min()) < 0:
        raise ValueError(f"H is a mean of squares, its diagonal cannot be {float(H.diagonal().min()):.3g}")
    if H[H.diagonal() == 0].any():
        raise ValueError("H has a zero on its diagonal beside entries that are not: no mean of x xᵀ does")
    return H


def check_bits(bits):
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")


def check_count(value, name):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_pattern(sparsity, n_m):
    if (sparsity is None) == (n_m is None):
        raise ValueError(f"give either sparsity or n_m, got sparsity={sparsity!r} and n_m={n_m!r}")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    if n_m is not None and not (len(n_m) == 2 and all(isinstance(i, int) for i in n_m) and 1 <= n_m[0] <= n_m[1]):
        raise ValueError(f"n_m must be two integers N, M with 1 <= N <= M (keep N of every M), got {n_m!r}")


# ---- grids and masks

def grid(W, bits, symmetric=False):
    """Scale and zero-point of the grid that spans the last dimension of W (..., n), and 0 -> two tensors (...).

    Asymmetric: from min to max. Symmetric: from -|max| to |max| with the zero-point in the middle; the step is 2
    |max| / (2**bits - 1), so that the positive end, half a step beyond the last code, is off by no more than half a
    step.
    """
    top = 2**bits - 1
    low, high = W.amin(-1).clamp(max=0), W.amax(-1).clamp(min=0)  # 0 is on every grid: a pruned weight stays pruned
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high / top - low / top).float()  # divided before subtracted: the range itself may overflow
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0).to(W.dtype)  # all zero: any will do
    return scale, torch.full_like(scale, 2**(bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)


def narrower(A, scale, zero, bits, weight):
    """The scale (out,) of the grid, among this one and those that SHRINK makes of it, that costs the columns A
    (columns, out) least: the sum of weight * (a - q)² over the columns; weight is (columns, 1).

    A narrower grid has smaller steps for all, and cuts off a few of the largest. Its zero-point is the same, as both
    ends move alike.
    """
    low, high = -zero, 2**bits - 1 - zero

    def cost(scale):
        q = torch.div(A, scale).round_().clamp_(low, high).mul_(scale)
        return q.sub_(A).square_().mul_(weight).sum(0)

    best, least = scale, cost(scale)
    for shrink in SHRINK:
        tried = (shrink * scale).float().clamp(min=torch.finfo(torch.float32).tiny).to(A.dtype)
        now = cost(tried)
        better = now < least
        if not better.any():
            break  # the still narrower ones cut off still more
        best, least = torch.where(better, tried, best), torch.minimum(now, least)
    return best


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


# ---- the factorization

def factor(H, n, damp=0.01, act_order=False, dtype=torch.float32):
    """For the H (n, n) of n inputs: the upper triangular R (of dtype), R Rᵀ = H + damp * mean(diag H) * I -> Factor.

    A dead input (zero in all of the data) is left out of the mean and depends on nothing. Where H has not full rank
    at this damping, the damping is raised to 1e-6, then tenfold, until it has; how often is in the result.
    `act_order` puts the columns with the largest diagonal first. Raises ValueError if H is so far from positive
    semidefinite that no damping up to 10 helps.
    """
    if not 0 <= damp < float("inf"):
        raise ValueError(f"damp must be a finite number of at least 0, got {damp}")
    H = check_hessian(H, n)
    diagonal = H.diagonal().double()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal = diagonal.masked_fill(dead, 1e-12 * mean)
    order = None
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        H, diagonal = H[order][:, order], diagonal[order]
    H, diagonal = H.flip(0, 1), diagonal.flip(0)  # its ordinary lower Cholesky factor is our R, read backwards
    # L_jj² is what of input j the inputs before it cannot explain. float32 will do while that stands well above its
    # rounding error, else float64 has to; below the rounding error of H itself it is noise, and H has not full rank.
    tries = [(torch.float32, 1e-4), (torch.float64, torch.finfo(H.dtype).eps)][dtype == torch.float64:]
    for retries in range(10):
        for precision, noise in tries:
            damped = H.to(precision, copy=True)
            damped.diagonal().copy_(diagonal + damp * mean)
            L, failed = torch.linalg.cholesky_ex(damped)
            if not failed and bool((L.diagonal().square() > noise * damped.diagonal()).all()):
                return Factor(L.to(dtype).flip(0, 1), order, damp, retries)
        if damp >= 10:
            break
        damp = max(10 * damp, 1e-6)
    raise ValueError(f"H is not positive semidefinite: not even with {damp:g} of its mean diagonal {mean:.3g} added")


# ---- the sweep

def cuts(low, high, *steps):
    """The spans between low, high and the multiples of the steps between: cuts(0, 10, 4, 5) -> 0-4, 4-5, 5-8, 8-10."""
    edges = sorted({low, high, *(i for step in steps for i in range(-(-low // step) * step, high, step))})
    return list(zip(edges, edges[1:]))


def free(W, R, lo, hi, U=None):
    """Columns lo .. hi - 1 as Algorithm 1 has them once all before lo are done: (columns, out).

    W (in, out) holds W - Q in the rows that are done; U is these columns' block of U.
    Source: the last of the three lines at the top of this file.
    """
    if lo == 0:
        return W[:hi].clone()
    U = inverse(R[lo:hi, lo:hi]) if U is None else U
    return torch.addmm(W[lo:hi], (R[:lo, lo:hi] @ U).T, W[:lo])  # W_b + D_done R_done,b U_bb, transposed


def inverse(R):
    """Of one diagonal block, upper triangular; in float64, as a block is small."""
    identity = torch.eye(len(R), dtype=torch.float64, device=R.device)
    return torch.linalg.solve_triangular(R.double(), identity, upper=True).to(R.dtype).contiguous()


def columns(A, V, d, low, high, keep, n_m):
    """Algorithm 1, innermost loop: a few columns, one after another, in units of their grid -> Q; all (columns, out).

    A is changed in place, and ends as each column stood at its turn. V (columns, columns) is U_jk / U_jj above the
    diagonal. low, high (out,) bound the codes, or are None: no rounding. keep (columns, out) is 0 where a weight must
    go, or None. For n_m, keep is written here: N:M is chosen as late as possible, just before its M columns
    (SparseGPT, "Extension to Semi-Structured Sparsity").
    """
    Q, E = torch.empty_like(A), torch.empty_like(A[0])
    N, M = n_m or (0, 0)
    for j, (w, q, v) in enumerate(zip(A.unbind(), Q.unbind(), V.unbind())):
        if n_m and j % M == 0:
            score = (A[j:j + M] * d[j:j + M]).abs_()  # (M, out) |w_j| / U_jj
            torch.logical_not(smallest(score, len(score) - N, dim=0), out=keep[j:j + M])
        if low is not None:
            torch.clamp(torch.round(w, out=q), low, high, out=q)  # q_j = quant(w_j)
            if keep is not None:
                q.mul_(keep[j])
        else:
            torch.mul(w, keep[j], out=q)
        torch.sub(w, q, out=E)
        A.addr_(v, E, alpha=-1)  # w_k -= (w_j - q_j) U_jk / U_jj for the k > j of these few; v is zero up to j
    return Q


def sweep(W, factor, bits=None, group_size=None, symmetric=False, keep=None, sparsity=None, n_m=None, block_size=128,
          search=False):
    """One pass over the columns of W (out, in): round them (bits), zero some (keep, sparsity or n_m), or both ->
    Swept.

    Works on a transposed copy, so that a column of W is contiguous. The lazy batches (GPTQ, "Step 2") are nested
    twice: a column's error reaches the few columns around it at once, its block after at most STEP columns, and the
    others when it is their turn. A grid, and a mask, is chosen on columns that know of every error made before them,
    wherever the blocks begin.
    """
    (out, n), R, order = W.shape, factor.R, factor.order
    size, M = min(group_size or n, n), n_m[1] if n_m else 1
    block, step = (max(width // M, 1) * M for width in (block_size, STEP))  # both hold whole patterns
    d = R.diagonal()[:, None]                  # (in, 1) R_jj = 1 / U_jj
    W = W if order is None else W[:, order]
    W = W.T.clone(memory_format=torch.contiguous_format)  # (in, out); becomes W - Q where a column is done
    Q = torch.empty_like(W, dtype=torch.uint8 if bits else W.dtype)  # codes, or weights
    if keep is not None:
        keep = (keep if order is None else keep[:, order]).T.to(W.dtype)
    elif sparsity is not None or n_m is not None:
        keep = torch.ones_like(W)  # 1 = stays
    scale, zero, low, high, grids = 1.0, 0.0, None, None, []
    loss, expected = W.new_zeros(out, dtype=torch.float64), W.new_zeros(out, dtype=torch.float64)
    narrowed = torch.zeros(out, dtype=torch.bool, device=W.device)
    for i1, i2 in cuts(0, n, block):
        U = inverse(R[i1:i2, i1:i2])           # (columns, columns)
        A = free(W, R, i1, i2, U)              # (columns, out)
        V = (U / U.diagonal()[:, None]).triu_(1)
        if sparsity is not None:  # the block's mask, by the loss each zero would cause (SparseGPT, Algorithm 1)
            score = (A * d[i1:i2]).abs_().T.reshape(1, -1)  # (1, out * columns) |w_j| / U_jj
            keep[i1:i2] = ~smallest(score, round(sparsity * score.numel())).view(out, i2 - i1).T
        for j1, j2 in cuts(i1, i2, step, size):
            here, few, later = slice(j1, j2), slice(j1 - i1, j2 - i1), slice(j2 - i1, None)
            if bits is not None and j1 % size == 0:
                end = min(j1 + size, n)  # a group may reach beyond its block
                members = A[j1 - i1:end - i1] if end <= i2 else free(W, R, j1, end)  # (members, out)
                members = members if keep is None else members * keep[j1:end]
                scale, zero = grid(members.T, bits, symmetric)  # (out,)
                if search:
                    weight = d[j1:end].square()  # (members, 1) 1 / U_jj²
                    expected += scale.square() * (weight.sum() / 24)  # a rounding error: step² / 12, on average
                    widest, scale = scale, narrower(members, scale, zero, bits, weight)
                    narrowed |= scale < widest
                low, high = -zero, 2**bits - 1 - zero
                grids.append((scale, zero))
            a = A[few] / scale  # (columns, out)
            q = columns(a, V[few, few], d[here], low, high, keep[here] if keep is not None else None, n_m)
            E = (a - q).mul_(scale)
            loss += (E * d[here]).square_().sum(0).div_(2)
            A[later].addmm_(V[few, later].T, E, alpha=-1)
            W[here] -= q * scale
            Q[here] = q + zero
    expected = expected.masked_fill(~narrowed, float("inf"))
    return result(Q.T, keep.T if keep is not None else None, order, grids, size, bits, loss, expected)


def better_rows(a, b, rows):
    """Of two quantized sweeps, a over a whole weight and b over its `rows` (indices), each row from the one that lost
    less: rows are separate problems."""
    pick = b.loss < a.loss[rows]
    at = rows[pick]
    parts = [x.index_copy(0, at, y[pick]) for x, y in zip(a.quantized[:3], b.quantized[:3])]
    return Swept(None, a.keep, Quantized(*parts, *a.quantized[3:]), a.loss.index_copy(0, at, b.loss[pick]),
                 repeated=len(rows))


def result(Q, keep, order, grids, size, bits, loss, expected):
    """Put the columns back in their own order -> Swept."""
    back = slice(None) if order is None else torch.argsort(order)
    keep = keep[:, back].bool().contiguous() if keep is not None else None
    if not bits:
        return Swept(Q[:, back].float().masked_fill(~keep, 0.0), keep, None, loss)  # masked_fill: -0 becomes 0
    scale, zero = (torch.stack(t, dim=1) for t in zip(*grids))  # (out, groups)
    group = (torch.arange(Q.shape[1], device=Q.device) // size)[back]
    quantized = Quantized(Q[:, back].contiguous(), scale.float(), zero.to(torch.uint8), group, bits)
    return Swept(None, keep, quantized, loss, expected)


# ---- after the sweep

def refit(W, H, done):
    """The same mask, or the same grids, with what is still free chosen anew: tr(D H Dᵀ) only falls -> Swept.

    A sweep settles a column by what it knows then. Once all are settled, what is free is an ordinary problem of least
    squares: of the weights that stay, `best_weights`; of codes the scales, then the codes one after another, then the
    scales of these.
    """
    H = H.to(W.dtype)
    if done.quantized is None:
        return done._replace(weight=best_weights(W, H, done.weight.to(W.dtype), done.keep.to(W.dtype)).float())
    quantized = best_scales(W, H, done.quantized)
    quantized = best_codes(W, H, quantized, done.keep)
    return done._replace(quantized=best_scales(W, H, quantized))


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
        fine = better.isfinite() & (better > torch.finfo(torch.float32).tiny)
        better = torch.where(fine, better, scale[:, g]).float()
        G -= (better - scale[:, g])[:, None] * AH
        scale[:, g] = better
    return Quantized(codes, scale, zero, group, bits)


def best_codes(W, H, quantized, keep=None, block=128):
    """One code after another, the best while all others stand as they are -> Quantized. Where keep (out, in) is False
    the code stays.

    A sweep lets only later columns make up for an error; here each makes up for all others. With G = D H, a weight q_j
    that may take any value is best at q_j + G_j / H_jj, and the loss grows with the square of the distance from there:
    the nearest code is the best one. Source: cyclic coordinate descent, QuantEase (Behdin et al. 2023, arXiv
    2309.01885). A pass costs the products of a sweep.
    """
    codes, scale, zero, group, bits = quantized
    n, top, diagonal = len(H), 2**bits - 1, H.diagonal().tolist()
    G = H @ (W - quantized.dequantize()).T  # (in, out)
    Q = codes.T.to(W.dtype, memory_format=torch.contiguous_format)  # (in, out)
    for i1, i2 in cuts(0, n, block):
        S, old = scale[:, group[i1:i2]].T.contiguous(), Q[i1:i2].clone()  # (columns, out)
        free = torch.ones_like(old) if keep is None else keep[:, i1:i2].T.to(W.dtype)
        for j, s, may in zip(range(i1, i2), S, free):
            if diagonal[j] > 0:  # nothing is known of an input that is zero in all of the data
                best = (G[j] / (diagonal[j] * s)).add_(Q[j]).round_().clamp_(0, top)
                change = best.sub_(Q[j]).mul_(may)
                G[j:i2].addr_(H[j:i2, j], change * s, alpha=-1)
                Q[j] += change
        G[i2:].addmm_(H[i2:, i1:i2], (Q[i1:i2] - old).mul_(S), alpha=-1)
    return Quantized(Q.T.to(torch.uint8).contiguous(), scale, zero, group, bits)
