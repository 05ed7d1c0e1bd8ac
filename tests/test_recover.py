"""LoRA, prompts, prefixes and the training loop: each against its formula, and against what must not move."""
import copy
import math

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from study import repairs
from model import GPT, GPTConfig
from engine import products
from engine.muon import Muon, orthogonal
from engine.products import Linear
from recover import (LINEARS, FitConfig, LoRALinear, Prefix, SoftPrompt, add_biases, add_lora, add_targets,
                     correct_biases, distillation, fit, merge_biases, merge_lora, next_token, objective,
                     own_gains, prefix_init, prompt_init, remove_lora, wrapped)
from test_model import close, family, gpt, naive, tokens



def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_lora(model, rank=2, **settings):
    """LoRA whose B is no longer zero, as after training."""
    parameters = add_lora(model, rank, generator=seeded(), **settings)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.3 * torch.randn(p.shape, generator=seeded(len(p))))
    return parameters


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- LoRA

@family
def test_lora_at_step_zero_is_the_model(name):
    """L1: bit for bit; without gradients, as training's own order of operations is for plain layers alone."""
    model, ids = gpt(name), tokens(2, 6)
    with torch.no_grad():
        before = model(ids)
        parameters = add_lora(model, 3, generator=seeded())
        assert torch.equal(model(ids), before)
    layers = 2 * (7 if name == "llama" else 6)
    assert len(parameters) == 2 * layers and len(wrapped(model, LoRALinear)) == layers
    for layer in wrapped(model, LoRALinear).values():
        assert layer.B.abs().max() == 0 and 0 < layer.A.abs().max() <= 1 / math.sqrt(layer.A.shape[1])
        assert layer.A.shape == (3, layer.base.in_features) and layer.B.shape == (layer.base.out_features, 3)


def test_lora_is_its_formula():
    """y = W x + b + (alpha / rank) B (A x), one row at a time, in float64."""
    base, x = nn.Linear(5, 7), torch.randn(4, 5, generator=seeded())
    layer = LoRALinear(base, rank=2, alpha=6, generator=seeded())
    with torch.no_grad():
        layer.B.copy_(torch.randn(7, 2, generator=seeded(1)))
    W, b, A, B = (t.detach().double() for t in (base.weight, base.bias, layer.A, layer.B))
    for row, y in zip(x.double(), layer(x)):
        close(y, W @ row + b + 3 * (B @ (A @ row)), atol=1e-6)
    close(layer.update(), 3 * B @ A, atol=1e-6)


def test_alpha_is_the_rank_by_default():
    for settings, scale in (({}, 1.0), ({"alpha": 8}, 2.0), ({"alpha": 1}, 0.25)):
        model = gpt()
        add_lora(model, 4, **settings)
        assert {layer.scale for layer in wrapped(model, LoRALinear).values()} == {scale}


def test_lora_wraps_what_is_named_and_nothing_else():
    model = gpt("llama")
    parameters = add_lora(model, 2, targets=("q", "down"), generator=seeded())
    assert sorted(name for name, m in model.named_modules() if isinstance(m, LoRALinear)) == [
        "blocks.0.attn.q", "blocks.0.mlp.down", "blocks.1.attn.q", "blocks.1.mlp.down"]
    assert sum(p.numel() for p in parameters) == 2 * (2 * (32 + 32) + 2 * (40 + 32))
    linear = [name for name, m in gpt("llama").blocks.named_modules() if isinstance(m, nn.Linear)]
    assert set(LINEARS) == {name.split(".")[-1] for name in linear}


@pytest.mark.parametrize("settings, names", [
    (dict(rank=0), "rank.*0"), (dict(rank=-3), "rank.*-3"), (dict(rank=1, targets=("nothing",)), "nothing"),
    (dict(rank=1, targets="q dwon"), "named dwon"), (dict(rank=1, targets="gate"), "named gate")])
def test_lora_refuses(settings, names):
    model = gpt()
    before = state(model)
    with pytest.raises(ValueError, match=names):
        add_lora(model, **settings)
    add_lora(model, 1)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, 1)
    remove_lora(model)
    assert same(state(model), before)


def test_only_a_and_b_move():
    """L2: after training the base is bitwise what it was, has no gradient, and wants them again."""
    model, batch = gpt(), tokens(4, 9)
    before = state(model)
    parameters = add_lora(model, 2, generator=seeded())
    start = [p.detach().clone() for p in parameters]
    fit(model, parameters, [batch], config=FitConfig(steps=5, lr=1e-2))
    assert all(not torch.equal(a, b) for a, b in zip(start, parameters))
    mine = {id(p) for p in parameters}
    assert all(p.grad is None and p.requires_grad for p in model.parameters() if id(p) not in mine)
    remove_lora(model)
    assert same(state(model), before)


