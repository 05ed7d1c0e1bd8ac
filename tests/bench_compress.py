"""
How fast the sweep is: beside its plain twin, beside a peer and beside its floor, on the same W and H in one run.

    python tests/bench_compress.py             # all sizes, a few minutes on one core
    python tests/bench_compress.py --quick     # 768 x 768 only

The plain twin is `gptq_loop` or `sparsegpt_loop` of compress.py: Algorithm 1, one column at a time. The peer is
Algorithm 1 as the papers' code runs it: factor H, invert it, factor the inverse, then column by column with a rank-one
update of the block and a lazy update of the rest after every 128 columns. The floor is the time of what no order of
work avoids:

    factor   in³ / 3 multiplications and additions, timed as the one Cholesky factorization
    update   in² * out multiplications and additions, at the speed of a large matrix product
    loop     in columns times the five torch calls that round one: dispatch, mostly

The last column is our calibration error divided by the peer's; all grids span their weights as in the papers, but where
"search" is named. What search and refit, which are ours, gain is the last table.
"""
import argparse
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from compress import gptq, gptq_loop, rtn, sparsegpt, sparsegpt_loop  # noqa: E402
from engine.columns import factor, inverse, sweep_few  # noqa: E402
from engine.grids import grid  # noqa: E402

SIZES = [(768, 768), (768, 3072), (2048, 2048)]
BLOCK = 128


