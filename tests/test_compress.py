"""
compress.py against oracles that share nothing with it: Algorithm 1 written out in float64 with the inverse it never forms, closed
forms, cases worked by hand, and properties on random shapes.

    python -m pytest tests/test_compress.py
"""
import pytest
import torch

from compress import gptq, magnitude, rtn, sparsegpt, wanda
from sweep import factor, sweep

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 16), (17, 33), (8, 61), (24, 150)]


def problem(out, n, tokens=None, seed=0):
    """A random W (out, n) and the H (n, n) of correlated inputs, float64."""
    g = torch.Generator().manual_seed(1000 * seed + 10 * out + n)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5 + 0.3 * torch.eye(n, dtype=torch.float64)
    X = torch.randn(tokens or 3 * n, n, generator=g, dtype=torch.float64) @ mix * (0.1 + torch.rand(n, generator=g))
    return torch.randn(out, n, generator=g, dtype=torch.float64), X.T @ X / X.shape[0]


def error(W, Q, H):
    """tr(D H Dᵀ), the mean squared change of the output summed over outputs."""
    D = W.double() - Q.double()
    return float(torch.einsum("ij,jk,ik->", D, H.double(), D))


def naive(W, H, bits=None, size=None, symmetric=False, damp=0.01, keep=None, sparsity=None, n_m=None, block=128):
    """Algorithm 1 as the papers have it, one column at a time, with U from the inverse -> (Q, keep, loss, scales)."""
    W, n = W.double().clone(), W.shape[1]
    Hd = H.double() + damp * H.double().diagonal().mean() * torch.eye(n, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(Hd), upper=True)
    keep = torch.ones_like(W, dtype=torch.bool) if keep is None else keep.clone()
    size, loss, scales = size or n, 0.0, []
    for j in range(n):
        if sparsity is not None and j % block == 0:
            score = (W[:, j:j + block] / U.diagonal()[j:j + block]).abs()
            gone = score.flatten().argsort(stable=True)[:round(sparsity * score.numel())]
            keep[:, j:j + block] = torch.ones(score.numel(), dtype=torch.bool).index_fill(0, gone, False).view_as(score)
        if bits is not None and j % size == 0:
            members = W[:, j:j + size] * keep[:, j:j + size]
            low, high = members.min(1).values.clamp(max=0), members.max(1).values.clamp(min=0)
            if symmetric:
                high = torch.maximum(-low, high)
                low = -high
            scale = ((high - low) / (2**bits - 1)).float().double()
            scale[scale == 0] = 1
            zero = torch.full_like(scale, 2**(bits - 1)) if symmetric else torch.round(-low / scale)
            scales.append(scale)
        if n_m is not None and j % n_m[1] == 0:
            score = (W[:, j:j + n_m[1]] / U.diagonal()[j:j + n_m[1]]).abs()
            for i, row in enumerate(score):
                for k in row.argsort(stable=True)[:max(len(row) - n_m[0], 0)]:
                    keep[i, j + k] = False
        w = W[:, j].clone()
        q = w if bits is None else scale * (torch.clamp(torch.round(w / scale) + zero, 0, 2**bits - 1) - zero)
        q = torch.where(keep[:, j], q, 0.0)
        e = (w - q) / U[j, j]
        loss += float((e**2).sum()) / 2
        W[:, j:] -= e[:, None] * U[j, j:]
        W[:, j] = q
    return W, keep, loss, scales


# ---- GPTQ

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits, size, symmetric", [(2, None, False), (3, 7, False), (4, 16, True), (3, 1000, False), (8, 1, False)])
def test_gptq_is_algorithm_1(shape, bits, size, symmetric):
    W, H = problem(*shape)
    Q = gptq(W, H, bits, size, symmetric)
    expected, _, _, scales = naive(W, H, bits, size, symmetric)
    torch.testing.assert_close(Q.dequantize(), expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Q.scale, torch.stack(scales, 1).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [dict(sparsity=0.5), dict(sparsity=0.3, bits=4, size=None), dict(n_m=(2, 4)), dict(n_m=(1, 3)),
                                      dict(n_m=(4, 8), bits=3, size=16)])
def test_sparsegpt_is_algorithm_1(shape, settings):
    W, H = problem(*shape)
    expected, keep, _, _ = naive(W, H, **settings, block=128 if "sparsity" in settings else 1)
    if "size" in settings:
        settings = {**{k: v for k, v in settings.items() if k != "size"}, "group_size": settings["size"]}
    weight, kept = sparsegpt(W, H, **settings)
    assert torch.equal(kept, keep)
    torch.testing.assert_close(weight, expected.float(), rtol=1e-5, atol=1e-6)


def test_loss_is_the_quadratic_form():  # Q1
    W, H = problem(17, 61)
    f = factor(H, 61, dtype=torch.float64)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(61, dtype=torch.float64)
    for settings in (dict(bits=3), dict(bits=3, group_size=8), dict(sparsity=0.5), dict(n_m=(2, 4), bits=4, group_size=8)):
        swept = sweep(W, f, **settings)
        assert float(swept.loss.sum()) == pytest.approx(error(W, swept.dequantize(), damped) / 2, rel=1e-6)


@pytest.mark.parametrize("size", [None, 8, 24, 100])
def test_block_size_changes_nothing(size):  # Q2
    W, H = problem(9, 150)
    expected = gptq(W, H, 3, size, block_size=150)
    for block in (1, 7, 16, 40, 128):
        Q = gptq(W, H, 3, size, block_size=block)
        assert torch.equal(Q.codes, expected.codes) and torch.equal(Q.zero, expected.zero)
        torch.testing.assert_close(Q.scale, expected.scale, rtol=1e-6, atol=0)


def test_diagonal_hessian_is_rtn():  # Q3
    W, _ = problem(6, 50)
    H = torch.diag(torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1)
    for size in (None, 16):
        for symmetric in (False, True):
            for a, b in zip(gptq(W.float(), H, 3, size, symmetric), rtn(W.float(), 3, size, symmetric)):
                assert a == b if isinstance(a, int) else torch.equal(a, b)