@family
def test_merged_is_unmerged(name):
    """L3: in float32; merging twice is merging once; train() and eval() merge nothing."""
    model, ids = gpt(name), tokens(2, 6)
    noisy_lora(model, alpha=3)
    before, unmerged = model(ids), state(model)
    model.eval()
    model.train()
    assert same(state(model), unmerged)
    lost = merge_lora(model)
    assert set(lost.values()) == {0.0} and "blocks.0.attn.q" in lost and not wrapped(model, LoRALinear)
    close(model(ids), before, atol=5e-5)
    once = state(model)
    assert once.keys() == gpt(name).state_dict().keys()
    assert merge_lora(model) == {} and same(state(model), once)


def test_merge_adds_the_update_to_the_weight():
    model = gpt("gpt2")
    W, b = (t.detach().clone() for t in (model.blocks[0].attn.q.weight, model.blocks[0].attn.q.bias))
    noisy_lora(model, alpha=6)
    layer = model.blocks[0].attn.q
    A, B = layer.A.detach().double(), layer.B.detach().double()
    merge_lora(model)
    close(model.blocks[0].attn.q.weight, W.double() + 3 * B @ A, atol=1e-6)
    assert torch.equal(model.blocks[0].attn.q.bias, b) and type(model.blocks[0].attn.q) is Linear
    assert model.blocks[0].attn.q.weight.requires_grad


def prune(model):
    with torch.no_grad():
        for seed, block in enumerate(model.blocks):
            weight = block.attn.q.weight
            weight[torch.rand(weight.shape, generator=seeded(seed)) < 0.5] = 0
    model.pruned = frozenset(f"blocks.{i}.attn.q" for i in range(len(model.blocks)))  # as `compress` records it
    return model


def test_merging_into_pruned_weights_keeps_them_or_is_refused():
    """L4: refused, with nothing changed; or under the mask, and the share that was lost is told."""
    model = prune(gpt())
    mask = model.blocks[0].attn.q.weight != 0
    noisy_lora(model)
    before = state(model)
    with pytest.raises(ValueError, match="blocks.0.attn.q is pruned.*keep_zeros"):
        merge_lora(model)
    assert same(state(model), before)
    layer = model.blocks[0].attn.q
    update = layer.update().detach().double()
    expected = layer.base.weight.detach().double() + update * mask
    lost = merge_lora(model, keep_zeros=True)
    weight = model.blocks[0].attn.q.weight
    close(weight, expected, atol=1e-6)
    assert (weight[~mask] == 0).all()
    assert lost["blocks.0.attn.q"] == pytest.approx(float((update[~mask] ** 2).sum() / (update ** 2).sum()), rel=1e-4)
    assert 0.3 < lost["blocks.0.attn.q"] < 0.7 and lost["blocks.0.attn.k"] == 0.0


def test_zeros_that_nobody_pruned_are_weights_like_any_other():
    """A model read from Q4_0 has 12 % of them; a layer may have lost one weight: merging adds the whole update."""
    for keep_zeros in (False, True):
        model = prune(gpt())
        model.pruned = frozenset()
        noisy_lora(model)
        layer = model.blocks[0].attn.q
        expected = layer.base.weight.detach().double() + layer.update().detach().double()
        assert merge_lora(model, keep_zeros)["blocks.0.attn.q"] == 0.0
        close(model.blocks[0].attn.q.weight, expected, atol=1e-6)
    model = gpt()
    with torch.no_grad():
        model.blocks[1].attn.v.weight[0, 0] = 0.0
    model.pruned = frozenset({"blocks.1.attn.v"})  # pruned to 0.1 %: recorded, so its zero stays
    noisy_lora(model)
    with pytest.raises(ValueError, match="blocks.1.attn.v is pruned"):
        merge_lora(model)
    merge_lora(model, keep_zeros=True)
    assert model.blocks[1].attn.v.weight[0, 0] == 0 and model.blocks[0].attn.v.weight[0, 0] != 0


def test_merging_into_packed_weights_is_refused():
    """L4: rounding again to a 3-bit grid would throw most of the update away."""
    kernels, compress = pytest.importorskip("kernels"), pytest.importorskip("compress")
    model, ids = gpt(), tokens(2, 6)
    for block in model.blocks:
        block.mlp.up = kernels.PackedLinear(kernels.pack(compress.rtn(block.mlp.up.weight.detach(), 3, 16)))
    with torch.no_grad():
        plain = model(ids)
        parameters = add_lora(model, 2, generator=seeded())
        assert torch.equal(model(ids), plain) and len(wrapped(model, LoRALinear)) == 12  # L1, packed layers too
    fit(model, parameters, [ids], config=FitConfig(steps=2, lr=1e-2))
    assert not torch.equal(model(ids), plain)
    before = state(model)
    for keep_zeros in (False, True):
        with pytest.raises(ValueError, match="blocks.0.mlp.up.*bits"):
            merge_lora(model, keep_zeros)
    assert same(state(model), before)
    remove_lora(model)
    with torch.no_grad():
        assert torch.equal(model(ids), plain)