def problem(out, n, seed=0):
    """A random W (out, n) and the H of 2 n correlated tokens, some inputs far more active than others."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) / n**0.5 * (0.1 + 2 * torch.rand(n, generator=g)) + 0.3 * torch.eye(n)
    X = torch.randn(2 * n, n, generator=g) @ mix
    return torch.randn(out, n, generator=g), X.T @ X / (2 * n)


def twin(W, H, bits=None, size=None, sparsity=None, n_m=None):
    """The plain loop of compress.py, and the factorization it needs."""
    U, keep, size = inverse(factor(H, W.shape[1]).R), torch.ones_like(W).bool(), size or W.shape[1]
    if sparsity is None and n_m is None:
        return gptq_loop(W, U, bits, size, False, keep)
    return sparsegpt_loop(W, U, sparsity, n_m, BLOCK, bits, size, keep)


def peer(W, H, bits=None, size=None, sparsity=None, n_m=None):
    """Algorithm 1 with lazy batches, as the papers' code has it -> Q (out, in)."""
    W, n = W.clone(), W.shape[1]
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    scale, zero = None, None
    for lo in range(0, n, BLOCK):
        hi = min(lo + BLOCK, n)
        B, errors, u = W[:, lo:hi].clone(), torch.zeros(W.shape[0], hi - lo), U[lo:hi, lo:hi]
        gone = torch.zeros_like(B, dtype=torch.bool)
        if sparsity is not None:
            score = (B / u.diagonal()).square()
            gone = score <= score.flatten().sort().values[round(sparsity * score.numel()) - 1]
        for j in range(hi - lo):
            if n_m is not None and j % n_m[1] == 0:
                score = (B[:, j:j + n_m[1]] / u.diagonal()[j:j + n_m[1]]).square()
                gone[:, j:j + n_m[1]].scatter_(1, score.topk(n_m[1] - n_m[0], largest=False).indices, True)
            if bits is not None and (lo + j) % (size or n) == 0:  # later blocks are up to date in W
                later = W[:, hi:lo + j + (size or n)] if lo + j + (size or n) > hi else W[:, :0]
                scale, zero = grid(torch.cat([B[:, j:j + (size or n)], later], dim=1), bits)
            w = B[:, j].clone()
            if bits is None:
                q = w.masked_fill(gone[:, j], 0.0)
            else:
                q = ((w / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale)
            errors[:, j] = (w - q) / u[j, j]
            B[:, j:] -= errors[:, j:j + 1] @ u[j:j + 1, j:]
            B[:, j] = q
        W[:, lo:hi] = B
        W[:, hi:] -= errors @ U[lo:hi, hi:]
    return W


def seconds(function, repeats=3):
    """The fastest of a few runs; with one thread its processor time, which other work does not lengthen."""
    clock, times = time.process_time if torch.get_num_threads() == 1 else time.perf_counter, []
    for _ in range(repeats):
        began = clock()
        function()
        times.append(clock() - began)
    return min(times)


def floor(out, n, H):
    """The three parts that remain, in seconds: factor, update, loop."""
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(n)
    A, B = torch.randn(128, n), torch.randn(n, out)
    update = seconds(lambda: A @ B) * (n * n * out) / (2 * 128 * n * out)
    few, V, bound = torch.randn(16, out), torch.zeros(16, 16), torch.ones(out)
    loop = seconds(lambda: sweep_few(few, V, None, -bound, bound, None, None), 50) * n / 16
    return seconds(lambda: torch.linalg.cholesky_ex(damped)), update, loop


def error(W, Q, H):
    D = (W - Q).double()
    return float(((D @ H.double()) * D).sum())


def main():
    parser = argparse.ArgumentParser(description="Time the sweep beside its plain twin, a peer and its floor.")
    parser.add_argument("--quick", action="store_true", help="768 x 768 only")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = {"gptq 4 bits": (gptq, dict(bits=4), dict(bits=4)),
             "gptq 4 bits, groups of 64": (gptq, dict(bits=4, group_size=64), dict(bits=4, size=64)),
             "gptq 4 bits, groups of 128": (gptq, dict(bits=4, group_size=128), dict(bits=4, size=128)),
             "gptq 4 bits, search, refit": (gptq, dict(bits=4, search=True, refit=True), dict(bits=4)),
             "sparsegpt 50 %": (sparsegpt, dict(sparsity=0.5), dict(sparsity=0.5)),
             "sparsegpt 2:4": (sparsegpt, dict(n_m=(2, 4)), dict(n_m=(2, 4))),
             "sparsegpt 50 %, refit": (sparsegpt, dict(sparsity=0.5, refit=True), dict(sparsity=0.5))}
    print(f"{'size':>11s}  {'method':26s} {'ours s':>7s} {'plain s':>8s} {'peer s':>7s} {'plain / ours':>13s} "
          f"{'peer / ours':>12s} {'ours / floor':>13s}  error / peer's")
    for out, n in SIZES[:1 if args.quick else None]:
        W, H = problem(out, n)
        parts = floor(out, n, H)
        for name, (method, how, plain) in cases.items():
            ours, theirs = seconds(lambda: method(W, H, **how)), seconds(lambda: peer(W, H, **plain), 2)
            slow = seconds(lambda: twin(W, H, **plain), 1)
            result = method(W, H, **how)
            Q = result.dequantize() if method is gptq else result[0]
            relative = error(W, Q, H) / error(W, peer(W, H, **plain), H)
            print(f"{out:5d}x{n:<5d}  {name:26s} {ours:7.3f} {slow:8.3f} {theirs:7.3f} {slow / ours:13.2f} "
                  f"{theirs / ours:12.2f} {ours / sum(parts):13.2f}  {relative:14.6f}", flush=True)
        factored, updated, looped = parts
        print(f"{'':13s}floor: factor {factored:.3f} + update {updated:.3f} + loop {looped:.3f} = {sum(parts):.3f} s")
    print("\nerror / error as published, 256 x 384")
    W, H = problem(256, 384)
    for bits in (2, 3, 4, 8):
        for size in (None, 32, 128):
            plain, *ours = (error(W, Q.dequantize(), H) for Q in (
                gptq(W, H, bits, size), gptq(W, H, bits, size, search=True),
                gptq(W, H, bits, size, refit=True), gptq(W, H, bits, size, search=True, refit=True),
                rtn(W, bits, size)))
            print(f"  gptq {bits} bits, groups {str(size):5s} " + ", ".join(
                f"{what} {e / plain:.3f}" for what, e in zip(("search", "refit", "both", "round-to-nearest"), ours)))
    for pattern in (dict(sparsity=0.3), dict(sparsity=0.5), dict(sparsity=0.7), dict(n_m=(2, 4))):
        plain, refitted = (error(W, sparsegpt(W, H, **pattern, refit=refit)[0], H) for refit in (False, True))
        print(f"  sparsegpt {pattern}: refit {refitted / plain:.3f}")


if __name__ == "__main__":
    main()
