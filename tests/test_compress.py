"""compress.py against oracles that share nothing with it: Algorithm 1 written out in float64 with the inverse it
never forms, closed forms, cases worked by hand, and properties on random shapes.

    python -m pytest tests/test_compress.py
"""
import json
import os

import pytest
import torch
from torch import nn

from checkpoints import load, save
from compress import calibrate, compress, gptq, gptq_loop, magnitude, rtn, sparsegpt, sparsegpt_loop, wanda
from engine.columns import factor, inverse, sweep
from engine.grids import grid
from engine.layers import histogram, report_row, watched
from engine.refit import Narrowed, best_codes, best_scales, best_weights, narrower, refit, search
from engine.settings import CompressConfig
from model import GPT, GPTConfig

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 16), (17, 33), (8, 61), (24, 150)]


def problem(out, n, tokens=None, seed=0):
    """A random W (out, n) and the H (n, n) of correlated inputs, float64."""
    g = torch.Generator().manual_seed(1000 * seed + 10 * out + n)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5 + 0.3 * torch.eye(n, dtype=torch.float64)
    X = torch.randn(tokens or 3 * n, n, generator=g, dtype=torch.float64) @ mix * (0.1 + torch.rand(n, generator=g))
    return torch.randn(out, n, generator=g, dtype=torch.float64), X.T @ X / X.shape[0]


def damped(H, damp=0.01):
    """H + damp * mean(diag H) * I."""
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def error(W, Q, H):
    """tr(D H Dᵀ), the mean squared change of the output summed over outputs."""
    D = W.double() - Q.double()
    return float(torch.einsum("ij,jk,ik->", D, H.double(), D))


def naive(W, H, bits=None, size=None, symmetric=False, damp=0.01, keep=None, sparsity=None, n_m=None, block=128,
          stale=False):
    """Algorithm 1 as the papers have it, one column at a time, with U from the inverse -> (Q, keep, loss, scales).

    stale: grids are fitted to columns without the errors of their own block, as in the published code.
    """
    original, W, n = None, W.double().clone(), W.shape[1]
    Hd = H.double() + damp * H.double().diagonal().mean() * torch.eye(n, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(Hd), upper=True)
    keep = torch.ones_like(W, dtype=torch.bool) if keep is None else keep.clone()
    size, loss, scales = size or n, 0.0, []
    for j in range(n):
        original = W.clone() if j % block == 0 else original
        if sparsity is not None and j % block == 0:
            score = (W[:, j:j + block] / U.diagonal()[j:j + block]).abs()
            gone = score.flatten().argsort(stable=True)[:round(sparsity * score.numel())]
            mask = torch.ones(score.numel(), dtype=torch.bool).index_fill(0, gone, False)
            keep[:, j:j + block] = mask.view_as(score)
        if bits is not None and j % size == 0:
            members = (original if stale else W)[:, j:j + size] * keep[:, j:j + size]
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
@pytest.mark.parametrize("bits, size, symmetric", [(2, None, False), (3, 7, False), (4, 16, True), (3, 1000, False),
                                                   (8, 1, False)])
def test_gptq_is_algorithm_1(shape, bits, size, symmetric):
    W, H = problem(*shape)
    Q = gptq(W, H, bits, size, symmetric)
    expected, _, _, scales = naive(W, H, bits, size, symmetric)
    torch.testing.assert_close(Q.dequantize(), expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Q.scale, torch.stack(scales, 1).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [dict(sparsity=0.5), dict(sparsity=0.3, bits=4, size=None), dict(n_m=(2, 4)),
                                      dict(n_m=(1, 3)), dict(n_m=(4, 8), bits=3, size=16)])
def test_sparsegpt_is_algorithm_1(shape, settings):
    W, H = problem(*shape)
    expected, keep, _, _ = naive(W, H, **settings, block=128 if "sparsity" in settings else 1)
    if "size" in settings:
        settings = {**{k: v for k, v in settings.items() if k != "size"}, "group_size": settings["size"]}
    weight, kept = sparsegpt(W, H, **settings)
    assert torch.equal(kept, keep)
    torch.testing.assert_close(weight, expected.float(), rtol=1e-5, atol=1e-6)


TWINS = [dict(bits=2), dict(bits=3, group_size=7), dict(bits=4, group_size=16, symmetric=True),
         dict(bits=3, group_size=32, act_order=True), dict(bits=8, damp=0.1), dict(bits=3, group_size=200, masked=True),
         dict(bits=3, group_size=24, masked=True, act_order=True), dict(sparsity=0.5), dict(sparsity=0.3, bits=4),
         dict(sparsity=0.7, block_size=24, bits=3, group_size=32), dict(n_m=(2, 4)), dict(n_m=(4, 8), masked=True),
         dict(n_m=(1, 3), bits=3, group_size=12), dict(sparsity=0.6, masked=True)]


@pytest.mark.parametrize("settings", TWINS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (17, 33), (24, 150), (96, 192)])
def test_the_plain_loops_and_the_fast_sweep_are_twins(settings, shape):
    """In float64 not one code, mask or zero differs; weights agree to the rounding of float32."""
    settings, (out, n) = dict(settings), shape
    W, H = problem(out, n)
    masked, act_order = settings.pop("masked", False), settings.pop("act_order", False)
    damp = settings.get("damp", 0.01)
    keep = torch.rand(out, n, generator=torch.Generator().manual_seed(n)) > 0.4 if masked else None
    every = torch.ones(out, n, dtype=torch.bool) if keep is None else keep
    f = factor(H, n, damp, act_order, torch.float64)
    size = min(settings.get("group_size") or n, n)
    if "sparsity" in settings or "n_m" in settings:
        weight, kept = sparsegpt(W, H, **settings, mask=keep)
        plain, plain_kept = sparsegpt_loop(W, inverse(f.R), settings.get("sparsity"), settings.get("n_m"),
                                           settings.get("block_size", 128), settings.get("bits"), size, every)
        assert torch.equal(kept, plain_kept) and not kept[~every].any()
        assert torch.equal(weight == 0, plain.float() == 0)
        torch.testing.assert_close(weight, plain.float(), rtol=2e-6, atol=1e-6)
        return
    Q = gptq(W, H, **settings, act_order=act_order, mask=keep)
    order = torch.arange(n) if f.order is None else f.order
    codes, scale, zero = gptq_loop(W[:, order], inverse(f.R), settings["bits"], size, settings.get("symmetric", False),
                                   every[:, order])
    assert int((codes != Q.codes[:, order]).sum()) == 0
    assert torch.equal(zero.to(torch.uint8), Q.zero)
    torch.testing.assert_close(scale.float(), Q.scale, rtol=2e-7, atol=0)
    assert not Q.dequantize()[~every].any()


def test_loss_is_the_quadratic_form():  # Q1
    W, H = problem(17, 61)
    f = factor(H, 61, dtype=torch.float64)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(61, dtype=torch.float64)
    for settings in (dict(bits=3), dict(bits=3, group_size=8), dict(sparsity=0.5),
                     dict(n_m=(2, 4), bits=4, group_size=8)):
        swept = sweep(W, f, **settings)
        assert float(swept.loss.sum()) == pytest.approx(error(W, swept.dequantize(), damped) / 2, rel=1e-6)


@pytest.mark.parametrize("size", [None, 8, 24, 100])
def test_block_size_changes_nothing(size):  # Q2
    W, H = problem(9, 150)
    for narrow in (False, True):
        expected = gptq(W, H, 3, size, block_size=150, search=narrow)
        for block in (1, 7, 16, 40, 128):
            Q = gptq(W, H, 3, size, block_size=block, search=narrow)
            assert torch.equal(Q.codes, expected.codes) and torch.equal(Q.zero, expected.zero)
            torch.testing.assert_close(Q.scale, expected.scale, rtol=1e-6, atol=0)


def test_diagonal_hessian_is_rtn():  # Q3
    W, _ = problem(6, 50)
    H = torch.diag(torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1)
    for size in (None, 16):
        for symmetric in (False, True):
            for a, b in zip(gptq(W.float(), H, 3, size, symmetric), rtn(W.float(), 3, size, symmetric)):
                assert a == b if isinstance(a, int) else torch.equal(a, b)

