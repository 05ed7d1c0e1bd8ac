"""The GPT against loops: `naive` is the whole model again, one row, one query, one key at a time, in float64."""
import copy
import json
import math
import os
import random
import resource
import struct

import numpy as np
import pytest
import torch

from checkpoints import load, save
from checkpoints.native import assemble
from compress import compress
from engine import products, rotary
from engine.norm import RMSNorm
from engine.safetensors import DTYPES, read_safetensors, write_safetensors
from model import GPT, Cache, GPTConfig, rope_table
from study.repairs import unpacked

SMALL = dict(vocab_size=50, context=32, n_layer=2, n_head=4, n_embd=32, n_hidden=40)
FAMILIES = {
    "ours": dict(),
    "gpt2": dict(position="learned", norm="layernorm", activation="gelu_tanh", bias=True),
    "opt": dict(position="learned", position_offset=2, norm="layernorm", activation="relu", bias=True),
    # of the four rotations of a head, this scaling keeps one, blends two and slows one
    "llama": dict(n_kv_head=2, activation="swiglu", tied=False, norm_eps=1e-6, rope_theta=16.0, rope_scaling=dict(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32)),
}
family = pytest.mark.parametrize("name", FAMILIES)


def gpt(name="ours", seed=0, **more):
    """A small model of a family, with noise in every parameter: no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **FAMILIES[name], **more}))
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            p.copy_(centre + 0.3 * torch.randn(p.shape, generator=generator))
    return model


def tokens(*shape, seed=1, vocab=SMALL["vocab_size"]):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- the oracle

def causal(i, j):
    return j <= i


def naive_norm(config, x, layer):
    w = layer.weight.detach().double().numpy()
    if config.norm == "rmsnorm":
        return x / math.sqrt(np.mean(x * x) + config.norm_eps) * w
    b = layer.bias.detach().double().numpy() if layer.bias is not None else 0
    return (x - x.mean()) / math.sqrt(np.mean((x - x.mean()) ** 2) + config.norm_eps) * w + b


def naive_linear(layer, x):
    y = layer.weight.detach().double().numpy() @ x
    return y if layer.bias is None else y + layer.bias.detach().double().numpy()


def naive_frequencies(config):
    """How fast each pair turns; Llama 3's scaling in wavelengths, as its authors state it."""
    out = []
    for i in range(config.head_size // 2):
        f, s = config.rope_theta ** (-2 * i / config.head_size), config.rope_scaling
        if s:
            wavelength = 2 * math.pi / f
            longest, shortest = (s["original_context"] / s[key] for key in ("low_freq_factor", "high_freq_factor"))
            if wavelength > longest:
                f = f / s["factor"]
            elif wavelength >= shortest:
                smooth = (s["original_context"] / wavelength - s["low_freq_factor"]) / (
                    s["high_freq_factor"] - s["low_freq_factor"])
                f = (1 - smooth) * f / s["factor"] + smooth * f
        out.append(f)
    return out


def naive_turn(config, x, position):
    """Rotary positions by complex numbers: the pair (x_i, x_{i + hs/2}) times e^(j position f_i)."""
    half = config.head_size // 2
    out = np.empty_like(x)
    for i, f in enumerate(naive_frequencies(config)):
        z = complex(x[i], x[i + half]) * complex(math.cos(position * f), math.sin(position * f))
        out[i], out[i + half] = z.real, z.imag
    return out


def naive_mlp(config, mlp, x):
    up = naive_linear(mlp.up, x)
    if config.activation == "swiglu":
        gate = naive_linear(mlp.gate, x)
        return naive_linear(mlp.down, gate / (1 + np.exp(-gate)) * up)
    if config.activation == "relu":
        return naive_linear(mlp.down, np.maximum(up, 0))
    if config.activation == "gelu":
        return naive_linear(mlp.down, 0.5 * up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))))
    return naive_linear(mlp.down, 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up ** 3))))


def naive_layer(config, block, xs, positions, sees):
    """One block over xs, a list of N vectors: the new list, and its attention (nh, N, N)."""
    hs, nh, nkv = config.head_size, config.n_head, config.n_kv_head
    turn = (lambda x, p: naive_turn(config, x, p)) if config.position == "rotary" else (lambda x, p: x)
    normed = [naive_norm(config, x, block.norm1) for x in xs]
    q, k, v = ([naive_linear(layer, x).reshape(-1, hs) for x in normed]
               for layer in (block.attn.q, block.attn.k, block.attn.v))  # N of (heads, hs)
    attention, out = np.zeros((nh, len(xs), len(xs))), []
    for i, x in enumerate(xs):
        heads = []
        for h in range(nh):
            shared = h // (nh // nkv)  # the key head that this query head reads
            seen = [j for j in range(len(xs)) if sees(i, j)]
            scores = [turn(q[i][h], positions[i]) @ turn(k[j][shared], positions[j]) / math.sqrt(hs) for j in seen]
            weights = np.exp(np.array(scores) - max(scores))
            attention[h, i, seen] = weights / weights.sum()
            heads.append(sum(attention[h, i, j] * v[j][shared] for j in seen))
        x = x + naive_linear(block.attn.o, np.concatenate(heads))
        out.append(x + naive_mlp(config, block.mlp, naive_norm(config, x, block.norm2)))
    return out, attention


