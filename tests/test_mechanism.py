"""The shape of output errors, against cases in which it is known, and corrections against the best there can be."""
from types import SimpleNamespace

import pytest
import torch

import recover

from compress import gptq, magnitude, rtn, sparsegpt
from engine.wrapping import shared_copy
from model import GPT, GPTConfig
from recover import add_lora
from study import mechanism
from study.repairs import attach
from test_tables import cells


def normal(*shape, seed=0):
    """Random numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def damaged():
    """(dense, the same with noise on its weights, ids): two layers of width 16."""
    dense = GPT(GPTConfig(vocab_size=50, n_layer=2, n_embd=16, n_head=2)).init_weights(torch.Generator().manual_seed(1))
    model = GPT(dense.config)
    model.load_state_dict(dense.state_dict())
    with torch.no_grad():
        for i, p in enumerate(model.blocks.parameters()):
            p.add_(0.1 * normal(*p.shape, seed=i) if p.dim() == 2 else 0)
    return dense, model.requires_grad_(False), torch.randint(50, (6, 20), generator=torch.Generator().manual_seed(2))


def test_energies_are_those_of_the_outputs():
    """Their sum is the mean squared output; an error of rank one has one direction."""
    X, D = normal(300, 6), normal(4, 6, seed=1)
    H = X.double().T @ X.double() / len(X)
    energies, U = mechanism.spectrum(D, H)
    assert energies.sum().item() == pytest.approx((X.double() @ D.double().T).square().sum(1).mean().item())
    one = mechanism.spectrum(torch.outer(normal(4), normal(6)), H)[0]
    assert one[1:].abs().max() < 1e-9 * one[0]
    assert torch.allclose(U.T @ U, torch.eye(4).double())


def test_the_mean_worked_by_hand():
    """Inputs (1, 1) and (1, -1), D the identity: errors of energy 2, of which the mean (1, 0) has 1."""
    assert mechanism.mean_share(torch.eye(2), torch.tensor([[1., 1.], [1., -1.]])) == pytest.approx(0.5)


def test_no_update_of_the_rank_leaves_less_error():
    """The closed form leaves what the energies behind the first r say, and steps away from it leave more."""
    X, D = normal(300, 8) * torch.arange(1, 9), normal(5, 8, seed=1)
    energies, U = mechanism.spectrum(D, X.double().T @ X.double() / len(X))

    def left(A, B):
        """The mean squared error that remains."""
        return (X.double() @ (D.double() - B @ A).T).square().sum(1).mean().item()
    B, A = U[:, :2], U[:, :2].T @ D.double()
    assert left(A, B) == pytest.approx(energies[2:].sum().item())
    for seed in range(20):
        moved = left(A + 0.05 * normal(*A.shape, seed=seed), B + 0.05 * normal(*B.shape, seed=seed + 50))
        assert moved > left(A, B)


def test_error_feedback_spreads_the_error():
    """RTN's error lies in the directions of the inputs, GPTQ's less; magnitude pruning and SparseGPT likewise."""
    X = normal(2000, 64) * (0.93 ** torch.arange(64)) @ torch.linalg.qr(normal(64, 64, seed=1))[0]
    W, H = normal(64, 64, seed=2), X.T @ X / len(X)
    made = {"rtn": rtn(W, 3).dequantize(), "gptq": gptq(W, H, 3).dequantize(),
            "magnitude": W * magnitude(W, 0.5), "sparsegpt": sparsegpt(W, H, 0.5)[0]}
    energies = {name: mechanism.spectrum(W - new, H)[0] for name, new in made.items()}
    shares = {name: float(e[:8].sum() / e.sum()) for name, e in energies.items()}
    own = torch.linalg.eigvalsh(H.double()).flip(0)
    assert shares["rtn"] == pytest.approx(float(own[:8].sum() / own.sum()), abs=0.08)
    assert shares["gptq"] < 0.85 * shares["rtn"] and shares["sparsegpt"] < 0.9 * shares["magnitude"], shares


def test_full_rank_restores_the_dense_model(damaged):
    """With as many directions as a layer has outputs nothing is left of the damage."""
    dense, model, ids = damaged
    before = {name: p.clone() for name, p in model.named_parameters()}
    subject = attach(model, "lora", 16, mechanism.correct_directions(model, dense, ids, rank=16))
    assert torch.allclose(subject.model(ids), dense(ids), atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_later_layers_read_what_corrected_ones_give(damaged):
    """The second block's correction is the best one on the inputs that the corrected first block gives."""
    dense, model, ids = damaged
    tensors = mechanism.correct_directions(model, dense, ids, rank=2)
    fixed = shared_copy(model)
    for p, value in zip(add_lora(fixed, 2), tensors):
        p.data.copy_(value)
    x = fixed.blocks[0](fixed.embed(ids))
    X = fixed.blocks[1].norm1(x).flatten(0, 1).double()
    D = (dense.blocks[1].attn.q.weight - model.blocks[1].attn.q.weight).double()
    U = torch.linalg.svd(D @ X.T, full_matrices=False)[0][:, :2]
    update = fixed.blocks[1].attn.q.update().double()
    assert torch.allclose(update, U @ U.T @ D, atol=1e-4)