def test_lora_on_a_copy_leaves_the_original():
    """L5: on a deep copy, and on a copy that shares its linear layers, wrapping, training and merging stay there."""
    model, ids = gpt(), tokens(3, 7)
    before, output = state(model), model(ids).detach()
    shared = GPT(model.config)
    for block, other in zip(shared.blocks, model.blocks):
        for name in ("q", "k", "v", "o"):
            setattr(block.attn, name, getattr(other.attn, name))
    for twin in (copy.deepcopy(model), shared):
        parameters = add_lora(twin, 2, generator=seeded())
        fit(twin, parameters, [ids], config=FitConfig(steps=3, lr=1e-2))
        assert same(state(model), before) and not wrapped(model, LoRALinear)
        merge_lora(twin)
        assert same(state(model), before) and torch.equal(model(ids), output)
    assert not torch.equal(twin.blocks[0].attn.q.weight, model.blocks[0].attn.q.weight)


def test_a_deep_copy_of_lora_is_its_own():
    """L5, the other way: the copy of a wrapped model runs the copy's A, B and base."""
    model, ids = gpt(), tokens(2, 5)
    noisy_lora(model)
    output = model(ids)  # first: what a layer keeps of its first call must not follow the copy
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert torch.equal(model(ids), output) and not torch.equal(twin(ids), output)