def naive(model, vectors, positions=None, sees=causal):
    """Logits (N, V) of N embeddings (N, C), one row, and the attention (nh, N, N) of every layer.

    positions  where each vector stands (default 0, 1, ...);  sees  (i, j) -> whether i attends to j
    """
    config = model.config
    positions = list(range(len(vectors))) if positions is None else positions
    xs = [x for x in vectors.detach().double().numpy()]
    if config.position == "learned":
        table = model.wpe.weight.detach().double().numpy()
        xs = [x + table[p + config.position_offset] for x, p in zip(xs, positions)]
    maps = []
    for block in model.blocks:
        xs, attention = naive_layer(config, block, xs, positions, sees)
        maps.append(attention)
    head = (model.wte if config.tied else model.lm_head).weight.detach().double().numpy()
    return torch.tensor(np.array([head @ naive_norm(config, x, model.norm) for x in xs])), maps




def close(a, b, atol=2e-5):
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=1e-5)


# ---- the fast twins

@pytest.mark.parametrize("trained", [True, False])
def test_the_norms_gradient_is_autograds(trained):
    """Oracle: the definition, in float64, which autograd differentiates; inputs whose mean is far from 0."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(3, 5, 24, generator=generator) + 2, torch.randn(3, 5, 24, generator=generator)
    norm = RMSNorm(24, eps=0.1)
    norm.weight.data.normal_(1, 0.5, generator=generator)
    norm.weight.requires_grad_(trained)
    fast, slow, w = (t.requires_grad_() for t in (x.clone(), x.double(), norm.weight.detach().double()))
    expected = slow / (slow.square().mean(-1, keepdim=True) + 0.1).sqrt() * w
    close(norm(fast), expected, atol=1e-6)
    with torch.no_grad():
        close(norm(x), expected, atol=1e-6)
    norm(fast).backward(g)
    expected.backward(g.double())
    close(fast.grad, slow.grad, atol=1e-6)
    if trained:
        close(norm.weight.grad, w.grad, atol=1e-5)
    else:
        assert norm.weight.grad is None
    assert norm.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("least, trained", ((0, ("x", "W")), (0, ("x",)), (0, ("W",)), (1 << 21, ("x", "W"))))
def test_a_linear_layer_and_its_gradients_are_those_of_float64(least, trained, bias, monkeypatch):
    """By oneDNN and by PyTorch's own product; x in memory as it comes or turned; what is frozen gets no gradient."""
    monkeypatch.setattr(products, "LEAST", least)
    generator, layer = torch.Generator().manual_seed(0), products.Linear(20, 12, bias=bias)
    x = torch.randn(7, 20, 3, generator=generator).permute(2, 0, 1)  # (3, 7, 20), not contiguous
    x.requires_grad_("x" in trained)
    layer.requires_grad_("W" in trained)
    y = layer(x)
    by_onednn = "Product" in type(y.grad_fn).__name__
    assert by_onednn == (products.HAVE and least == 0)
    g = torch.randn(7, 3, 12, generator=generator).transpose(0, 1)
    y.backward(g)
    X, W, G = x.detach().double(), layer.weight.detach().double(), g.double()
    close(y, torch.einsum("bti,oi->bto", X, W) + (layer.bias.detach().double() if bias else 0), atol=1e-5)
    for p, wanted in ((x, torch.einsum("bto,oi->bti", G, W)), (layer.weight, torch.einsum("bto,bti->oi", G, X)),
                      (layer.bias, G.sum((0, 1)))):
        if p is not None and p.requires_grad:
            close(p.grad, wanted, atol=1e-5)
        elif p is not None:
            assert p.grad is None


def test_what_is_cast_or_compiled_keeps_pytorchs_product(monkeypatch):
    """oneDNN would compute a cast product in float32, and Inductor makes its own."""
    monkeypatch.setattr(products, "LEAST", 0)
    layer, x = products.Linear(16, 8, bias=False).requires_grad_(False), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    close(layer.double()(x.double()), x.double() @ layer.weight.T, atol=1e-12)
    called = {node.target for node in torch.export.export(layer.float(), (x,)).graph.nodes}
    assert torch.ops.aten.linear.default in called


def test_every_plain_layer_has_the_fast_product():
    """Those of a GPT, of a pruned one, and of one whose packed layers are unpacked."""
    model = gpt("ours")
    pruned, _ = compress(model, tokens(4, 16), "magnitude", sparsity=0.5)
    packed, _ = compress(model, tokens(4, 16), "rtn", bits=4)
    for made in (model, pruned, unpacked(packed)):
        layers = [layer for layer in made.modules() if hasattr(layer, "in_features")]
        assert len(layers) == 13 and {type(layer) for layer in layers} == {products.Linear}


@family
def test_q_k_v_of_training_are_the_plain_ones(name):
    """In q and k the numbers i and i + hs / 2 of a head stand side by side; gradients are those of the plain form."""
    model = gpt(name)
    attention, hs = model.blocks[1].attn, model.config.head_size
    order = torch.arange(hs).view(2, -1).T.flatten() if model.config.position == "rotary" else torch.arange(hs)
    x, positions = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)), torch.arange(7)[None] + 4
    assert rotary.trains(attention, x)
    gradients = []
    for turned, make in ((slice(None), rotary.qkv), (order, lambda *given: attention.qkv(*given))):
        model.zero_grad()
        x.grad = None
        q, k, v = make(attention, x.requires_grad_(), positions) if make is rotary.qkv else make(x, positions)
        found = q[..., turned], k[..., turned], v
        sum((t * (i + torch.arange(t.numel()).view(t.shape).cos())).sum() for i, t in enumerate(found)).backward()
        gradients.append([*found, x.grad, *(p.grad for n, p in attention.named_parameters() if not n.startswith("o."))])
    for a, b in zip(*gradients):
        close(a, b, atol=1e-4)
    # frozen layers, layers that are watched and cached keys keep the plain form
    with torch.no_grad():
        assert not rotary.trains(attention, x)
    hook = attention.k.register_forward_pre_hook(lambda *_: None)
    assert not rotary.trains(attention, x)
    hook.remove()
    attention.q.weight.requires_grad_(False)
    assert not rotary.trains(attention, x)
    attention.q.weight.requires_grad_(True)
    attention.k.bias = None if attention.k.bias is not None else torch.nn.Parameter(torch.ones(len(attention.k.weight)))
    assert not rotary.trains(attention, x)  # a bias beside layers without one, as `merge_biases` may leave