def test_act_order_puts_the_columns_back():  # Q7
    W, H = problem(9, 40)
    order = H.diagonal().argsort(descending=True)
    for size in (None, 6):
        expected, _, _, _ = naive(W[:, order], H[order][:, order], 3, size)
        Q = gptq(W, H, 3, size, act_order=True)
        torch.testing.assert_close(Q.dequantize()[:, order], expected.float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(Q.group[order], torch.arange(40) // (size or 40))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_never_above_rounding_to_nearest(bits):  # Q4; greedy can lose on a handful of weights, not on a layer
    for seed in range(5):
        W, H = problem(24, 48, seed=seed)
        for size in (None, 16):
            nearest = error(W, rtn(W, bits, size).dequantize(), H)
            for more in ({}, {"act_order": True}, {"search": True}):
                assert error(W, gptq(W, H, bits, size, **more).dequantize(), H) < nearest
    if bits == 8:
        assert error(W, gptq(W, H, 8).dequantize(), H) < 1e-4 * error(W, 0 * W, H)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_never_above_the_published_grids(bits, symmetric):  # whole rows, and groups smaller than their block
    for seed, shape in enumerate([(24, 96), (24, 96), (24, 96), (16, 260)]):
        W, H = problem(*shape, seed=seed)
        for size in (None, 32, 12):
            stale = naive(W, H, bits, size, symmetric, stale=True)[0]
            ours = gptq(W, H, bits, size, symmetric, search=True)
            assert error(W, ours.dequantize(), H) < 0.98 * error(W, stale, H)


@pytest.mark.parametrize("bits, size, shape, low, high", [
    (2, 32, (24, 96), 1.2, 1.57), (3, 32, (24, 96), 0.9, 1.16), (4, 32, (24, 96), 0.9, 1.0), (2, 4, (24, 96), 0.7, 0.9),
    (3, 8, (24, 96), 0.8, 0.95), (2, 96, (32, 300), 1.1, 1.45), (3, 96, (32, 300), 0.95, 1.15),
    (4, 64, (32, 300), 0.91, 1.09), (3, 128, (32, 300), 0.999, 1.001)])
def test_what_the_default_costs_against_the_published_grids(bits, size, shape, low, high):
    """Error / error of the reference's grids, as the docstring of gptq has it: 1 / 1.57 is 36 % less. A group of a
    whole block has the same grid either way."""
    for seed in range(4):
        W, H = problem(*shape, seed=seed)
        stale = error(W, naive(W, H, bits, size, stale=True)[0], H)
        assert low < error(W, gptq(W, H, bits, size).dequantize(), H) / stale < high
        assert error(W, gptq(W, H, bits, size, search=True).dequantize(), H) < 0.95 * stale


@pytest.mark.parametrize("settings", [dict(bits=2), dict(bits=3, group_size=7, act_order=True), dict(bits=8),
                                      dict(bits=4, symmetric=True, group_size=16)])
def test_refit_scales_are_the_best_there_are(settings):
    """Oracle: a step of any single scale either way costs more; one scale a row has a closed form."""
    for seed in range(3):
        W, H = problem(6, 40, seed=seed)
        plain = gptq(W, H, **settings)
        best = best_scales(W, H, plain)
        assert torch.equal(plain.codes, best.codes) and torch.equal(plain.zero, best.zero)
        assert error(W, best.dequantize(), H) < error(W, plain.dequantize(), H)
        A = best.codes.double() - best.zero[:, best.group]
        if best.scale.shape[1] == 1:
            exact = ((A @ H) * W).sum(1) / ((A @ H) * A).sum(1)
            torch.testing.assert_close(best.scale[:, 0].double(), exact, rtol=1e-6, atol=0)
        last = best.scale.shape[1] - 1  # the group that was fitted when all others were
        for step in (0.999, 1.001):
            scale = best.scale.clone()
            scale[:, last] *= step
            assert error(W, best._replace(scale=scale).dequantize(), H) > error(W, best.dequantize(), H)


@pytest.mark.parametrize("settings", [dict(bits=2), dict(bits=3), dict(bits=4, symmetric=True), dict(bits=3, size=16),
                                      dict(bits=4, size=32), dict(bits=8), dict(sparsity=0.3), dict(sparsity=0.7),
                                      dict(n_m=(2, 4)), dict(sparsity=0.5, bits=4)])
def test_refit_is_never_above_the_published_algorithm(settings):
    """On random weights, of one row and of many; the grids of the published code, where they are another's."""
    for shape in ((1, 40), (13, 131), (40, 12), (24, 96)):
        for seed in range(3):
            W, H = problem(*shape, seed=seed)
            published = error(W, naive(W, H, **settings, stale=True)[0], H)
            how = dict(settings)
            size = how.pop("size", None)
            Q = gptq(W, H, group_size=size, **how, refit=True).dequantize() if not {"sparsity", "n_m"} & how.keys() \
                else sparsegpt(W, H, **how, refit=True)[0]
            assert error(W, Q, H) < published, (shape, seed)


def codes_one_by_one(W, H, quantized, keep):
    """The slow way: for each column in turn every code is tried in every row, and the cheapest stays -> codes."""
    codes, scale, zero, group, bits = quantized
    codes, offset, s = codes.double(), zero[:, group].double(), scale[:, group].double()
    for j in range(W.shape[1]):
        costs = []
        for code in range(2**bits):
            tried = codes.clone()
            tried[keep[:, j], j] = code
            D = W - (tried - offset) * s
            costs.append(((D @ H) * D).sum(1))
        codes[keep[:, j], j] = torch.stack(costs).argmin(0).double()[keep[:, j]]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("settings", [dict(bits=2), dict(bits=3, group_size=7, act_order=True),
                                      dict(bits=4, symmetric=True, group_size=16), dict(bits=3, search=True)])
@pytest.mark.parametrize("masked", [False, True])
def test_refit_codes_are_each_the_best_while_the_others_stand(settings, masked):
    for n, block in ((24, 128), (40, 16), (9, 4)):
        W, H = problem(6, n)
        keep = torch.rand(6, n, generator=torch.Generator().manual_seed(n)) > 0.4 if masked else torch.ones(6, n).bool()
        done = gptq(W, H, **settings, mask=keep if masked else None)
        ours = best_codes(W, H, done, keep if masked else None, block)
        assert torch.equal(ours.codes, codes_one_by_one(W, H, done, keep))
        assert torch.equal(ours.dequantize()[~keep], torch.zeros(int((~keep).sum())))
        assert torch.equal(ours.scale, done.scale) and torch.equal(ours.group, done.group)
        both = gptq(W, H, **settings, mask=keep if masked else None, refit=True)  # scales, codes, scales; H damped
        Hd = damped(H)
        twice = best_codes(W, Hd, best_scales(W, Hd, done), keep if masked else None)
        assert torch.equal(both.codes, twice.codes) and torch.equal(both.scale, best_scales(W, Hd, twice).scale)
        assert error(W, both.dequantize(), Hd) < error(W, twice.dequantize(), Hd)
        assert torch.equal(both.dequantize()[~keep], torch.zeros(int((~keep).sum())))
        errors = [error(W, q.dequantize(), H) for q in (both, best_scales(W, H, done), done, ours)]
        assert errors[0] < errors[1] < errors[2] > errors[3]


def test_refit_rounds_an_input_that_is_always_zero():
    W, H = problem(5, 12)
    H[3], H[:, 3] = 0, 0
    best = gptq(W, H, 3, refit=True)
    nearest = (W[:, 3] / best.scale[:, 0] + best.zero[:, 0]).round().clamp(0, 7)
    assert torch.equal(best.codes[:, 3].double(), nearest) and bool(best.scale.isfinite().all())


def test_refit_codes_in_float32_and_at_the_ends_of_its_range():
    W, H = problem(16, 200)
    exact = error(W, gptq(W, H, 3, refit=True).dequantize(), H)
    assert error(W, gptq(W.float(), H.float(), 3, refit=True).dequantize(), H) == pytest.approx(exact, rel=0.02)
    for size in (1e-36, 1e-18, 1e18, 1e36):
        for W_size, H_size in ((size, 1.0), (1.0, size)):
            done = gptq((W_size * W).float(), (H_size * H).float(), 3, refit=True)
            assert bool(done.scale.isfinite().all()) and int(done.codes.max()) < 8
            if W_size * H_size**0.5 > 1e-20:
                assert error(W, done.dequantize().double() / W_size, H) < 1.2 * exact


@pytest.mark.parametrize("pattern", [dict(sparsity=0.5), dict(n_m=(2, 4)), dict(sparsity=1.0), dict(sparsity=0.0)])
def test_refit_weights_go_where_least_squares_has_them(pattern):
    """Oracle: each row's kept weights by a solver, H_kk w_k = (H w)_k; a step for each input gets there."""
    W, H = problem(5, 24)
    f = factor(H, 24, dtype=torch.float64)
    swept = sweep(W, f, **pattern)
    few, many = (swept._replace(weight=best_weights(W, H, swept.weight.double(), swept.keep.double(), steps).float())
                 for steps in (2, 60))
    weight, keep = sparsegpt(W, H, **pattern, refit=True)
    assert torch.equal(keep, swept.keep) and torch.equal(weight != 0, keep)
    errors = [error(W, done.weight, H) for done in (swept, few, refit(W, H, swept, f.damp), many)]
    assert all(b <= a + 1e-12 for a, b in zip(errors, errors[1:]))
    assert errors[2] == pytest.approx(error(W, weight, H), abs=1e-12)
    assert keep.all() or not keep.any() or errors[2] < 0.9 * errors[0]
    for w, k, got in zip(W, keep, many.weight):
        exact = torch.linalg.solve(H[k][:, k], (H @ w)[k])
        torch.testing.assert_close(got[k].double(), exact, rtol=1e-4, atol=1e-5)


def test_a_diagonal_hessian_leaves_nothing_to_search_or_refit():  # Q3, S3 with all that is offered
    W, H = problem(6, 32)[0].float(), torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.1)
    assert torch.equal(gptq(W, H, 3, 8).dequantize(), rtn(W, 3, 8).dequantize())
    assert torch.equal(best_codes(W, H, rtn(W, 3, 8)).dequantize(), rtn(W, 3, 8).dequantize())
    assert torch.equal(sparsegpt(W, H, 0.5, refit=True)[0], sparsegpt(W, H, 0.5)[0])


def test_narrower_grids_by_hand():
    # Steps of 1 from -1 to 2 around the code 1: 1.9 becomes 2. A step of 0.95 has it, and moves the 2 to 1.9.
    A = torch.tensor([[2.0, 0.0], [1.9, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    scale, zero = grid(A.T, 2)
    assert scale.tolist() == [1.0, 1.0] and zero.tolist() == [1.0, 0.0]
    weight = torch.tensor([[0.01], [1.0], [1.0], [0.01]])
    assert narrower(A, scale, zero, 2, weight).tolist() == pytest.approx([0.95, 1.0])
    assert narrower(A, scale, zero, 2, 1 / weight).tolist() == [1.0, 1.0]  # now the 2 matters


def test_rows_that_a_search_ruined_are_repeated():
    W, H = problem(200, 64)
    f = factor(H, 64, dtype=torch.float64)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    for bits, size in ((2, None), (2, 16), (3, 16), (8, 7)):
        chosen = Narrowed(W)
        plain, narrow = sweep(W, f, bits, size), sweep(W, f, bits, size, narrow=chosen)
        assert float(narrow.loss.sum()) <= float(plain.loss.sum()) * (1 if bits == 8 else 0.9)
        untouched = (narrow.quantized.scale == plain.quantized.scale).all(1)
        assert bool(chosen.expected()[untouched].isinf().all())  # nothing to repeat
        expected = float(chosen.expected()[~untouched].sum())
        assert float(plain.loss.sum()) == pytest.approx(expected, rel=0.4) or bits == 8
        both = search(W, f, bits, size)
        again = narrow.loss > chosen.expected()
        assert both.repeated == int(again.sum()) and (bits == 8 or 0 < both.repeated < 50)
        least = torch.where(again, torch.minimum(plain.loss, narrow.loss), narrow.loss)
        torch.testing.assert_close(both.loss, least, rtol=1e-9, atol=0)
        D = W - both.quantized.dequantize()  # and the codes are those of that loss
        torch.testing.assert_close(((D @ damped) * D).sum(1) / 2, least, rtol=1e-4, atol=1e-9)


def test_float32_loses_nothing():
    W, H = problem(32, 200)
    for size in (None, 32):
        exact = error(W, gptq(W, H, 3, size).dequantize(), H)
        assert error(W, gptq(W.float(), H.float(), 3, size).dequantize(), H) == pytest.approx(exact, rel=0.02)
    exact, single = sparsegpt(W, H, 0.5), sparsegpt(W.float(), H.float(), 0.5)
    assert float((exact[1] != single[1]).float().mean()) < 1e-3
    assert error(W, single[0], H) == pytest.approx(error(W, exact[0], H), rel=1e-3)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_dead_input_keeps_its_weights(damp):  # Q5
    W, H = problem(6, 20)
    H[:, [3, 11]] = 0
    H[[3, 11]] = 0
    assert factor(H, 20, damp).retries == 0
    Q = gptq(W, H, 3, damp=damp)
    off = (W - Q.dequantize())[:, [3, 11]].abs()
    assert bool((off <= Q.scale / 2 * (1 + 1e-5)).all())
    assert torch.equal(Q.codes, gptq(W, H, 3, damp=damp, block_size=5).codes)
    live = [j for j in range(20) if j not in (3, 11)]
    alone = naive(W, H + torch.diag((H.diagonal() == 0).double()), 3, damp=0)[0] if damp == 0 else None
    if alone is not None:
        torch.testing.assert_close(Q.dequantize()[:, live], alone[:, live].float(), rtol=1e-4, atol=1e-5)
    weight, keep = sparsegpt(W, H, 0.3, damp=damp)
    assert weight.isfinite().all()
    assert damp or not keep[:, [3, 11]].any()  # what no input reads is pruned first
    assert gptq(W, 0 * H, 3).dequantize().equal(rtn(W, 3).dequantize())


def test_rank_deficient_hessian_is_damped_more_and_says_so():  # Q6
    W, H = problem(8, 30, tokens=10)
    f = factor(H, 30, damp=0.0)
    assert f.retries > 0 and 1e-6 <= f.damp <= 1e-3
    assert factor(H, 30).retries == 0 and factor(H, 30).damp == 0.01
    assert factor(problem(8, 30)[1], 30, damp=0.0).retries == 0
    Q = gptq(W, H, 4, damp=0.0).dequantize()
    assert Q.isfinite().all() and error(W, Q, H) < error(W, rtn(W, 4).dequantize(), H)
    f = factor(H.float(), 30, damp=0.0)
    assert f.retries > 0 and f.R.isfinite().all()
    for seed in range(20):  # rank 2 of 4: rounding leaves noise of either sign where a pivot should be 0
        X = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert factor(X.T @ X, 4, damp=0.0).retries > 0 and factor((X.T @ X).float(), 4, damp=0.0).retries > 0
    H = problem(8, 30)[1] + 1e5 * torch.ones(30, 30)  # condition number 1e8: more than float32 can factor well
    single, double = (factor(H, 30, 1e-9, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert single.retries == double.retries == 0
    torch.testing.assert_close(single.R.double(), double.R, rtol=1e-4, atol=1e-4)
    R = factor(H, 30, 0.05, dtype=torch.float64).R
    torch.testing.assert_close(R @ R.T, H + 0.05 * H.diagonal().mean() * torch.eye(30, dtype=torch.float64))
    assert torch.equal(R, R.triu())


def test_mask_is_kept_and_compensated():  # S4
    W, H = problem(12, 40)
    keep = magnitude(W, 0.5)
    for size, act_order in ((None, False), (8, True)):
        Q = gptq(W, H, 4, size, act_order=act_order, mask=keep)
        assert bool((Q.dequantize()[~keep] == 0).all())
        assert error(W, Q.dequantize(), H) < error(W, rtn(W * keep, 4, size).dequantize(), H)
    expected = naive(W, H, 4, keep=keep)[0].float()
    torch.testing.assert_close(gptq(W, H, 4, mask=keep).dequantize(), expected, rtol=1e-5, atol=1e-6)
    weight, keep = sparsegpt(W, H, n_m=(2, 4))
    Q = gptq(weight, H, 4, 8, mask=keep).dequantize()
    assert bool((Q[~keep] == 0).all())


# ---- rounding to nearest

def test_rtn_by_hand():
    Q = rtn(torch.tensor([[-1.0, 0.1, 0.4, 2.0]]), 2)  # from -1 to 2 in three steps of 1, zero at code 1
    assert Q.scale.tolist() == [[1.0]] and Q.zero.tolist() == [[1]] and Q.codes.tolist() == [[0, 1, 1, 3]]
    assert Q.dequantize().tolist() == [[-1.0, 0.0, 0.0, 2.0]]
    Q = rtn(torch.tensor([[3.5, 0.5, -1.2, 6.0]]), 3, group_size=3, symmetric=True)  # steps of 1, then of 12 / 7
    assert Q.zero.tolist() == [[4, 4]] and Q.codes.tolist() == [[7, 4, 3, 7]] and Q.group.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(Q.scale, torch.tensor([[1.0, 12 / 7]]))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_row_is_within_half_a_step(bits, symmetric):  # Q8, Q11
    g = torch.Generator().manual_seed(bits)
    row = torch.rand(11, generator=g) + 0.01
    rows = torch.stack([row, -row, row - 0.5, 0 * row, 0 * row + 0.7, 0 * row - 0.7, row * 1e38, row * 1e-42,
                        row * 3e38 - 1e38])
    for size in (None, 1, 4, 11, 50):
        Q = rtn(rows, bits, size, symmetric)
        assert int(Q.codes.max()) < 2**bits and int(Q.zero.max()) < 2**bits
        assert Q.codes.dtype == Q.zero.dtype == torch.uint8
        step = Q.scale[:, Q.group].double()
        assert bool(((rows.double() - Q.dequantize().double()).abs() <= step / 2 * (1 + 5e-5) + 1e-38).all())
        assert not Q.dequantize()[3].any() and Q.scale.isfinite().all() and bool((Q.scale > 0).all())
        G = gptq(rows[:6], torch.eye(11) + 0.3, bits, size, symmetric)
        assert int(G.codes.max()) < 2**bits and int(G.zero.max()) < 2**bits and G.dequantize().isfinite().all()
        assert not G.dequantize()[3].any()


FLOATS = torch.finfo(torch.float32)
ENDS = {  # every way in which a float weight is given back
    "rtn": lambda W, H, **how: rtn(W, **how).dequantize(), "gptq": lambda W, H, **how: gptq(W, H, **how).dequantize(),
    "search": lambda W, H, **how: gptq(W, H, search=True, **how).dequantize(),
    "refit": lambda W, H, **how: gptq(W, H, refit=True, **how).dequantize(),
    "sparsegpt": lambda W, H, bits, **_: sparsegpt(W, H, sparsity=0.5)[0],
    "sparsegpt, refit": lambda W, H, bits, **_: sparsegpt(W, H, sparsity=0.5, refit=True)[0],
    "sparsegpt, bits": lambda W, H, bits, **_: sparsegpt(W, H, n_m=(2, 4), bits=bits)[0]}


@pytest.mark.parametrize("way", ENDS)
def test_weights_near_the_end_of_float32_are_finite_or_refused(way):
    """Never infinite or NaN, and at a third of the largest float always finite: twice the largest weight still fits."""
    refused = 0
    for seed in range(6):
        W, H = problem(6, 24, seed=seed)
        W, H = (W / W.abs().max()).float(), H.float() + 1.5
        for size in (0.33, 0.8, 0.9, 1.0):
            for how in (dict(bits=2), dict(bits=4), *([dict(bits=3, symmetric=True)] if "sparse" not in way else [])):
                try:
                    assert bool(ENDS[way](size * FLOATS.max * W, H, **how).isfinite().all())
                except ValueError as error:
                    assert "NaN or infinite" in str(error) or "beyond float32" in str(error)
                    refused += 1
                    assert size > 0.5
    assert refused


def test_the_grid_that_is_too_large_is_counted():
    """Two bits from -3e38 to 3e38 are steps of 2e38; 0 is one of its values, so that an end lies at 4e38."""
    W = torch.tensor([[-3e38, 0.0, 3e38], [-1.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="1 of 2 grids reach beyond float32, 3.4e.38: .* too large for 2 bits"):
        rtn(W, 2)
    assert rtn(W[1:], 2).scale.tolist() == [[pytest.approx(2 / 3)]]


# ---- pruning

@pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_exactly_the_promised_zeros(sparsity, tied):  # S1
    W, H = problem(7, 45)
    if tied:
        W, H = W.sign(), torch.eye(45, dtype=torch.float64)
    assert int((~magnitude(W, sparsity)).sum()) == round(sparsity * W.numel())
    assert (~wanda(W, H, sparsity)).sum(1).tolist() == [round(sparsity * 45)] * 7
    weight, keep = sparsegpt(W, H, sparsity, block_size=16)
    assert [int((~b).sum()) for b in keep.split(16, 1)] == [round(sparsity * 7 * width) for width in (16, 16, 13)]
    assert torch.equal(weight == 0, ~keep)


@pytest.mark.parametrize("n_m", [(2, 4), (4, 8), (1, 3), (3, 3), (1, 64)])
@pytest.mark.parametrize("n", [1, 16, 45])
def test_n_m_along_the_inputs(n, n_m):  # S2
    W, H = problem(6, n)
    for tied in (False, True):
        W, H = (W.sign(), torch.eye(n, dtype=torch.float64)) if tied else (W, H)
        for keep in (magnitude(W, n_m=n_m), wanda(W, H, n_m=n_m), sparsegpt(W, H, n_m=n_m)[1],
                     sparsegpt(W, H, n_m=n_m, bits=4, group_size=2 * n_m[1])[1]):
            for part in keep.split(n_m[1], dim=1):
                assert part.sum(1).tolist() == [min(n_m[0], part.shape[1])] * 6


def test_pruning_by_hand():
    W = torch.tensor([[1.0, -3.0, 2.0, 0.5], [4.0, -0.1, 0.2, 5.0]])
    assert magnitude(W, 0.5).int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert magnitude(W, n_m=(1, 2)).int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    H = torch.diag(torch.tensor([100.0, 1.0, 1.0, 0.0]))  # norms 10, 1, 1, 0: scores 10 3 2 0, and 40 0.1 0.2 0
    assert wanda(W, H, 0.5).int().tolist() == [[1, 1, 0, 0], [1, 0, 1, 0]]
    assert magnitude(torch.ones(1, 5), 0.4).int().tolist() == [[0, 0, 1, 1, 1]]  # the first ones lose a tie


def test_sparsegpt_against_magnitude():  # S3
    W, H = problem(16, 64)
    for pattern in ({"sparsity": 0.5}, {"n_m": (2, 4)}):
        plain = error(W, W * magnitude(W, **pattern), H)
        between = error(W, W * wanda(W, H, **pattern), H)
        assert error(W, sparsegpt(W, H, **pattern)[0], H) < min(0.8 * plain, between)
        eye = sparsegpt(W, torch.eye(64), **pattern, block_size=64)
        assert torch.equal(eye[1], magnitude(W, **pattern))
        assert torch.equal(eye[0], (W * eye[1]).float())


# ---- what is refused, and what is let in

BAD = {
    "W": [(torch.ones(3), "1 x 1"), (torch.ones(0, 4), "1 x 1"), (torch.tensor([[1.0, float("nan")]] * 2), "2 values"),
          (torch.full((2, 4), float("inf")), "8 values")],
    "H": [(torch.eye(3), r"\(4, 4\)"), (torch.full((4, 4), float("nan")), "16 values"),
          (torch.eye(4) + torch.ones(4, 4).triu(1), "symmetric"), (-torch.eye(4), "-1"),
          (torch.ones(4, 4) - torch.diag(torch.tensor([1.0, 0, 0, 0])), r"times sqrt\(H_ii H_jj\)"),
          (torch.full((4, 4), -50.0).fill_diagonal_(1.0), "semidefinite")],
    "bits": [(1, "got 1"), (9, "got 9"), (3.5, "got 3.5"), (True, "got True")],
    "group_size": [(0, "got 0"), (-1, "got -1"), (1.5, "got 1.5")],
    "block_size": [(0, "got 0")],
    "damp": [(-0.1, "got -0.1"), (float("nan"), "got nan"), (float("inf"), "got inf")],
    "mask": [(torch.ones(2, 3, dtype=torch.bool), r"\(2, 4\)"), (torch.ones(2, 4), "bool")],
    "sparsity": [(-0.1, "got -0.1"), (1.5, "got 1.5"), (float("nan"), "got nan"), (None, "either")],
    "n_m": [((5, 4), r"\(5, 4\)"), ((0, 4), r"\(0, 4\)"), ((2, 4, 1), "got"), ((2.0, 4), "got")],
}


@pytest.mark.parametrize("name, value, message", [(name, *case) for name, cases in BAD.items() for case in cases])
def test_bad_input_is_named(name, value, message):
    good = {"W": torch.ones(2, 4), "H": torch.eye(4)}
    calls = []
    for f in (rtn, gptq, magnitude, wanda, sparsegpt):
        needs = {"bits": 3} if f in (rtn, gptq) else {} if name == "n_m" else {"sparsity": 0.5}
        given = {**good, **needs, name: value}
        takes = f.__code__.co_varnames[:f.__code__.co_argcount]
        if name in takes:
            calls.append((f, {k: v for k, v in given.items() if k in takes}))
    assert calls
    for f, given in calls:
        if name == "H" and message == "semidefinite" and f is wanda:
            continue  # reads the diagonal only
        with pytest.raises(ValueError, match=message):
            f(**given)


def test_group_size_must_hold_whole_patterns():
    with pytest.raises(ValueError, match="6 and 2:4"):
        sparsegpt(torch.ones(2, 12), torch.eye(12), n_m=(2, 4), bits=4, group_size=6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_any_dtype_in_float32_out_nothing_changed(dtype):
    W, H = problem(5, 24)
    W, H = (10 * W).to(dtype), (H + torch.eye(24)).to(dtype if dtype != torch.int64 else torch.float32)
    H = (H + H.T) / 2
    before = W.clone(), H.clone()
    for out in (rtn(W, 4), gptq(W, H, 4, 8, act_order=True, search=True)):
        assert out.dequantize().dtype == out.scale.dtype == torch.float32 and out.codes.dtype == torch.uint8
        assert out.group.dtype == torch.int64
    weight, keep = sparsegpt(W, H, 0.5, bits=4)
    assert weight.dtype == torch.float32
    assert keep.dtype == magnitude(W, 0.5).dtype == wanda(W, H, 0.5).dtype == torch.bool
    sparsegpt(W, H, n_m=(2, 4))
    assert torch.equal(before[0], W) and torch.equal(before[1], H)
    assert torch.equal(rtn(W.T.contiguous().T, 4).codes, rtn(W, 4).codes)  # however it lies in memory


# ---- the walk

def small_model(**config):
    sizes = {**dict(vocab_size=64, context=32, n_layer=3, n_head=2, n_embd=16, n_hidden=40), **config}
    return GPT(GPTConfig(**sizes)).init_weights(torch.Generator().manual_seed(0))


def tokens(N=10, T=20, seed=0):
    return torch.randint(0, 64, (N, T), generator=torch.Generator().manual_seed(seed))


def inputs_of(model, ids, index, name):
    """(B, T, in) what the layer reads in a plain forward pass of the whole model."""
    caught = []
    layer = model.blocks[index].get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda m, args: caught.append(args[0].double()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("config", [{}, dict(position="learned", norm="layernorm", bias=True, activation="relu"),
                                    dict(n_kv_head=1, activation="swiglu", tied=False)])
def test_hessian_is_a_mean_over_real_tokens(config):  # Q9
    model, ids = small_model(**config), tokens()
    lengths = torch.tensor([20, 1, 7, 20, 3, 12, 19, 2, 20, 5])
    walks = [[(i, Hs, n) for i, _, Hs, n in calibrate(model, ids, lengths, rows=rows)] for rows in (10, 3, 1)]
    for walk in walks:
        assert [i for i, _, _ in walk] == [0, 1, 2] and walk[0][2] == int(lengths.sum())
        for i, Hs, _ in walk:
            assert Hs["attn.q"] is Hs["attn.k"] is Hs["attn.v"]
            for name, H in Hs.items():
                rows = [inputs_of(model, row[None, :n], i, name)[0] for row, n in zip(ids, lengths)]  # alone, unpadded
                X = torch.cat(rows)
                torch.testing.assert_close(H, X.T @ X / len(X), rtol=1e-4, atol=1e-5 * float(H.abs().max()))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("lengths", [[0] * 10, [20] * 9 + [21], [20] * 9 + [-1], [20] * 9, [20] * 11, 20, [[20]] * 10])
def test_lengths_that_do_not_fit_the_text_are_refused(lengths):
    """A row has 20 tokens, and there are ten: more, fewer than none, none at all, or another number of rows."""
    model, ids = small_model(), tokens()
    for walk in (lambda: next(calibrate(model, ids, torch.tensor(lengths))),
                 lambda: compress(model, ids, "gptq", torch.tensor(lengths), bits=3)):
        with pytest.raises(ValueError, match=r"lengths must be 10 numbers in \[0, 20\], not all of them 0, got"):
            walk()


def test_blocks_see_the_compressed_ones_before_them():  # Q10
    model, ids = small_model(), tokens()
    new, _ = compress(model, ids, "gptq", bits=2)
    half, _ = compress(model, ids, "gptq", bits=2, targets=("blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v",
                                                            "blocks.0.attn.o", "blocks.0.mlp.up", "blocks.0.mlp.down"))
    X = inputs_of(half, ids, 1, "attn.q").flatten(0, 1)
    W = model.blocks[1].attn.q.weight.detach()
    expected = gptq(W, (X.T @ X / len(X)).float(), 2)
    torch.testing.assert_close(new.blocks[1].attn.q.packed.dequantize(), expected.dequantize(), rtol=1e-4, atol=1e-6)
    X = inputs_of(model, ids, 1, "attn.q").flatten(0, 1)
    other = gptq(W, (X.T @ X / len(X)).float(), 2)
    assert not torch.allclose(new.blocks[1].attn.q.packed.dequantize(), other.dequantize())


SETTINGS = [("rtn", dict(bits=3, group_size=8)), ("gptq", dict(bits=3, group_size=8, act_order=True, search=True)),
            ("gptq", dict(bits=4, symmetric=True)), ("magnitude", dict(sparsity=0.5)), ("wanda", dict(n_m=(2, 4))),
            ("sparsegpt", dict(sparsity=0.6)), ("sparsegpt", dict(n_m=(2, 4), bits=4, group_size=8)),
            ("wanda", dict(sparsity=0.5, bits=4)), ("sparsegpt", dict(n_m=(4, 8)))]


@pytest.mark.parametrize("method, settings", SETTINGS)
def test_compress_gives_a_new_model_and_an_honest_report(method, settings, tmp_path):  # Q12, S5
    model, ids = small_model(bias=True), tokens()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    new, report = compress(model, ids, method, **settings)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert new.wte.weight is new.lm_head.weight  # tied, as it was; but no tensor is the given model's
    theirs = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not any(t.data_ptr() in theirs for t in (*new.parameters(), *new.buffers()))
    assert new.blocks[1].mlp.up.bias is not None
    assert all(isinstance(m, nn.Linear) for m in model.blocks[0].mlp.children())
    assert [r["name"] for r in report] == [f"blocks.{i}.{n}" for i in range(3)
                                           for n in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")]
    for r in json.loads(json.dumps(report)):
        W = model.get_submodule(r["name"]).weight.detach()
        layer = new.get_submodule(r["name"])
        Q = layer.packed.dequantize() if hasattr(layer, "packed") else layer.weight.detach()
        assert r["shape"] == list(W.shape) and r["bits"] == settings.get("bits", 32)
        assert r["tokens"] == 200 and r["seconds"] > 0
        assert r["zeros"] == pytest.approx(float((Q == 0).float().mean()))
        assert r["sparsity"] == (r["zeros"] if method in ("magnitude", "wanda", "sparsegpt") else 0)
        assert r["weight_change"] == pytest.approx(float((Q - W).norm() / W.norm()), rel=1e-4)
        assert 0 <= r["repeated_rows"] <= (r["shape"][0] if method == "gptq" else 0)
        assert r["damp"] == (0.01 if method in ("gptq", "sparsegpt") else 0) and r["retries"] == 0
        if method in ("gptq", "sparsegpt") and "attn" not in r["name"]:
            assert r["error_after"] < r["error_before"]
    for r in json.loads(json.dumps(report)):
        edges, counts = r["histogram"]["edges"], r["histogram"]["counts"]
        assert len(edges) == len(counts) + 1 <= 31 and sum(counts) == r["shape"][0] * r["shape"][1]
        assert all(a < b for a, b in zip(edges, edges[1:])) and edges[0] == -edges[-1]
        middle = [(a + b) / 2 for a, b in zip(edges, edges[1:])]  # the root mean square, but for the width of a bin
        width = (sum(n * x**2 for n, x in zip(counts, middle)) / sum(counts))**0.5
        assert width == pytest.approx(r["weight_change"], abs=(edges[1] - edges[0]) / 2)
        assert len(json.dumps(r["histogram"])) < 500
    X = inputs_of(model, ids, 0, "attn.v").flatten(0, 1)
    D, W = new.blocks[0].attn.v, model.blocks[0].attn.v.weight.detach().double()
    D = W - (D.packed.dequantize() if hasattr(D, "packed") else D.weight.detach())
    assert report[2]["error_after"] == pytest.approx(float((X @ D.T).square().sum(1).mean()), rel=1e-4)
    assert report[2]["relative_output_error"] == pytest.approx(float((X @ D.T).norm() / (X @ W.T).norm()), rel=1e-4)
    save(new, tmp_path / "new.safetensors")
    assert torch.equal(load(tmp_path / "new.safetensors")(ids), new(ids))


def test_histogram_by_hand():
    change = torch.tensor([[-3.0, -0.4, 0, 0, 0.9], [1.1, 0, 3.0, 2.9, 0]])
    assert histogram(change, 3) == {"edges": [-3.0, -1.0, 1.0, 3.0], "counts": [1, 6, 3]}
    assert histogram(0 * change, 3)["counts"] == [0, 10, 0]  # nothing changed
    change = torch.cat([torch.zeros(500), torch.randn(500, generator=torch.Generator().manual_seed(0))])
    drawn = histogram(change)
    assert drawn["counts"][14] > 500 and drawn["edges"][14] == -drawn["edges"][15]  # one bin for what did not change


def test_histogram_counts_more_weights_than_float32_has_whole_numbers():
    change = torch.zeros(2 ** 24 + 3)
    change[0] = 1
    assert sum(histogram(change, 3)["counts"]) == len(change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_inputs_are_summed_in_float32(dtype):
    """H of a model in few bits is that of its own inputs, some of whose squares overflow float16."""
    block = nn.Sequential(nn.Linear(8, 4, bias=False)).to(dtype)
    X = torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    sums = {}
    with watched(block, torch.ones(5, 40, dtype=torch.bool), sums):
        block(X)
    whole = X.double().flatten(0, 1)
    torch.testing.assert_close(sums["0"], whole.T @ whole, rtol=1e-5, atol=1)


def test_report_names_more_damping():  # Q6
    _, report = compress(small_model(), tokens(1, 8), "gptq", bits=4, damp=0.0)
    assert all(r["retries"] > 0 and r["damp"] > 0 for r in report)


def test_report_counts_the_rows_that_a_search_swept_twice():
    """As many as lost more on narrowed grids than the widest ones cost on average."""
    W, H = (t.float() for t in problem(64, 32))
    config, factored = CompressConfig("gptq", 3, search=True), factor(H, 32)
    swept = search(W, factored, 3)
    counted = report_row(W, H, swept, swept, factored, config)["repeated_rows"]
    chosen = Narrowed(W)
    first = sweep(W, factored, 3, narrow=chosen)
    assert counted == int((first.loss > chosen.expected()).sum()) > 0


def test_quantizing_a_pruned_model_keeps_its_zeros():  # S4
    pruned, _ = compress(small_model(), tokens(), "sparsegpt", sparsity=0.5)
    for method in ("gptq", "rtn"):
        new, report = compress(pruned, tokens(), method, bits=4)
        for r in report:
            zeros = pruned.get_submodule(r["name"]).weight == 0
            assert bool((new.get_submodule(r["name"]).packed.dequantize()[zeros] == 0).all()) and r["zeros"] >= 0.5


def test_targets_and_settings_are_checked():
    model, ids = small_model(), tokens()
    new, report = compress(model, ids, "rtn", bits=4, targets=("mlp.down", "blocks.1.attn.q"))
    assert sorted(r["name"] for r in report) == ["blocks.0.mlp.down", "blocks.1.attn.q", "blocks.1.mlp.down",
                                                 "blocks.2.mlp.down"]
    assert isinstance(new.blocks[0].attn.q, nn.Linear)
    everything, _ = compress(model, ids, "rtn", bits=4)
    for bad, message in ((dict(method="prune"), "'prune'"), (dict(method="gptq"), "needs bits"),
                         (dict(method="rtn", bits=4, damp=0.1), "damp"), (dict(method="wanda"), "either"),
                         (dict(method="gptq", bits=4, sparsity=0.5), "sparsity"),
                         (dict(method="rtn", bits=4, targets=("lm_head",)), "lm_head"),
                         (dict(method="rtn", bits=4, targets=("wte",)), "wte")):
        with pytest.raises(ValueError, match=message):
            compress(model, ids, **bad)
    for part in ("p", "lp.up"):  # of the name of mlp.up
        with pytest.raises(ValueError, match=f"no linear layer {part} to compress"):
            compress(model, ids, "rtn", bits=4, targets=(part,))
    with pytest.raises(ValueError, match="no linear layer"):
        compress(everything, ids, "rtn", bits=4)
    for dtype in (torch.uint8, torch.int16, torch.bool, torch.float32):  # an embedding takes none of them
        with pytest.raises(ValueError, match=f"ids must be whole numbers .* got {dtype}"):
            compress(model, ids.to(dtype), "rtn", bits=4)


# ---- faults that were reported (C1 to C12, E11), each with siblings

def quiet(scale, n=16, tokens=64, at=(3,)):
    """Inputs X (tokens, n) float32, the columns `at` so quiet that their squares underflow, not their products."""
    X = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0))
    X[:, list(at)] *= scale
    return X


@pytest.mark.parametrize("at", [(3,), (0, 15), (4, 5, 6)])
@pytest.mark.parametrize("scale", [1e-23, 1e-30, 3e-24])
def test_an_input_whose_square_underflows_is_dead(scale, at):  # C1
    X = quiet(scale, at=at)
    H = X.T @ X / 64
    assert bool((H.diagonal() == 0)[list(at)].all()) and bool(H[list(at)].any())
    zero = H.clone()
    zero[list(at)], zero[:, list(at)] = 0, 0
    W = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for H in (H, H.double()):  # sums of float32 products, kept in float64, as `calibrate` has them
        for settings in (dict(), dict(act_order=True), dict(group_size=4, search=True), dict(refit=True)):
            assert torch.equal(gptq(W, H, 3, **settings).codes, gptq(W, zero, 3, **settings).codes)
        assert torch.equal(wanda(W, H, 0.5), wanda(W, zero, 0.5))
        assert torch.equal(sparsegpt(W, H, 0.5)[0], sparsegpt(W, zero, 0.5)[0])


def test_a_quiet_input_in_a_model_is_no_error():  # C1: a norm of 1e-24, a SwiGLU unit whose gate stays near -67
    for config in ({}, dict(activation="swiglu")):
        model, ids = small_model(**config), tokens()
        with torch.no_grad():
            model.blocks[0].norm1.weight[5] = 1e-24
            if config:
                model.blocks[1].norm2.weight.fill_(1.0)
                model.blocks[1].mlp.gate.weight[7] = 0
                model.blocks[1].mlp.gate.weight[7, 0] = -1e4
        for method, settings in (("gptq", dict(bits=3)), ("sparsegpt", dict(sparsity=0.5)),
                                 ("wanda", dict(n_m=(2, 4)))):
            new, report = compress(model, ids, method, **settings)
            assert bool(new(ids).isfinite().all()) and all(r["retries"] == 0 for r in report)


def test_refit_moves_no_weight_of_a_quiet_input_far():  # C2
    """Oracle: a second text on which the quiet input is as loud as the others."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(200, 24, generator=g, dtype=torch.float64) @ torch.randn(24, 24, generator=g, dtype=torch.float64)
    W = torch.randn(16, 24, generator=g, dtype=torch.float64)
    loud = X.T @ X / 200
    X[:, 5] /= 100
    H = X.T @ X / 200
    for settings in (dict(bits=3), dict(bits=2, group_size=8), dict(sparsity=0.5), dict(n_m=(2, 4))):
        both = [gptq(W, H, **settings, refit=refit).dequantize() if "bits" in settings
                else sparsegpt(W, H, **settings, refit=refit)[0] for refit in (False, True)]
        plain, ours = ((W - Q).norm() / W.norm() for Q in both)
        assert ours < 1.2 * plain
        assert error(W, both[1], loud) < 1.5 * error(W, both[0], loud)
        assert error(W, both[1], H) < error(W, both[0], H)


AGAIN = [("rtn", dict(bits=3)), ("gptq", dict(bits=3)), ("gptq", dict(bits=2, group_size=8, search=True, refit=True)),
         ("gptq", dict(bits=4, act_order=True)), ("magnitude", dict(sparsity=0.2)), ("magnitude", dict(n_m=(2, 4))),
         ("wanda", dict(sparsity=0.9)), ("wanda", dict(n_m=(3, 4), bits=4)), ("sparsegpt", dict(n_m=(2, 4))),
         ("sparsegpt", dict(sparsity=0.2)), ("sparsegpt", dict(sparsity=0.5, refit=True)),
         ("sparsegpt", dict(n_m=(1, 4), bits=3, group_size=8, refit=True))]


@pytest.mark.parametrize("method, settings", AGAIN)
@pytest.mark.parametrize("first", [("magnitude", 0.7), ("sparsegpt", 0.5), ("wanda", 0.3)])
def test_what_is_zero_stays_zero(method, settings, first, tmp_path):  # C3, S4
    ids = tokens()
    pruned, _ = compress(small_model(), ids, first[0], sparsity=first[1])
    save(pruned, tmp_path / "pruned")
    pruned = load(tmp_path / "pruned")  # a file remembers which layers were pruned
    new, report = compress(pruned, ids, method, **settings)
    for r in report:
        zeros, layer = pruned.get_submodule(r["name"]).weight == 0, new.get_submodule(r["name"])
        W = layer.packed.dequantize() if hasattr(layer, "packed") else layer.weight.detach()
        assert zeros.any() and not W[zeros].any(), r["name"]
        if "sparsity" in settings and method != "wanda":  # zeros that were there count among those asked for
            rows = zeros.shape[0] * zeros.shape[1]
            assert int((W == 0).sum()) >= max(int(zeros.sum()), round(settings["sparsity"] * rows))


def test_layers_that_are_no_targets_stay_known_as_pruned():
    """One layer after the other: pruned, pruned, and then the first quantized."""
    ids, names = tokens(), ("blocks.0.mlp.up", "blocks.2.attn.o")
    first, _ = compress(small_model(), ids, "magnitude", sparsity=0.5, targets=names[:1])
    both, _ = compress(first, ids, "magnitude", sparsity=0.5, targets=names[1:])
    last, _ = compress(both, ids, "rtn", bits=4, targets=names[:1])
    assert (first.pruned, both.pruned, last.pruned) == ({names[0]}, set(names), {names[1]})


def test_zeros_that_were_there_count_among_those_asked_for():  # C3
    W, H = problem(16, 64)
    keep = magnitude(W, 0.3)
    for block in (64, 16):
        weight, kept = sparsegpt(W * keep, H, 0.5, block_size=block, mask=keep)
        assert not kept[~keep].any()
        for part in (kept == 0).split(block, 1):
            assert int(part.sum()) == max(round(0.5 * part.numel()), 0) or int(part.sum()) > round(0.5 * part.numel())
    few, kept = sparsegpt(W * keep, H, 0.1, mask=keep)
    assert torch.equal(kept, keep)  # more were there than asked for: all of them stay, and no others go


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method, settings", [*SETTINGS, ("magnitude", dict(n_m=(2, 4)))])
def test_any_cast_saves_and_loads_and_leaves_the_given_model_alone(dtype, method, settings, tmp_path):  # C4
    model, ids = small_model(), tokens()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    new = compress(model, ids, method, **settings)[0].to(dtype)
    assert all(t.dtype == torch.float32 and torch.equal(t, before[name]) for name, t in model.state_dict().items())
    save(new, tmp_path / "cast")
    back = load(tmp_path / "cast")
    assert back.wte.weight.dtype == dtype and torch.equal(back(ids), new(ids))
    with torch.no_grad():
        for t in (*new.parameters(), *new.buffers()):
            t.zero_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method, settings", SETTINGS)
def test_a_model_of_any_dtype_compresses_and_keeps_it(dtype, method, settings, tmp_path):  # C6
    ids = tokens()
    model = small_model(bias=True).to(dtype)
    new, report = compress(model, ids, method, **settings)
    assert new.wte.weight.dtype == dtype and new(ids).dtype == dtype and bool(new(ids).isfinite().all())
    save(new, tmp_path / "new")
    back = load(tmp_path / "new")
    assert torch.equal(back(ids), new(ids)) and back.pruned == new.pruned
    for r in report:  # and the report counts what is there
        layer = new.get_submodule(r["name"])
        W = layer.packed.dequantize() if hasattr(layer, "packed") else layer.weight
        assert r["zeros"] == pytest.approx(float((W == 0).double().mean()), abs=1e-3)


@pytest.mark.parametrize("method, settings, most", [
    ("magnitude", dict(sparsity=0.5), 0.57), ("sparsegpt", dict(n_m=(2, 4)), 0.6), ("wanda", dict(n_m=(4, 8)), 0.7),
    ("gptq", dict(bits=4), 0.28), ("sparsegpt", dict(n_m=(2, 4), bits=4), 0.22)])
def test_a_half_precision_checkpoint_gets_smaller(method, settings, most, tmp_path):  # C6
    model = small_model(n_layer=1, n_embd=128, n_hidden=512).bfloat16()
    save(model, tmp_path / "dense")
    save(compress(model, tokens(), method, **settings)[0], tmp_path / "new")
    rest = model.wte.weight.nbytes
    sizes = [os.path.getsize(tmp_path / name) - rest for name in ("dense", "new")]
    assert sizes[1] < most * sizes[0]


@pytest.mark.parametrize("size", [None, 8])
def test_a_dead_input_in_groups_is_rounded_on_its_grid(size):  # C7
    W, H = problem(6, 24)
    H[:, 11], H[11] = 0, 0
    for act_order in (False, True):
        Q = gptq(W, H, 3, size, act_order=act_order)
        step = Q.scale[:, Q.group[11]]
        assert bool(((W - Q.dequantize())[:, 11].abs() <= step / 2 * (1 + 1e-5)).all())
    _, keep = sparsegpt(W, H, 1 / 24, damp=0.0)  # in the score of its zeros there is nothing but damping
    assert not keep[:, 11].any() and int((~keep).sum()) == 6


def test_a_zero_in_a_dense_layer_is_a_weight_like_any_other():  # C8
    model, ids = small_model(), tokens()
    with torch.no_grad():
        model.blocks[0].attn.q.weight[2, 3] = 0
        model.blocks[1].mlp.up.weight[model.blocks[1].mlp.up.weight.abs() < 0.02] = 0  # as read from few bits
    new, report = compress(model, ids, "gptq", bits=3)
    assert all(r["sparsity"] == 0 for r in report)
    layer, X = model.blocks[0].attn.q, inputs_of(model, ids, 0, "attn.q").flatten(0, 1)
    H = (X.T @ X / len(X)).float()
    assert torch.equal(new.blocks[0].attn.q.packed.dequantize(), gptq(layer.weight, H, 3).dequantize())
    pinned, report = compress(model, ids, "gptq", bits=3, keep_zeros=True)
    zeros = model.blocks[1].mlp.up.weight == 0
    assert not pinned.blocks[1].mlp.up.packed.dequantize()[zeros].any()
    assert all(r["sparsity"] == r["zeros"] for r in report)
    assert report[4]["error_after"] > 0


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e10, 1e17])
def test_the_unit_of_inputs_and_weights_changes_nothing(scale):  # C9
    W, H = problem(12, 40)
    W, H = W.float(), H.float()
    for settings in (dict(bits=3), dict(bits=4, group_size=8, search=True), dict(sparsity=0.5), dict(n_m=(2, 4)),
                     dict(sparsity=0.5, bits=3)):
        for w, h in ((1.0, scale**2), (scale, 1.0), (scale, scale**-2)):
            if not 1e-37 < float(H.diagonal().min()) * h < float(H.max()) * h < 1e37:
                continue
            name = "sparsegpt" if {"sparsity", "n_m"} & settings.keys() else "gptq"
            for again in (False, True):
                plain, other = (globals()[name](a, b, **settings, refit=again) for a, b in ((W, H), (w * W, h * H)))
                if name == "gptq":
                    assert float((plain.codes == other.codes).double().mean()) > 0.98
                    plain, other = plain.dequantize(), other.dequantize()
                else:
                    assert float((plain[1] == other[1]).double().mean()) > 0.98
                    plain, other = plain[0], other[0]
                assert bool(other.isfinite().all())
                assert error(W, other.double() / w, H) == pytest.approx(error(W, plain, H), rel=0.05)


BAD_CALLS = {  # C11: what is wrong -> (what to change in a good call, what the line must say)
    "no rows": (dict(ids=torch.zeros(0, 8, dtype=torch.long)), r"\(0, 8\)"),
    "no tokens": (dict(ids=torch.zeros(3, 0, dtype=torch.long)), r"\(3, 0\)"),
    "ids beyond the vocabulary": (dict(ids=torch.full((2, 8), 64)), r"\[0, 64\).*64"),
    "negative ids": (dict(ids=torch.full((2, 8), -1)), r"\[0, 64\).*-1"),
    "ids in one dimension": (dict(ids=torch.zeros(8, dtype=torch.long)), r"\(8,\)"),
    "ids that are not whole": (dict(ids=torch.zeros(2, 8)), "float32"),
    "more ids than positions": (dict(ids=torch.zeros(2, 40, dtype=torch.long)), "40 tokens.*32"),
    "bits as a float": (dict(bits=3.0), "got 3.0"), "bits as a text": (dict(bits="3"), "got '3'"),
    "no targets": (dict(targets=[]), "targets is an empty list"),
    "a target as a text": (dict(targets="mlp.down"), "list.*'mlp.down'"),
    "a target that is none": (dict(targets=["mlp.side"]), "mlp.side.*there are attn.k"),
    "group size as a float": (dict(group_size=8.0), "got 8.0"),
    "damp as a text": (dict(damp="0.1"), "got '0.1'"),
    "N:M too long": (dict(method="sparsegpt", bits=None, n_m=(2, 300)), "256.*2:300"),
    "N:M of floats": (dict(method="sparsegpt", bits=None, n_m=(2.0, 4)), "integers"),
    "N:M as a number": (dict(method="sparsegpt", bits=None, n_m=4), "integers"),
    "sparsity as a text": (dict(method="wanda", bits=None, sparsity="half"), "'half'"),
    "sparsity beyond 1": (dict(method="wanda", bits=None, sparsity=50), "got 50"),
    "a setting that the method lacks": (dict(method="rtn", refit=True), "rtn has no setting refit"),
    "groups of what is not rounded": (dict(method="sparsegpt", bits=None, sparsity=0.5, group_size=16),
                                      "group_size needs bits.* got 16"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_what_does_not_fit_is_one_line_before_any_work(what, monkeypatch):  # C11
    changes, message = BAD_CALLS[what]
    call = {"ids": tokens(), "method": "gptq", "bits": 3, **changes}
    monkeypatch.setattr(GPT, "embed" if what != "more ids than positions" else "head", None)  # the walk begins with it
    with pytest.raises(ValueError, match=message) as caught:
        compress(small_model(), **call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("N", [1, 4])
def test_a_pattern_that_keeps_all_of_a_group_prunes_nothing(method, N):
    """N of N: every layer is as it was, or rounded as without a pattern; it is not packed as one, which takes N < M."""
    model, ids = small_model(), tokens()
    pruned, _ = compress(model, ids, method, n_m=(N, N))
    for name, weight in model.blocks.state_dict().items():
        torch.testing.assert_close(pruned.blocks.state_dict()[name], weight, rtol=0, atol=0)
    rounded, _ = compress(model, ids, method, n_m=(N, N), bits=4)
    plain, _ = compress(model, ids, "gptq" if method == "sparsegpt" else "rtn", bits=4)
    for a, b in zip(rounded.blocks.modules(), plain.blocks.modules()):
        assert type(a) is type(b)
        if hasattr(a, "packed"):
            assert torch.equal(a.packed.dequantize(), b.packed.dequantize())


def test_a_layer_that_cannot_be_compressed_is_named():  # C11
    ids = tokens()
    for name, place in (("blocks.1.mlp.up", "weight"), ("blocks.2.attn.o", "weight")):
        model = small_model()
        with torch.no_grad():
            getattr(model.get_submodule(name), place)[1, 2] = float("nan")
        with pytest.raises(ValueError, match=f"{name}.*1 values that are NaN"):
            compress(model, ids, "rtn", bits=3)
        with torch.no_grad():
            getattr(model.get_submodule(name), place)[1, 2] = -2e18
        with pytest.raises(ValueError, match=f"{name} holds 2e.18, and squares of more than 1e.18"):
            compress(model, ids, "rtn", bits=3)
    model = small_model()
    with torch.no_grad():
        model.blocks[1].norm2.weight[0] = float("inf")
    for method, settings in (("rtn", dict(bits=3)), ("gptq", dict(bits=3)), ("magnitude", dict(sparsity=0.5))):
        with pytest.raises(ValueError, match="blocks.1.mlp.up: H, the mean of x xᵀ over its inputs, holds"):
            compress(model, ids, method, **settings)
    packed, _ = compress(small_model(), ids, "gptq", bits=3, targets=["attn.q", "mlp.up"])
    with pytest.raises(ValueError, match="attn.q is compressed already.*start from the dense"):
        compress(packed, ids, "gptq", bits=3, targets=["mlp.down", "attn.q"])
    rest, report = compress(packed, ids, "gptq", bits=4)  # the layers that are left
    assert {r["name"].split(".", 2)[2] for r in report} == {"attn.k", "attn.v", "attn.o", "mlp.down"}
    with pytest.raises(ValueError, match="18 are packed already"):
        compress(rest, ids, "gptq", bits=4)


@pytest.mark.parametrize("H", [[[1.0, 9], [9, 1]], [[4.0, 2.5], [2.5, 1]],
                               [[1.0, .9, -.9], [.9, 1, .9], [-.9, .9, 1]] ])
def test_an_indefinite_matrix_is_no_hessian(H):  # C12
    H = torch.tensor(H)
    ok = bool((torch.linalg.eigvalsh(H) > -1.0).all())  # within what damping up to the mean diagonal mends
    W = torch.randn(3, len(H), generator=torch.Generator().manual_seed(0))
    if len(H) == 2:  # a pair of inputs: |H_ij| above sqrt(H_ii H_jj) is refused however small
        for f in (lambda: gptq(W, H, 3), lambda: sparsegpt(W, H, 0.5), lambda: wanda(W, H, 0.5)):
            with pytest.raises(ValueError, match="not positive semidefinite"):
                f()
    else:
        assert ok and factor(H, len(H)).damp == 1.0 and factor(H, len(H)).retries == 2
    far = torch.full((5, 5), -0.9).fill_diagonal_(1.0)  # no pair tells, but one eigenvalue is -2.6
    with pytest.raises(ValueError, match="not even with 1 of its mean"):
        factor(far, 5)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16, 33, 64, 128])
@pytest.mark.parametrize("kind", ["plain", "correlated", "scaled"])
def test_a_hessian_of_rank_n_minus_1_is_always_seen(n, kind):  # E11
    """At damp 0 the last pivot is rounding error of either sign: never let through, in float32 or float64."""
    for seed in range(30 if n < 50 else 8):
        g = torch.Generator().manual_seed(seed)
        for dtype in (torch.float64, torch.float32):
            X = torch.randn(n - 1, n, generator=g, dtype=dtype)
            if kind == "correlated":
                X = X @ (torch.randn(n, n, generator=g, dtype=dtype) / n**0.5 + 0.3 * torch.eye(n, dtype=dtype))
            if kind == "scaled":
                X = X * torch.logspace(-2, 2, n, dtype=dtype)
            H = X.T @ X / n
            H = (H + H.T) / 2
            for precision in (torch.float32, torch.float64):
                f = factor(H, n, 0.0, dtype=precision)
                assert f.retries > 0 and 1e-6 <= f.damp <= 1e-2, (seed, dtype)
    full = problem(4, n, tokens=20 * n)[1]
    assert factor(full, n, 0.0, dtype=torch.float64).retries == 0