def test_the_same_seed_is_the_same_lora():
    a, b, c = (add_lora(gpt(), 2, generator=seeded(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[0], c[0])


def test_lora_on_a_model_in_half_precision():
    model, ids = gpt().to(torch.bfloat16), tokens(1, 4)
    before = model(ids)
    add_lora(model, 2, generator=seeded())
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merging_keeps_the_dtype(dtype):
    """E8: a merged model is of one type, and runs."""
    model, ids = gpt("gpt2").to(dtype), tokens(1, 4)
    noisy_lora(model)
    merge_lora(model)
    for p in add_biases(model):
        p.data.fill_(0.5)
    merge_biases(model)
    assert {p.dtype for p in model.parameters()} == {dtype} and model(ids).isfinite().all()


def test_lora_of_rank_1_on_one_layer_named_by_a_word():
    """As many parameters as a prompt of L * (in + out) / C tokens; "down" names `down` only, not `o`."""
    for targets, n in (("o", 2 * (32 + 32)), (("o",), 2 * (32 + 32)), ("down", 2 * (40 + 32)), ("q v", 4 * 64)):
        model = gpt()
        assert sum(p.numel() for p in add_lora(model, 1, targets=targets)) == n
        parameters = [layer.B for layer in wrapped(model, LoRALinear).values()]
        fit(model, parameters, [tokens(2, 5)], config=FitConfig(steps=1))


# ---- biases, gains, bias correction

def packed(model):
    """The model with `o` packed at 4 bits and `down` pruned."""
    kernels, compress = pytest.importorskip("kernels"), pytest.importorskip("compress")
    for block in model.blocks:
        o, down = block.attn.o, block.mlp.down
        block.attn.o = kernels.PackedLinear(kernels.pack(compress.rtn(o.weight.detach(), 4, 16)), o.bias)
        down.weight.data[:, ::2] = 0
    return model


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_biases_merge_into_weights_of_16_bits(name):
    """Into plain, pruned and packed layers alike; the merged model, and its unpacked copy, compute in 16 bits."""
    model, ids = packed(gpt(name).bfloat16()), tokens(2, 6)
    for shift in add_biases(model):
        shift.data.fill_(0.5)
    beside = model(ids)
    merge_biases(model)
    for merged in (model, repairs.unpacked(model)):
        assert merged(ids).dtype == torch.bfloat16
        close(merged(ids).float(), beside.float(), atol=0.1)


@family
@pytest.mark.parametrize("make", [gpt, lambda name: packed(gpt(name))], ids=["dense", "compressed"])
def test_biases_are_a_constant_behind_each_layer(name, make):
    """y = W x + b + shift, merged or beside it; the merged model is wrapped in nothing, and keeps its zeros."""
    model, ids = make(name), tokens(2, 6)
    before, layer = model(ids), model.blocks[1].mlp.down
    shifts = add_biases(model)
    assert len(shifts) == 4 and all(p.shape == (32,) for p in shifts) and torch.equal(model(ids), before)
    for i, p in enumerate(shifts):
        p.data.copy_(torch.randn(32, generator=seeded(i)))
    x = torch.randn(5, 40, generator=seeded(9))
    close(model.blocks[1].mlp.down(x), layer(x) + torch.randn(32, generator=seeded(3)), atol=1e-5)
    after = model(ids)
    assert (after - before).abs().max() > 0.1
    twin = copy.deepcopy(model)
    merge_biases(twin)
    close(twin(ids), after, atol=1e-5)
    assert not any(n.endswith(".base") for n, _ in twin.named_modules())
    assert torch.equal(twin.blocks[1].mlp.down.weight, layer.weight) and type(twin.blocks[0].attn.o) in (
        nn.Linear, type(model.blocks[0].attn.o.base))
    for name, wrapper in wrapped(model).items():
        model.set_submodule(name, wrapper.base)
    assert torch.equal(model(ids), before) and model.blocks[1].mlp.down is layer


def test_only_the_biases_move_and_a_shared_layer_keeps_its_own():
    model, batch = gpt("gpt2"), tokens(4, 9)
    shared = GPT(model.config)
    for block, other in zip(shared.blocks, model.blocks):
        block.attn.o = other.attn.o
    before = state(model)
    losses = fit(shared, add_biases(shared), [batch], config=FitConfig(steps=8, lr=3e-2))
    assert losses[-1] < losses[0]
    merge_biases(shared)
    assert same(state(model), before) and shared.blocks[0].attn.o.bias.requires_grad
    with pytest.raises(ValueError, match="already"):
        add_lora(model, 1) and add_biases(model)


def test_a_shared_packed_layer_keeps_its_own_bias():
    """Its bias is a buffer: a merged one is the new layer's alone, also where there was none before."""
    for name in ("gpt2", "ours"):
        model, x = packed(gpt(name)), torch.randn(3, 32, generator=seeded())
        shared, layer = GPT(model.config), model.blocks[0].attn.o
        shared.blocks[0].attn.o = layer
        before = layer(x)
        add_biases(shared, "o")[0].data.fill_(2.0)
        merge_biases(shared)
        close(shared.blocks[0].attn.o(x), before + 2, atol=1e-5)
        assert model.blocks[0].attn.o is layer and torch.equal(layer(x), before)


def test_gains_are_the_models_own():
    """One weight a norm, C each; another model with the same tensors does not see them move."""
    for name in ("ours", "gpt2"):
        model, batch = gpt(name), tokens(4, 9)
        twin = repairs.shared_copy(model)
        before = state(model)
        gains = own_gains(twin)
        assert len(gains) == 5 and sum(p.numel() for p in gains) == 5 * 32
        assert torch.equal(twin(batch), model(batch))
        losses = fit(twin, gains, [batch], config=FitConfig(steps=5, lr=3e-2))
        assert losses[-1] < losses[0] and same(state(model), before)


@family
def test_bias_correction_makes_each_layers_mean_output_the_dense_ones(name):
    """b = (W - W') E[x], layer by layer: a naive walk with the corrected layers so far in front."""
    dense, ids = gpt(name), tokens(6, 8)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.o, block.mlp.down, block.mlp.up):
                layer.weight.copy_((layer.weight * 2).round() / 2)
    rough = copy.deepcopy(model)
    shifts = correct_biases(model, dense, ids)
    assert len(shifts) == 4 and all(p.abs().max() > 1e-3 for p in shifts)
    x = model.embed(ids)
    for i, (block, plain) in enumerate(zip(rough.blocks, dense.blocks)):
        seen = {}
        for key, layer in (("o", block.attn.o), ("down", block.mlp.down)):
            layer.register_forward_pre_hook(lambda _, given, key=key: seen.update({key: given[0].flatten(0, 1)}))
        for key, layer, original in (("o", block.attn.o, plain.attn.o), ("down", block.mlp.down, plain.mlp.down)):
            block(x)
            W, R, mean = original.weight.double(), layer.weight.double(), seen[key].double().mean(0)
            b = sum(((W - R)[:, j] * mean[j] for j in range(len(mean))), torch.zeros(32, dtype=torch.float64))
            close(shifts[2 * i + (key == "down")], b, atol=1e-5)
            with torch.no_grad():  # put it into the rough model's own bias: the next layer sees it
                if layer.bias is None:
                    layer.bias = nn.Parameter(torch.zeros(32))
                layer.bias.add_(b.float())
        x = block(x)


def test_bias_correction_of_packed_layers():
    """The mean error of each corrected layer's output, on its own inputs, is gone."""
    dense, ids = gpt("gpt2"), tokens(6, 8)
    model = packed(copy.deepcopy(dense))
    correct_biases(model, dense, ids)
    seen = []
    model.blocks[0].attn.o.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(ids)
        error = (dense.blocks[0].attn.o(seen[0]) - model.blocks[0].attn.o(seen[0])).flatten(0, 1)
    assert error.abs().max() > 1e-2 and error.mean(0).abs().max() < 1e-5


# ---- prompts and prefixes

def test_a_prompt_starts_from_the_vocabulary():
    model = gpt()
    E = model.wte.weight.detach()
    rows = prompt_init(model, 40, seeded())
    assert all((E == row).all(1).any() for row in rows) and len({tuple(row.tolist()) for row in rows}) > 20
    assert torch.equal(rows, prompt_init(model, 40, seeded()))
    with pytest.raises(ValueError, match="1 token.*0"):
        prompt_init(model, 0)
    soft = SoftPrompt(rows)
    with torch.no_grad():
        soft.weight.add_(1)
    assert torch.equal(soft(), rows + 1) and not soft.weight.data_ptr() == rows.data_ptr()  # a copy: the start stays


@family
def test_a_prefix_of_real_tokens_is_those_tokens(name):
    """P3: keys and values of tokens in every layer equal feeding the tokens, positions included."""
    model, ids = gpt(name), tokens(3, 9)
    init = prefix_init(model, model.wte(ids[0, :4]))
    assert init.shape == (2, 2, model.config.n_kv_head, 4, 8) and not init.requires_grad
    rows = torch.cat([ids[:1, :4].expand(3, 4), ids[:, 4:]], dim=1)  # the same beginning in front of three texts
    prefix = Prefix(init)
    close(model(ids[:, 4:], cache=prefix.cache(model, 3, 5)), model(rows)[:, 4:], atol=1e-5)
    cache = prefix.cache(model, 3, 5)  # the text in pieces, and rows of unequal length
    first = model(ids[:, 4:7], cache=cache, lengths=torch.tensor([3, 1, 2]))
    second = model(ids[:, 8:], cache=cache)
    for b, n in enumerate((3, 1, 2)):
        alone = naive(model, model.wte(torch.cat([ids[0, :4], ids[b, 4:4 + n], ids[b, 8:]])))[0][4:]
        close(first[b, :n], alone[:n])
        close(second[b, 0], alone[n])


def test_a_zero_prefix_is_not_the_identity():
    """P6: keys of zero get e^0 of the attention each, values of zero dilute the rest; a masked prefix gets nothing."""
    model, ids = gpt(), tokens(2, 5)
    prefix = Prefix(torch.zeros(2, 2, 4, 6, 8))
    assert (model(ids, cache=prefix.cache(model, 2, 5)) - model(ids)).abs().max() > 0.05
    masked = prefix.cache(model, 2, 5)
    masked.first += 6
    close(model(ids, cache=masked), model(ids), atol=1e-5)  # rotary: to stand six places further changes nothing


def test_gradients_reach_a_prefix_and_a_prompt_only():
    """Central differences in float64 say what the gradient is; the frozen model gets none."""
    model, ids = gpt().double(), tokens(2, 6)
    for part, forward in ((Prefix(0.3 * torch.randn(2, 2, 4, 3, 8, generator=seeded(), dtype=torch.float64)),
                           lambda x: model(x, cache=part.cache(model, 2, 5))),
                          (SoftPrompt(torch.randn(3, 32, generator=seeded(), dtype=torch.float64)),
                           lambda x: model(x, prompt=part()))):
        model.requires_grad_(False)
        loss = objective(forward, lambda logits, batch: -logits.log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0])
        loss(ids).backward()
        assert all(p.grad is None for p in model.parameters())
        flat, grad = part.weight.data.view(-1), part.weight.grad.view(-1)
        for i in range(0, len(flat), len(flat) // 7):
            kept, (up, down) = flat[i].item(), (None, None)
            with torch.no_grad():
                flat[i] = kept + 1e-4
                up = loss(ids).item()
                flat[i] = kept - 1e-4
                down = loss(ids).item()
                flat[i] = kept
            assert grad[i].item() == pytest.approx((up - down) / 2e-4, abs=1e-6)


def test_a_prompt_step_skips_the_frozen_weights(monkeypatch):
    """Operations counted, not seconds: 8 prompt and 128 text tokens cost at most 0.8 of a full step on the text."""
    monkeypatch.setattr(products, "HAVE", False)  # those by oneDNN are not counted
    model = GPT(GPTConfig(vocab_size=512, context=136, n_layer=2, n_embd=64)).init_weights(seeded())
    batch, soft, counted = tokens(4, 129), SoftPrompt(prompt_init(model, 8, generator=seeded())), []
    for trained, forward in ((model, model), (soft, lambda x: model(x, prompt=soft()))):
        with FlopCounterMode(display=False) as counter:
            fit(model, trained.parameters(), [batch], objective(forward), FitConfig(steps=1))
        counted.append(counter.get_total_flops())
    assert 0.5 < counted[1] / counted[0] < 0.8


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_a_prefix_that_leaves_no_room_is_an_error(name):
    """P4: prefix and text do not fit the context of 32 together, and the message has the numbers."""
    model = gpt(name)
    prefix = Prefix(torch.zeros(2, 2, 4, 8, 8))
    assert model(tokens(1, 24), cache=prefix.cache(model, 1, 24)).shape == (1, 24, 50)
    with pytest.raises(ValueError, match="32"):
        model(tokens(1, 25), cache=prefix.cache(model, 1, 25))
    with pytest.raises(ValueError, match="8 cached . 0 prompt . 6 text .* 13"):  # its own slots count as used
        model(tokens(1, 6), cache=prefix.cache(model, 1, 5))


# ---- losses

def test_next_token_is_cross_entropy_by_hand():
    """P1: on text positions, with a prompt in front as without: position t is scored on token t + 1."""
    model, batch = gpt(), tokens(2, 7)
    prompt = torch.randn(3, 32, generator=seeded())
    for p in (None, prompt):
        loss = objective(lambda ids: model(ids, prompt=p))
        by_hand, each = [], next_token(model(batch[:, :-1], prompt=p), batch)
        for b, row in enumerate(batch):
            vectors = model.wte(row[:-1]) if p is None else torch.cat([p, model.wte(row[:-1])])
            logits = naive(model, vectors)[0][0 if p is None else 3:]
            for t in range(6):
                by_hand.append(math.log(sum(math.exp(z) for z in logits[t].tolist())) - logits[t, row[t + 1]].item())
                assert each[b, t].item() == pytest.approx(by_hand[-1], abs=2e-5)
        assert loss(batch).item() == pytest.approx(sum(by_hand) / 12, abs=1e-5)
        assert loss((batch, None, None)).item() == loss(batch).item()  # a batch with targets is read the same


@pytest.mark.parametrize("k", [1, 5, 50, 64])
def test_distillation_is_kl_by_hand(k):
    """Over the teacher's k likeliest tokens and one bucket for the rest; all of them: the whole divergence."""
    teacher, student, batch = gpt(seed=1), gpt(seed=2).requires_grad_(False), tokens(2, 5)
    teacher.requires_grad_(False)
    (ids, log_p, best), = add_targets(teacher, [batch], k)
    assert torch.equal(ids, batch) and log_p.shape == best.shape == (2, 4, min(k, 50)) and not log_p.requires_grad
    each = distillation(student(batch[:, :-1]), (ids, log_p, best))
    p, q = (m(batch[:, :-1]).double().softmax(-1) for m in (teacher, student))
    for b in range(2):
        for t in range(4):
            top = p[b, t].argsort(descending=True)[:k].tolist()
            kl = sum(float(p[b, t, i] * (p[b, t, i] / q[b, t, i]).log()) for i in top)
            if k < 50:
                rest = [1 - sum(float(x[b, t, i]) for i in top) for x in (p, q)]
                kl += rest[0] * math.log(rest[0] / rest[1])
            assert each[b, t].item() == pytest.approx(kl, abs=2e-5)
    alike = distillation(teacher(batch[:, :-1]), (ids, log_p, best))
    assert alike.abs().max() < 1e-5 and (each > 0).all()


def test_a_tuple_of_targets_trains():
    teacher, student = gpt(seed=1), gpt(seed=2)
    soft = SoftPrompt(prompt_init(student, 4, generator=seeded()))
    targets = add_targets(teacher, [tokens(4, 7)], 8)
    losses = fit(student, soft.parameters(), targets, objective(lambda x: student(x, prompt=soft()), distillation),
                 FitConfig(steps=30, lr=3e-2))
    assert losses[-1] < 0.9 * losses[0]


# ---- the loop

def test_rate_is_warm_up_then_the_schedule():
    config = FitConfig(steps=20, warmup=0.2)
    assert [config.rate(i) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert config.rate(12) == pytest.approx(0.5) and config.rate(8) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert config.rate(19) == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert FitConfig(steps=1).rate(0) == 1.0 and FitConfig(steps=3, warmup=0.0).rate(0) == 1.0
    assert [FitConfig(steps=4, warmup=1.0).rate(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("bad", [
    dict(steps=0), dict(lr=0.0), dict(lr=-1.0), dict(lr=math.inf)])
def test_fit_refuses(bad):
    model = gpt()
    with pytest.raises(ValueError, match=str(list(bad.values())[0])):
        fit(model, [model.norm.weight], [tokens(1, 4)], config=FitConfig(**{"steps": 2, **bad}))
    assert all(p.requires_grad for p in model.parameters())


def test_no_batches_at_all_is_a_clear_error():
    model = gpt()
    with pytest.raises(ValueError, match="no batch for step 0"):
        fit(model, [model.norm.weight], [], config=FitConfig(steps=2))
    with pytest.raises(ValueError, match="no batch for step 1: give a list, which is read again"):
        fit(model, [model.norm.weight], iter([tokens(1, 4)]), config=FitConfig(steps=2))


class Line(nn.Module):
    """One weight, so that a training step can be done by hand."""

    def __init__(self, start=1.0):
        super().__init__()
        self.w, self.other = nn.Parameter(torch.tensor([start])), nn.Parameter(torch.tensor([5.0]))
        self.blocks = nn.ModuleList()

    def loss(self, factor):
        return ((self.w - 3) ** 2 * factor).sum()


def test_fit_is_adamw_with_clipping_by_hand():
    """Three steps on (w - target)^2 + other, in floats: clip, moments, bias correction, the scheduled rate."""
    model, config = Line(), FitConfig(steps=3, lr=0.1, warmup=0.4, betas=(0.9, 0.99), clip=1.0)
    losses = fit(model, [model.w], [4.0, 1.0], lambda target: ((model.w - target) ** 2 + model.other).sum(), config)
    w, m, v, expected = 1.0, 0.0, 0.0, []
    for i, target in enumerate([4.0, 1.0, 4.0]):  # a list is gone through again
        expected.append((w - target) ** 2 + 5)
        g = 2 * (w - target)
        g = g / max(1.0, abs(g))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w -= 0.1 * config.rate(i) * (m / (1 - 0.9 ** (i + 1))) / (math.sqrt(v / (1 - 0.99 ** (i + 1))) + 1e-8)
    assert losses == pytest.approx(expected, abs=1e-5) and model.w.item() == pytest.approx(w, abs=1e-5)
    assert model.other.item() == 5.0 and model.other.grad is None and model.other.requires_grad


def test_weight_decay_is_on_matrices_only():
    model = GPT(GPTConfig(vocab_size=9, context=8, n_layer=1, n_head=1, n_embd=4)).init_weights(seeded())
    model.norm.weight.data.fill_(3.0)
    before = state(model)

    def zero(batch):  # its gradient is zero, so only decay moves anything
        return 0 * sum(p.sum() for p in model.parameters())
    fit(model, model.parameters(), [1], zero, FitConfig(steps=1, lr=0.1, weight_decay=0.5))
    assert torch.equal(model.norm.weight, before["norm.weight"])
    close(model.wte.weight, before["wte.weight"] * (1 - 0.1 * 0.5), atol=1e-7)
    close(model.blocks[0].attn.q.weight, before["blocks.0.attn.q.weight"] * (1 - 0.1 * 0.5), atol=1e-7)


def test_only_the_given_parameters_move():
    """L2 for prompts: bitwise, and no gradient was ever made for what is frozen."""
    model, batch = gpt(), tokens(4, 9)
    before, soft = state(model), SoftPrompt(prompt_init(gpt(), 3, generator=seeded()))
    model.norm.weight.requires_grad_(False)

    def forward(ids):
        assert not any(p.requires_grad for p in model.parameters())
        return model(ids, prompt=soft())
    losses = fit(model, soft.parameters(), [batch], objective(forward), FitConfig(steps=20, lr=3e-2))
    assert same(state(model), before) and all(p.grad is None for p in model.parameters())
    assert losses[-1] < losses[0] and len(losses) == 20
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]  # as it was given


def test_fit_unfreezes_after_an_error():
    model = gpt()
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, [model.norm.weight], [1], _broken, FitConfig(steps=2))
    assert all(p.requires_grad for p in model.parameters())


def _broken(batch):
    raise RuntimeError("broken")


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state():
    """The batch is at fault: warned, and nothing of it is learned."""
    for bad in (math.nan, math.inf):
        model, after = Line(), []
        with pytest.warns(UserWarning, match=f"{bad}.*step 2"):
            losses = fit(model, [model.w], [1.0, 1.0, bad, 1.0], model.loss, FitConfig(steps=4),
                         progress=lambda step, loss: after.append(model.w.item()))
        assert len(losses) == len(after) == 2 and model.w.item() == 1.0 != after[0]  # copied at step 0


def test_the_last_good_state_is_at_most_fifty_steps_old():
    model, after, batches = Line(), [], [1.0] * 120 + [math.nan]
    with pytest.warns(UserWarning, match="nan.*step 120"):
        fit(model, [model.w], batches, model.loss, FitConfig(steps=200),
            progress=lambda step, loss: after.append(model.w.item()))
    assert model.w.item() == after[99] != after[119]  # the state before step 100


def test_a_step_that_ruins_the_weights_is_taken_back():
    """The state is at fault: it is not the last good one, however finite the loss was that led there."""
    model = Line()
    with pytest.warns(UserWarning):
        fit(model, [model.w], [1.0], model.loss, FitConfig(steps=4, lr=1e30))  # a step too far: the next loss is inf
    assert math.isfinite(model.loss(1.0).item())


def test_a_gradient_that_is_not_finite_is_not_followed():
    model = Line(start=3.0)
    with pytest.warns(UserWarning):
        fit(model, [model.w], [1.0], lambda x: (model.w - 3).square().sqrt().sum(), FitConfig(steps=4))  # 0, slope nan
    assert model.w.item() == 3.0


@pytest.mark.parametrize("bad", [0, 1])
def test_one_gradient_that_is_not_finite_ends_the_training_whichever_it_is(bad):
    """With clip_each every parameter has a norm of its own: each counts, the last and those before it."""
    model = Line(start=3.0)
    w = [torch.nn.Parameter(torch.tensor([4.0])) for _ in range(2)]

    def loss(x):
        """Finite; the slope by w[bad] is 0 times infinity."""
        return w[1 - bad].sum() * x + (w[bad] - 4).square().sqrt().sum()
    with pytest.warns(UserWarning, match="not finite, at step 0"):
        fit(model, w, [1.0], loss, FitConfig(steps=4, lr=0.1, clip_each=True))
    assert [p.item() for p in w] == [4.0, 4.0]


def test_a_gradient_from_before_does_not_count():
    a, b = Line(), Line()
    a.w.grad = torch.tensor([-100.0])
    for model in (a, b):
        fit(model, [model.w], [0.01], model.loss, FitConfig(steps=3))
    assert a.w.item() == b.w.item()


def test_training_twice_is_the_same_to_the_bit():
    results = []
    for _ in range(2):
        model = gpt()
        fit(model, model.parameters(), [tokens(2, 6), tokens(2, 6, seed=9)], config=FitConfig(steps=4, muon=0.01))
        results.append(state(model))
    assert same(*results)


# ---- Muon

@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32), (3, 16, 40)])
def test_newton_schulz_against_the_svd(shape):
    """All singular values end within [0.6, 1.3], on the singular vectors they had."""
    G = torch.randn(shape, generator=seeded())
    if shape == (32, 32):  # a square Gaussian is nearly singular: lift its smallest directions to 3 % of the largest
        U, S, Vh = torch.linalg.svd(G)
        G = U @ torch.diag(S.clamp_min(0.03 * S[0])) @ Vh
    for scale in (1.0, 1e-3, 1e4):
        out = orthogonal(G * scale)
        U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        core = U.mT @ out.double() @ Vh.mT  # diagonal: the directions are kept
        values = core.diagonal(dim1=-2, dim2=-1)
        assert out.shape == G.shape and 0.6 < values.min() and values.max() < 1.3
        assert (core - torch.diag_embed(values)).abs().max() < 1e-3
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (12, 12), (12, 16)])
def test_orthogonal_is_the_iteration_by_hand(shape):
    """X <- aX + (bS + cSS)X with S = XXᵀ in float64, five times, one matrix after the other."""
    given = torch.randn(3, *shape, generator=seeded())
    for G, out in zip(given.double(), orthogonal(given)):
        X = (G if shape[0] <= shape[1] else G.T) / G.norm()
        for _ in range(5):
            S = X @ X.T
            X = 3.4445 * X + (-4.775 * S + 2.0315 * S @ S) @ X
        close(out, X if shape[0] <= shape[1] else X.T, atol=1e-4)