# ---- the model

@family
def test_every_family_is_the_loops(name):
    model, ids = gpt(name), tokens(2, 9)
    for row, logits in zip(ids, model(ids)):
        close(logits, naive(model, model.wte(row))[0])


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_the_norms_add_the_eps_of_the_config(name):
    """An eps as large as the activations: what any other one gives is far away."""
    model, ids = gpt(name, norm_eps=1.0), tokens(1, 5)
    close(model(ids)[0], naive(model, model.wte(ids[0]))[0])


@family
def test_block_alone_is_causal_from_position_zero(name):
    model, ids = gpt(name), tokens(1, 7)
    x = model.embed(ids)
    for block in model.blocks:
        x = block(x)
    close(model.head(x), model(ids), atol=1e-6)
    start = model.embed(ids, start=4)  # the first token stands at `start`
    place = model.wpe.weight[4 + model.config.position_offset] if model.config.position == "learned" else 0
    close(start[0, 0], model.wte(ids[0, 0]) + place, atol=1e-7)


def test_rope_table_is_the_definition():
    for name in ("ours", "llama"):
        config = gpt(name).config
        table = rope_table(config)
        assert table.shape == (config.context, 2, config.head_size // 2)
        for t in (0, 1, 31):
            for i, f in enumerate(naive_frequencies(config)):
                assert table[t, 0, i].item() == pytest.approx(math.cos(t * f), abs=1e-6)
                assert table[t, 1, i].item() == pytest.approx(math.sin(t * f), abs=1e-6)


def test_casts_round_the_weights_and_not_the_rotary_table():
    """There and back through bfloat16 the weights are rounded, the angles are exact, and all layers share them."""
    model, ids = gpt(), tokens(2, 9)
    table = model.blocks[0].attn.rope.clone()
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        model = model.to(cast)
        assert all(block.attn.rope is model.blocks[0].attn.rope for block in model.blocks)
        assert torch.equal(model.blocks[0].attn.rope, table)
    fresh = gpt().bfloat16()
    other = GPT(model.config)
    other.load_state_dict({name: t.float() for name, t in fresh.half().float().state_dict().items()})
    assert torch.equal(model(ids), other(ids))


def test_a_later_token_changes_nothing_before_it():
    model, ids = gpt(), tokens(1, 8)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 50
    a, b = model(ids), model(other)
    assert torch.equal(a[0, :5], b[0, :5]) and not torch.equal(a[0, 5], b[0, 5])


@family
def test_the_tied_head_is_one_tensor_and_counted_once(name):
    model = gpt(name)
    tied = model.config.tied
    assert (model.lm_head.weight is model.wte.weight) == tied
    sizes = {key: t.numel() for key, t in model.state_dict().items()}
    assert model.n_parameters() == sum(sizes.values()) - (sizes["lm_head.weight"] if tied else 0)
    twin = copy.deepcopy(model)  # still tied, and to itself
    assert (twin.lm_head.weight is twin.wte.weight) == tied and twin.wte.weight is not model.wte.weight
    assert not any("rope" in key for key in model.state_dict())
    if model.config.position == "rotary":
        assert all(block.attn.rope is model.blocks[0].attn.rope for block in model.blocks)


def test_parameters_and_flops_counted_by_hand():
    model = GPT(GPTConfig(vocab_size=50, context=32, n_layer=2, n_head=4, n_embd=32, n_hidden=40, n_kv_head=2,
                          activation="swiglu", tied=False))
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 40  # q and o; k and v; gate, up and down
    assert model.n_parameters() == 2 * (layer + 2 * 32) + 32 + 2 * 50 * 32
    # 2 a weight, the head's included; then 2 hs to compare with a key and 2 hs to add its value, T keys, each head
    assert model.flops_per_token(10) == 2 * (2 * layer + 50 * 32) + 2 * 4 * 10 * (2 * 8 + 2 * 8)
    assert model.flops_per_token() == model.flops_per_token(32)
    packed, _ = compress(model, tokens(2, 8, vocab=50), "rtn", bits=4, group_size=16)
    assert packed.flops_per_token(10) == model.flops_per_token(10)  # unpacked or not, each weight is multiplied


def test_initialisation():
    model = GPT(GPTConfig(vocab_size=500, n_embd=96, n_layer=3, bias=True, norm="layernorm"))
    model.init_weights(torch.Generator().manual_seed(0))
    std = 0.02 * math.sqrt(768 / 96)
    for block in model.blocks:
        for layer in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
            assert layer.bias.abs().max() == 0
        for layer in (block.attn.o, block.mlp.down):
            assert layer.weight.std().item() == pytest.approx(std / math.sqrt(6), rel=0.05)
        assert torch.equal(block.norm1.weight, torch.ones(96)) and torch.equal(block.norm1.bias, torch.zeros(96))
    assert model.wte.weight.std().item() == pytest.approx(std, rel=0.05)
    again = GPT(model.config).init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("bad", [
    dict(n_layer=0), dict(n_embd=-4), dict(n_embd=30), dict(n_kv_head=3),
    dict(n_kv_head=-1), dict(position="none"), dict(norm="batch"), dict(activation="tanh"), dict(n_embd=12, n_head=4)])
def test_a_bad_config_is_refused_with_the_number(bad):
    with pytest.raises(ValueError, match=str(list(bad.values())[0]) if bad != dict(n_embd=12, n_head=4) else "3"):
        GPTConfig(**{**SMALL, **bad})


# ---- prompts in front, and the cache

@family
def test_prompt_logits_are_the_texts(name):
    """P1: the T text tokens get logits, the prompt gets none, and nothing is shifted."""
    model, ids = gpt(name), tokens(2, 6)
    prompts = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    for prompt in (prompts, prompts[0]):  # a prompt a row, or one for all
        logits = model(ids, prompt=prompt)
        assert logits.shape == (2, 6, 50)
        for b in range(2):
            vectors = torch.cat([prompt[b] if prompt.dim() == 3 else prompt, model.wte(ids[b])])
            close(logits[b], naive(model, vectors)[0][5:])


@family
def test_prompt_of_real_tokens_is_those_tokens(name):
    """P3: embeddings of tokens as a prompt equal the tokens, positions included."""
    model, ids = gpt(name), tokens(3, 9)
    close(model(ids[:, 4:], prompt=model.wte(ids[:, :4])), model(ids)[:, 4:], atol=1e-5)


@family
@pytest.mark.parametrize("cuts", [(9,), (5, 1, 3), (1,) * 9])
def test_cached_is_uncached(name, cuts):
    """P5: the text in pieces through the cache equals the text at once."""
    model, ids = gpt(name), tokens(3, 9)
    cache = model.new_cache(3, 9)
    logits = torch.cat([model(part, cache=cache) for part in ids.split(cuts, dim=1)], dim=1)
    close(logits, model(ids), atol=1e-5)
    assert cache.used == 9 and cache.length.tolist() == [9, 9, 9]


def test_a_prompt_takes_room_in_the_cache():
    """A cache of 8 slots behind a prompt of 3 has room for 5 tokens of text, and says so before it overwrites."""
    model, cache = gpt(), gpt().new_cache(2, 8)
    model(tokens(2, 4), prompt=torch.zeros(3, 32), cache=cache)
    assert cache.used == 7 and cache.length.tolist() == [7, 7]
    with pytest.raises(ValueError, match="7 cached . 0 prompt . 2 text .*8"):
        model(tokens(2, 2), cache=cache)


def test_rewind_frees_what_was_read():
    """Read, forget the end of each row, read something else: as if only that had been read."""
    model, ids, other = gpt(), tokens(2, 8), tokens(2, 3, seed=5)
    cache = model.new_cache(2, 8)
    model(ids, cache=cache)
    cache.rewind(torch.tensor([2, 5]))
    assert cache.used == 5 and cache.length.tolist() == [2, 5]
    logits = model(other, cache=cache)
    for b, n in enumerate((2, 5)):
        close(logits[b], model(torch.cat([ids[b, :n], other[b]])[None])[0, n:], atol=1e-5)


def test_repeat_is_rows_of_their_own():
    """Rows in any order, as often as asked for; what is written behind them reaches neither the source nor a twin."""
    model, ids = gpt(), tokens(2, 4)
    cache = model.new_cache(2, 4)
    model(ids, cache=cache, lengths=torch.tensor([4, 2]))
    before, more = [kv.clone() for kv in cache.kv], tokens(3, 2, seed=7)
    logits = model(more, cache=cache.repeat(torch.tensor([1, 0, 1]), 2))
    for b, row in enumerate((ids[1, :2], ids[0], ids[1, :2])):
        close(logits[b], model(torch.cat([row, more[b]])[None])[0, -2:], atol=1e-5)
    assert all(map(torch.equal, cache.kv, before)) and cache.slots == cache.used == 4
    with pytest.raises(ValueError, match="4 cached and 29 new.*32"):
        cache.repeat(torch.tensor([0]), 29)


def test_every_token_but_the_first_goes_through_step():
    """The seam for faster code: what replaces `step` gives every further token, and only those."""
    model, ids, asked = gpt(), tokens(2, 5), []

    class Other(GPT):
        def step(self, ids, cache):
            asked.append(ids[:, 0].tolist())
            return super().step(ids, cache)
    expected = model.generate(ids, 4)
    model.__class__ = Other
    assert torch.equal(model.generate(ids, 4), expected)
    assert asked == expected[:, 5:8].T.tolist()


@family
def test_a_padded_batch_is_its_rows_alone(name):
    """P5: rows of 3, 7 and 5 tokens padded on the right, behind a prompt; then two more tokens each."""
    model, lengths, more = gpt(name), [3, 7, 5], tokens(3, 2, seed=5)
    rows = [tokens(n, seed=n) for n in lengths]
    ids = torch.full((3, 7), 49)
    for b, row in enumerate(rows):
        ids[b, :len(row)] = row
    prompt = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(3, 4 + 7 + 2)
    first = model(ids, prompt, cache, torch.tensor(lengths))
    second = torch.cat([model(more[:, :1], cache=cache), model(more[:, 1:], cache=cache)], dim=1)
    assert cache.length.tolist() == [4 + n + 2 for n in lengths]
    for b, row in enumerate(rows):
        alone = naive(model, torch.cat([prompt, model.wte(torch.cat([row, more[b]]))]))[0][4:]
        close(first[b, :len(row)], alone[:len(row)])
        close(second[b], alone[len(row):])


def test_a_token_in_front_of_all_that_counts_attends_to_itself():
    """Else its attention would be a softmax over nothing: NaN, which times a probability of 0 is NaN again."""
    cache = gpt().new_cache(2, 6)
    cache.first = torch.tensor([0, 4])
    mask = cache.mask(cache.positions(6))[:, 0]  # (2, 6, 6)
    assert torch.equal(mask[0], torch.ones(6, 6).tril().bool())
    assert torch.equal(mask[1, :4], torch.eye(4, 6).bool())
    assert mask[1, 4:].int().tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]