def test_bias_correction_takes_the_mean_away(damaged):
    """After it, the mean output of every layer is the dense layer's on the same inputs."""
    dense, model, ids = damaged
    fixed = shared_copy(model)
    recover.correct_biases(fixed, dense, ids, recover.LINEARS)
    recover.merge_biases(fixed)
    assert all(layer.bias is None for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear))
    x = fixed.embed(ids)
    for block, original in zip(fixed.blocks, dense.blocks):
        mean = block.norm1(x).flatten(0, 1).mean(0)
        assert torch.allclose(block.attn.q(mean), original.attn.q(mean), atol=1e-5)
        x = block(x)


def test_the_shape_of_an_error(damaged):
    """Shares in (0, 1): no direction holds less than the mean's, the first three hold more than the first."""
    dense, model, ids = damaged
    shape = mechanism.error_shape(model, dense, ids, rank=3)
    assert 0 < shape["mean"] < shape["first"] + 1e-9 < shape["directions"] < 1 and 0 < shape["error"] < 1


def test_the_shares_of_one_layer_are_those_of_its_outputs(damaged, monkeypatch):
    """Inputs on four axes of energies 16, 4, 1 and 0.25, an error of the first weight's size on two of them."""
    X = torch.tensor([[4.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0.5]])
    layer, W = torch.nn.Linear(4, 4, bias=False), torch.diag(torch.tensor([2.0, 1, 1, 1]))
    layer.weight.data = W - torch.diag(torch.tensor([1.0, 0, 2, 0]))  # off by 4 on the first, by 2 on the third
    monkeypatch.setattr(mechanism, "walk", lambda *given: [(layer, W, X)])
    shape = mechanism.error_shape(None, None, None, rank=1)
    assert shape["error"] == pytest.approx((16 + 4) / (64 + 4 + 1 + 0.25))
    assert shape["first"] == shape["directions"] == pytest.approx(16 / 20)
    assert shape["mean"] == pytest.approx((1 + 0.25) / (20 / 4))  # the mean error is (1, 0, 0.5, 0)
    assert shape["inputs"] == pytest.approx(16 / 21.25)
    assert mechanism.error_shape(None, None, None, rank=2)["inputs"] == pytest.approx(20 / 21.25)


def test_what_comes_back_is_a_share_of_what_was_lost(monkeypatch):
    """Twenty people of two facts: dense knows all, the damaged model half, the corrected one three quarters of it; of
    seen facts nothing was lost, and there is no share to give."""
    facts = [SimpleNamespace(person=i // 2) for i in range(40)]
    run = SimpleNamespace(world=SimpleNamespace(facts=lambda split, people: facts))
    all_, half = torch.ones(40), torch.tensor([1.0, 0.0] * 20)
    more = half.clone()
    more[1:20:2] = 1.0  # ten people know their second fact again
    found = mechanism.returned(*({"heldout": of, "seen": all_} for of in (all_, half, more)), run)
    share, low, high = found["heldout"]
    assert share == pytest.approx(0.5) and found["seen"] is None
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20**0.5, abs=0.03) and high == pytest.approx(1 - low, abs=0.03)


def test_the_table_says_where_too_little_was_lost(monkeypatch):
    world = SimpleNamespace(calibration=lambda config: torch.zeros(1))
    run = SimpleNamespace(world=world, config=SimpleNamespace(compressions=["RTN 8 bits"]))
    shape = dict.fromkeys(("error", "mean", "first", "directions", "inputs"), 0.25)
    for name, value in (("compressed_subject", SimpleNamespace(model=None)), ("unpacked", None), ("attach", None),
                        ("error_shape", shape), ("recalled", {"heldout": torch.ones(4)}), ("correct_biases", None),
                        ("shared_copy", None), ("correct_directions", None),
                        ("returned", {"heldout": None, "seen": [0.5, 0.25, 0.75]})):
        monkeypatch.setattr(mechanism, name, lambda *given, value=value: value)
    line = mechanism.compressor_table(run, SimpleNamespace(model=None, device="cpu")).splitlines()[-1]
    assert cells(line) == ["RTN 8 bits", "100.0", *["25.0"] * 5, *["too little was lost"] * 2, "50.0 [25.0, 75.0]"]