def test_muon_step_by_hand():
    """average = 0.95 average + g;  p = (1 - lr wd) p - lr sqrt(max(1, rows / columns)) orthogonal(g + 0.95 average)."""
    given = [nn.Parameter(torch.randn(shape, generator=seeded(i))) for i, shape in enumerate(((4, 6), (6, 4), (4, 6)))]
    start, optimizer = [p.detach().clone() for p in given], Muon(given, lr=0.1, weight_decay=0.2)
    average = [torch.zeros_like(p) for p in given]
    for step in range(3):
        for i, t in enumerate(given):
            t.grad = torch.randn(t.shape, generator=seeded(10 * i + step))
            average[i] = 0.95 * average[i] + t.grad
            stretch = math.sqrt(6 / 4) if i == 1 else 1.0
            start[i] = (1 - 0.1 * 0.2) * start[i] - 0.1 * stretch * orthogonal(t.grad + 0.95 * average[i])
        optimizer.step()
        for p, expected in zip(given, start):
            close(p, expected, atol=1e-5)


def test_muon_takes_the_matrices_of_the_blocks():
    """One step of fit with AdamW's rate next to nothing moves those matrices, and nothing else by more than that."""
    model, batch = gpt("gpt2"), tokens(2, 6)
    before = state(model)
    fit(model, model.parameters(), [batch], config=FitConfig(steps=1, lr=1e-9, muon=0.05))
    for name, p in model.named_parameters():
        moved = (p - before[name]).abs().max().item()
        assert moved > 1e-3 if name.startswith("blocks") and p.dim() == 2 else moved < 1e-7, name
    for block in range(2):
        change = model.blocks[block].attn.v.weight - before[f"blocks.{block}.attn.v.weight"]
        assert torch.linalg.matrix_norm(change.double(), 2).item() == pytest.approx(0.05, rel=0.3)