@family
def test_masked_slots_do_not_exist(name):
    """P6: slots before `first` take no attention, whatever they hold; a prompt behind them starts at their position."""
    model, ids = gpt(name), tokens(1, 5)
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(1, 12)
    for kv in cache.kv:
        kv.fill_(7.0)
    cache.length, cache.first, cache.used = torch.tensor([4]), torch.tensor([4]), 4
    vectors = torch.cat([prompt, model.wte(ids[0])])
    close(model(ids, prompt=prompt, cache=cache)[0], naive(model, vectors, range(4, 12))[0][3:])


def test_rotary_positions_are_relative():
    model, ids = gpt("ours"), tokens(1, 5)
    cache = model.new_cache(1, 20)
    cache.length, cache.first, cache.used = torch.tensor([11]), torch.tensor([11]), 11
    close(model(ids, cache=cache), model(ids), atol=1e-5)


@family
def test_what_does_not_fit_is_an_error(name):
    """P4: never a silent cut, and the numbers are in the message; what fits exactly, fits."""
    model, prompt = gpt(name), torch.zeros(10, 32)
    assert model(tokens(1, 22), prompt=prompt).shape == (1, 22, 50)
    with pytest.raises(ValueError, match="0 cached . 10 prompt . 23 text .*32"):
        model(tokens(1, 23), prompt=prompt)
    with pytest.raises(ValueError, match="33.*32"):
        model(tokens(1, 33))
    with pytest.raises(ValueError, match="33.*32"):
        model.new_cache(1, 33)
    cache = model.new_cache(1, 8)
    model(tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="5 cached . 0 prompt . 4 text .*8"):
        model(tokens(1, 4), cache=cache)
    model(tokens(1, 3), cache=cache)
    assert model.generate(tokens(1, 22), 10).shape == (1, 32)
    for more, settings in ((11, {}), (5, {"prompt": prompt})):
        with pytest.raises(ValueError, match="32|37"):
            model.generate(tokens(1, 22), more, **settings)
    with pytest.raises(ValueError, match="2 text . 7 new.*8"):
        model.generate(tokens(1, 2), 7, cache=model.new_cache(1, 8))


