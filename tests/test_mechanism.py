"""The shape of output errors, against cases in which it is known, and corrections against the best there can be."""
import pytest
import torch

from compress import gptq, magnitude, rtn, sparsegpt
from model import GPT, GPTConfig
from recover import add_lora
from study import mechanism
from study.repairs import attach, shared_copy


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
    fixed = mechanism.correct_means(model, dense, ids)
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