def test_muon_on_lora_alone():
    """Nothing is left for AdamW then, and that is no error."""
    model = gpt()
    parameters = add_lora(model, 2, generator=seeded())
    assert len(fit(model, parameters, [tokens(2, 6)], config=FitConfig(steps=2, muon=0.01))) == 2


def test_nothing_here_uses_the_global_random_state():
    model, before = gpt(), torch.random.get_rng_state()
    fit(model, add_lora(model, 2, generator=seeded()), [tokens(2, 5)], config=FitConfig(steps=2))
    prompt_init(model, 3, seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind, size", [("lora", 2), ("prompt", 4), ("prefix", 4), ("idp", (2, 4, "competitive"))])
def test_bfloat16_products_train_float32_parameters(kind, size):
    """As well as float32 ones do: of the loss that a repair takes away, all but a tenth is gone as well."""
    teacher = gpt().requires_grad_(False)
    student, batches = gpt(seed=1).requires_grad_(False), add_targets(teacher, [tokens(4, 20)])
    loss = {}
    for precise in (True, False):
        trained = repairs.train_repair(student, kind, size, batches, distillation, FitConfig(steps=30, lr=3e-2), 0,
                                     bfloat16=not precise)
        assert all(t.dtype == torch.float32 for t in trained)
        subject = repairs.attach(student, kind, size, trained)
        ids, lengths = batches[0][0][:, :-1], torch.full((4,), 20)
        logits = subject.model(ids, cache=subject.cache(subject.choose(ids, lengths)[0], 20))
        loss[precise] = distillation(logits, batches[0]).mean().item()
    before = distillation(student(batches[0][0][:, :-1]), batches[0]).mean().item()
    assert loss[True] < 0.9 * before and loss[False] < loss[True] + 0.1 * (before - loss[True])