# ---- generation

def naive_generate(model, ids, new, prompt=None):
    """Greedy, one row, everything computed again for every token."""
    for _ in range(new):
        vectors = model.wte(torch.tensor(ids))
        vectors = vectors if prompt is None else torch.cat([prompt, vectors])
        ids = ids + [int(naive(model, vectors)[0][-1].argmax())]
    return ids


@family
def test_generation_is_the_loop(name):
    """P5: ragged rows, with and without a prompt, equal each row alone with no cache at all."""
    model, lengths = gpt(name, seed=6), [2, 5]  # a seed whose answers do not repeat one token
    ids = tokens(2, 5)
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    for p in (None, prompt):
        out = model.generate(ids, 4, torch.tensor(lengths), prompt=p)
        assert out.shape == (2, 9)
        for b, n in enumerate(lengths):
            assert out[b, :n + 4].tolist() == naive_generate(model, ids[b, :n].tolist(), 4, p)
    assert torch.equal(model.generate(ids, 4), torch.stack([model.generate(row[None], 4)[0] for row in ids]))


def test_generation_that_does_not_fit_is_refused_before_anything_is_read():
    """What the cache holds, a prompt, the text and all new tokens together; the cache is as it was."""
    model, ids = gpt(), tokens(2, 9)
    for P, new in ((0, 5), (2, 3), (3, 2)):
        cache = model.new_cache(2, 13)
        model(ids[:, :4], cache=cache)
        kept = [kv.clone() for kv in cache.kv]
        prompt = torch.zeros(P, 32) if P else None
        with pytest.raises(ValueError, match=f"4 cached . {P} prompt . 5 text . {new} new tokens do not fit .* 13"):
            model.generate(ids[:, 4:], new, prompt=prompt, cache=cache)
        assert cache.used == 4 and all(torch.equal(a, b) for a, b in zip(kept, cache.kv))
        model.generate(ids[:, 4:], new - 1, prompt=prompt, cache=cache)
    with pytest.raises(ValueError, match="0 cached . 0 prompt . 9 text . 90 new tokens do not fit the context of"):
        model.generate(ids, 90)
    with pytest.raises(ValueError, match="9 text tokens do not fit a cache of 8"):
        model(ids, cache=model.new_cache(2, 8))


@pytest.mark.parametrize("P", [1, 2, 5])
def test_generation_behind_a_prompt_for_each_row(P):
    """(B, P, C): every row goes on as alone behind its own prompt, whether P is less than B, B or more."""
    model, ids, lengths = gpt(), tokens(2, 6), torch.tensor([6, 3])
    prompts = torch.randn(2, P, 32, generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(2, P + 6 + 4)  # just the room that this takes
    out = model.generate(ids, 4, lengths, prompt=prompts, cache=cache)
    assert torch.equal(out, model.generate(ids, 4, lengths, prompt=prompts))
    for b, n in enumerate(lengths.tolist()):
        alone = model.generate(ids[b:b + 1, :n], 4, prompt=prompts[b])
        assert out[b, :n + 4].tolist() == alone[0].tolist()


@pytest.mark.parametrize("lengths", [[0, 3], [3, 6], [-1, 5]])
def test_a_row_without_tokens_or_longer_than_the_ids_cannot_be_continued(lengths):
    with pytest.raises(ValueError, match=r"lengths must be in \[1, 5\], got \[" + ", ".join(map(str, lengths))):
        gpt().generate(tokens(2, 5), 2, torch.tensor(lengths))


def test_generation_goes_on_from_a_cache():
    model, ids = gpt(), tokens(2, 9)
    cache = model.new_cache(2, 13)
    model(ids[:, :4], cache=cache)
    assert torch.equal(model.generate(ids[:, 4:], 4, cache=cache)[:, 5:], model.generate(ids, 4)[:, 9:])


@pytest.mark.parametrize("seed, stop, stopped", [(6, 30, [4, 6, 0]), (9, 12, [1, 2, 1]), (7, 33, [0, 6, 2])])
def test_generation_stops_row_by_row(seed, stop, stopped):
    """A row that produced the stop token repeats it, its neighbours go on; with all rows done the rest is filled in."""
    model, ids, lengths = gpt(seed=seed), tokens(3, 5), [5, 3, 4]
    free = model.generate(ids, 6, torch.tensor(lengths))
    out = model.generate(ids, 6, torch.tensor(lengths), stop=stop)
    for b, n in enumerate(lengths):
        new = free[b, n:n + 6].tolist()
        assert (new + [stop]).index(stop) == stopped[b]  # the example is the one that was wanted
        assert out[b, :n + 6].tolist() == ids[b, :n].tolist() + new[:stopped[b]] + [stop] * (6 - stopped[b])
        assert torch.equal(out[b, n + 6:], free[b, n + 6:])  # behind its own tokens a short row holds nothing new


def test_sampling_follows_the_softmax():
    model, ids, n = gpt(seed=4, vocab_size=12), tokens(1, 3, vocab=12), 8000
    expected = (naive(model, model.wte(ids[0]))[0][-1] / 2.0).softmax(-1)
    draw = [model.generate(ids.expand(n, 3), 1, temperature=2.0, generator=torch.Generator().manual_seed(s))[:, 3]
            for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    seen = torch.bincount(draw[0], minlength=12) / n
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()
    with pytest.raises(ValueError, match="max_new_tokens.*0"):
        model.generate(ids, 0)


# ---- safetensors

def test_safetensors_bytes_are_the_format(tmp_path):
    """Parsed again by hand: 8 bytes, JSON, then each tensor's bytes where the header says."""
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.tensor([1, 255], dtype=torch.uint8),
               "c": torch.tensor([[1., 2.], [3., 4.]]).T}
    write_safetensors(path, tensors, {"who": "me"})
    data = path.read_bytes()
    n, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])
    assert n % 8 == 0 and header.pop("__metadata__") == {"who": "me"} and list(header) == ["a", "b", "c"]
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert data[8 + n:] == struct.pack("<6f", *range(6)) + b"\x01\xff" + struct.pack("<4f", 1, 3, 2, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_safetensors_round_trip_of_every_dtype(tmp_path):
    path, generator = tmp_path / "t", torch.Generator().manual_seed(0)
    tensors = {"one byte first": torch.ones(1, dtype=torch.uint8)}
    for name, dtype in DTYPES.items():  # shapes of odd sizes: what follows is not aligned
        for shape in ((3, 5), (), (0, 4), (1,)):
            noise = torch.randn(shape, generator=generator) * 50
            tensors[f"{name}{shape}"] = noise > 0 if dtype == torch.bool else noise.to(dtype)
    write_safetensors(path, tensors)
    back, metadata = read_safetensors(path)
    assert metadata == {} and back.keys() == tensors.keys()
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and back[name].shape == t.shape and torch.equal(back[name], t)
        assert back[name].data_ptr() % t.itemsize == 0  # aligned, wherever its bytes lie in the file
    back["F32(3, 5)"].zero_()  # private to this process: the file stays
    assert torch.equal(read_safetensors(path)[0]["F32(3, 5)"], tensors["F32(3, 5)"])


def raw(path, header, body=b"", n=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if n is None else n) + text + body)


def one(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize("header, body, names", [
    (b"", b"", "JSON"), (b"{", b"", "JSON"), (b"\xff\xfe", b"", "JSON"), (b"[" * 100_000, b"", "JSON"),
    ([], b"", "object"), (7, b"", "object"), ({"__metadata__": []}, b"", "object"),
    ({"a": 1}, b"", "a.*data_offsets"), ({"a": {}}, b"", "a.*data_offsets"),
    (one(dtype="F99"), bytes(8), "a.*F99"), (one(dtype=None), bytes(8), "a.*dtype"),
    (one(shape=None), bytes(8), "a.*shape"), (one(shape=[-2]), bytes(8), "a.*shape"),
    (one(shape=[2.0]), bytes(8), "a.*shape"), (one(shape=[True, 2]), bytes(8), "a.*shape"),
    (one(shape="2"), bytes(8), "a.*shape"), (one(shape=[3]), bytes(8), "a.*8 bytes"),
    (one(data_offsets=[0]), bytes(8), "a.*data_offsets"), (one(data_offsets=[8, 0]), bytes(8), "a.*bytes"),
    (one(data_offsets=[-8, 0]), bytes(8), "a.*data_offsets"), (one(data_offsets="08"), bytes(8), "a.*data_offsets"),
    (one(), bytes(7), "a.*1 bytes after"), (one(data_offsets=[1 << 62, (1 << 62) + 8]), bytes(8), "a.*do not follow"),
    (one(), bytes(15), "7 bytes follow the last tensor"), (one(data_offsets=[4, 12]), bytes(12), "a.*do not follow"),
    ({**one(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12), "b.*overlap"),
    (one(dtype=["F32"]), bytes(8), "a.*dtype"), (one(dtype={}), bytes(8), "a.*dtype"),
    (one(shape=[10 ** 30, 0], data_offsets=[0, 0]), b"", "a.*shape"),
    (one(shape=[2 ** 40, 2 ** 40, 0], data_offsets=[0, 0]), b"", "a.*shape"),
])
def test_a_hostile_header_is_a_value_error(tmp_path, header, body, names):
    path = tmp_path / "hostile.safetensors"
    raw(path, header, body)
    with pytest.raises(ValueError, match=f"hostile.safetensors.*{names}"):
        read_safetensors(path)


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "long"
    for n in (3, 1 << 40, (1 << 64) - 1):
        raw(path, b"{}", n=n)
        with pytest.raises(ValueError, match=f"long.*{n}"):
            read_safetensors(path)
    for content in (b"", b"1234567"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"long.*{len(content)} bytes"):
            read_safetensors(path)
    with pytest.raises(OSError):
        read_safetensors(tmp_path / "missing")


def test_a_truncated_file_is_a_value_error_at_every_length(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_safetensors(whole, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    data = whole.read_bytes()
    for n in range(len(data)):
        cut.write_bytes(data[:n])
        with pytest.raises(ValueError, match="cut"):
            read_safetensors(cut)


def test_a_damaged_byte_never_crashes(tmp_path):
    """Any byte of a checkpoint's header replaced by any other: it loads, or a ValueError names the file."""
    path, rng = tmp_path / "damaged", random.Random(0)
    save(gpt(n_layer=1, n_embd=8, n_hidden=8, context=8, vocab_size=10), path)
    data = bytearray(path.read_bytes())
    n, = struct.unpack("<Q", data[:8])
    for _ in range(150):
        at = rng.randrange(8 + n)
        path.write_bytes(data[:at] + bytes([rng.randrange(32, 127)]) + data[at + 1:])
        try:
            load(path)
        except ValueError as error:
            assert "damaged" in str(error)


def test_a_full_disk_leaves_no_file(tmp_path):
    """Saving is whole or not at all: the operating system refuses to write on in the middle of the tensors."""
    path, model = tmp_path / "m.safetensors", gpt()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for before in (None, b"what was there"):
        if before:
            path.write_bytes(before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
        try:
            with pytest.raises(OSError):
                save(model, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in tmp_path.iterdir()] == ([path.name] if before else [])
    assert path.read_bytes() == b"what was there"
    with pytest.raises(OSError):
        save(model, tmp_path / "no such folder" / "m")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(OSError):  # the last step, the renaming, fails
        save(model, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", path.name]


# ---- checkpoints

@family
def test_checkpoint_round_trip(name, tmp_path):
    model, path, ids = gpt(name), tmp_path / "m", tokens(2, 6)
    save(model, path)
    back = load(path)
    assert back.config == model.config and torch.equal(back(ids), model(ids))
    assert (back.lm_head.weight is back.wte.weight) == model.config.tied
    assert all(p.requires_grad and p.dtype == torch.float32 for p in back.parameters())
    stored, _ = read_safetensors(path)
    assert ("lm_head.weight" in stored) != model.config.tied  # the tied head is stored once
    assert sum(t.numel() for t in stored.values()) == model.n_parameters()
    size = path.stat().st_size
    with open(path, "r+b") as f:  # the weights do not live in the file: another run may write over it
        f.write(bytes(size))
    assert torch.equal(back(ids), model(ids))


def test_checkpoint_in_half_precision(tmp_path):
    model, ids = gpt().to(torch.bfloat16), tokens(1, 6)
    save(model, tmp_path / "m")
    back = load(tmp_path / "m")
    assert back.wte.weight.dtype == torch.bfloat16 and torch.equal(back(ids), model(ids))


def test_pruned_weights_are_a_bitmap_and_values(tmp_path):
    model = gpt()
    weight = model.blocks[1].mlp.up.weight  # (40, 32)
    with torch.no_grad():
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
        model.blocks[0].attn.q.weight[0, ::2] = 0  # zeros of a layer that nobody pruned: stored as any weight
    model.pruned = frozenset(["blocks.1.mlp.up"])
    save(model, tmp_path / "m")
    stored, _ = read_safetensors(tmp_path / "m")
    name = "blocks.1.mlp.up.weight"
    bits, values = stored[name + ".bitmap"], stored[name + ".values"]
    assert name not in stored and "blocks.0.attn.q.weight" in stored
    assert bits.numel() == 40 * 32 / 8 and bits.dtype == torch.uint8
    flat, at = weight.detach().flatten().tolist(), 0  # by hand: most significant bit first
    for i, w in enumerate(flat):
        bit = int(bits[i // 8]) >> (7 - i % 8) & 1
        assert bit == (w != 0)
        if bit:
            assert values[at].item() == w
            at += 1
    assert at == len(values)
    back = load(tmp_path / "m")
    assert torch.equal(back.blocks[1].mlp.up.weight, weight) and back.pruned == model.pruned


def test_all_zero_and_odd_shapes_survive(tmp_path):
    model = gpt(n_hidden=13)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.zero_()
        model.blocks[0].mlp.down.weight[:, ::2] = 0
    model.pruned = frozenset(["blocks.0.mlp.up", "blocks.0.mlp.down"])
    save(model, tmp_path / "m")
    back = load(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))


def test_packed_layers_come_back_packed(tmp_path):
    kernels, compress = pytest.importorskip("kernels"), pytest.importorskip("compress")
    model, ids = gpt("gpt2"), tokens(1, 6)
    for block in model.blocks:
        layer = block.attn.q
        block.attn.q = kernels.PackedLinear(kernels.pack(compress.rtn(layer.weight.detach(), 3, 16)), layer.bias)
    save(model, tmp_path / "m")
    back = load(tmp_path / "m")
    assert torch.equal(back(ids), model(ids)) and isinstance(back.blocks[1].attn.q, kernels.PackedLinear)
    assert not any(key.endswith("attn.q.weight") for key in back.state_dict())


def rewrite(path, config=None, modules=None, drop=(), **tensors):
    """The checkpoint at `path` with other settings or tensors in it."""
    old, metadata = read_safetensors(path)
    old = {name: t.clone() for name, t in old.items() if name not in drop}
    if isinstance(config, dict):
        config = json.dumps({**json.loads(metadata["config"]), **config})
    metadata["config"] = config or metadata["config"]
    write_safetensors(path, {**old, **tensors}, {**metadata, "modules": modules or metadata["modules"]})


FULL = torch.full((200,), 255, dtype=torch.uint8)  # the bitmap of a (50, 32) weight without zeros
BITS, VALUES = "wte.weight.bitmap", "wte.weight.values"


def pruned(bitmap, values=torch.ones(1600)):
    return {"drop": ["wte.weight"], BITS: bitmap, VALUES: values}


@pytest.mark.parametrize("changes, names", [
    (dict(config={"n_layer": 3}), "missing.*blocks.2"), (dict(config={"n_layer": 1}), "surplus.*blocks.1"),
    (dict(config={"n_hidden": 41}), r"blocks.0.mlp.*40.*41"), (dict(config={"n_embd": 31}), "31"),
    (dict(config={"surprise": 1}), "surprise"), (dict(config="[]"), "configuration"),
    (dict(config="{"), "configuration"), (dict(config="7"), "configuration"),
    (dict(drop=["norm.weight"]), "missing.*norm.weight"), (dict(extra=torch.ones(1)), "surplus.*extra"),
    ({"norm.weight": torch.ones(7)}, "norm.weight.*7.*32"),
    ({"drop": ["wte.weight"], BITS: FULL}, "wte.weight"), (pruned(FULL[:-1]), "wte.weight"),
    (pruned(FULL // 2), "wte.weight"), ({"no.such.bitmap": FULL}, "no.such"),
    (dict(config="[" * 100_000), "configuration"),
    ({"norm.weight": torch.ones(32, dtype=torch.int64)}, "norm.weight"),
    (pruned(FULL.float()), "wte.weight"), (pruned(FULL, torch.ones(1600).long()), "wte.weight"),
    (dict(modules="[1]"), "modules"), (dict(modules='{"no.such": {}}'), "no.such"),
    (dict(modules='{"blocks.0.attn.q": {}}'), "blocks.0.attn.q"),
    (dict(config={"rope_scaling": "x"}), "rope_scaling"),
    (dict(config={"rope_scaling": {"factor": 2}}), "rope_scaling"),
    (dict(config={"rope_theta": "x"}), "rope_theta"), (dict(config={"norm_eps": "x"}), "norm_eps"),
    (dict(config={"position": "learned", "position_offset": -50}), "position_offset"),
    (dict(config={"context": 10 ** 15}), "context"), (dict(config={"context": "x"}), "context"),
    (dict(config={"vocab_size": 2.5}), "vocab_size"), (dict(config={"n_layer": True}), "n_layer"),
])
def test_a_foreign_or_damaged_checkpoint_is_named(tmp_path, changes, names):
    path = tmp_path / "damaged"
    save(gpt(), path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=f"damaged.*({names})"):
        load(path)


def test_a_file_of_tensors_without_our_settings_is_refused(tmp_path):
    write_safetensors(tmp_path / "foreign", {"wte.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="foreign.*configuration"):
        load(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match="missing tensors.*blocks.0.attn.o.weight"):
        assemble(GPTConfig(**SMALL), {"blocks.0.attn.k.weight": torch.ones(32, 32)})


def test_a_head_that_is_no_longer_tied_is_not_lost(tmp_path):
    """Q12: a head given weights of its own keeps them, or is refused; it is not tied again in silence."""
    model, ids = gpt(), tokens(1, 4)
    model.lm_head.weight = torch.nn.Parameter(model.wte.weight.detach() * 0.5)
    save(model, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")(ids), model(ids))


def test_cache_checks_its_size():
    with pytest.raises(ValueError, match="33.*32"):
        Cache(GPTConfig(**SMALL), 1, 33)
