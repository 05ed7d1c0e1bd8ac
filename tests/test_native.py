"""checkpoints/native.py, beside the round trips of test_model.py and test_compress.py: what is not written or read."""
import pytest
import torch

import recover
from checkpoints import load, save
from compress import compress, rtn
from engine.safetensors import write_safetensors
from kernels import PackedLinear, pack
from model import GPT, GPTConfig


def gpt():
    return GPT(GPTConfig(vocab_size=40, context=16, n_layer=2, n_head=2, n_embd=32, bias=True)).init_weights(
        torch.Generator().manual_seed(0)).requires_grad_(False)


def packed():
    model = gpt()
    layer = model.blocks[1].attn.q
    model.blocks[1].attn.q = PackedLinear(pack(rtn(layer.weight, 3, group_size=16)), layer.bias)
    return model


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("make, layer, said", [
    (packed, "blocks.1.attn.q", "blocks.1.attn.q: not the specification"),  # a packed layer's bias
    (gpt, "blocks.0.mlp.up", "blocks.0.mlp.up.* is of torch.complex64, which is not written")])
def test_a_model_that_would_not_load_is_not_written(make, layer, said, tmp_path):
    model = make()
    model.get_submodule(layer).to(torch.complex64)
    with pytest.raises(ValueError, match=said):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("add", [lambda model: recover.add_lora(model, 2), recover.add_biases])
def test_repairs_beside_the_layers_are_no_part_of_a_checkpoint(add, tmp_path):
    model = packed()
    add(model)
    with pytest.raises(ValueError, match="LoRA or biases beside its layers"):
        save(model, tmp_path / "m")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["wte.weight", "blocks.1.attn.q.bias", "blocks.0.mlp.down.weight"])
def test_weights_that_are_no_numbers_are_named(name, value, tmp_path):
    for model in (gpt(), packed()):
        model.state_dict()[name].view(-1)[3] = value
        save(model, tmp_path / "m")
        with pytest.raises(ValueError, match=f"m: {name} has weights that are not finite"):
            load(tmp_path / "m")


def test_tensors_without_a_name_in_the_format_are_refused_before_they_are_written(tmp_path):
    for dtype in (torch.complex64, torch.float8_e4m3fn, torch.uint16):
        with pytest.raises(ValueError, match=f"tensor a is of {dtype}, which is not written"):
            write_safetensors(tmp_path / "m", {"a": torch.zeros(2, dtype=dtype)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method, settings", [
    ("magnitude", {"sparsity": 0.5}), ("sparsegpt", {"sparsity": 0.5}), ("wanda", {"n_m": (2, 4)}),
    ("rtn", {"bits": 3}), ("gptq", {"bits": 4, "refit": True}), ("sparsegpt", {"n_m": (2, 4), "bits": 4})])
def test_a_half_precision_checkpoint_through_its_whole_life(dtype, method, settings, tmp_path):
    """Saved, loaded, compressed, smaller, loaded, repaired, merged, cast, saved, loaded: of its type all the way, its
    zeros kept, and nothing of it shared with the model that it came from."""
    model = GPT(GPTConfig(vocab_size=40, context=16, n_layer=1, n_embd=128, bias=True))
    model.init_weights(torch.Generator().manual_seed(0)).requires_grad_(False).to(dtype)
    ids = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(1))
    save(model, tmp_path / "dense")
    dense = load(tmp_path / "dense")
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    small, _ = compress(dense, ids, method, **settings)
    save(small, tmp_path / "small")
    assert (tmp_path / "small").stat().st_size < 0.7 * (tmp_path / "dense").stat().st_size
    small = load(tmp_path / "small")
    assert small.wte.weight.dtype == dtype == small(ids).dtype
    packed = any(isinstance(m, PackedLinear) for m in small.modules())
    zeros = {name: small.get_submodule(name).weight == 0 for name in small.pruned}
    assert packed != bool(zeros)
    recover.add_lora(small, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for layer in recover.wrapped(small, recover.LoRALinear).values():
            layer.B.normal_(0, 0.1)
    repaired = small(ids)
    assert repaired.dtype == dtype and not torch.equal(repaired, dense(ids))
    if packed:
        with pytest.raises(ValueError, match="few bits or without its zeros"):
            recover.merge_lora(small)
        recover.remove_lora(small)
    else:
        recover.merge_lora(small, keep_zeros=True)
        assert all((small.get_submodule(name).weight[gone] == 0).all() for name, gone in zeros.items())
    assert {p.dtype for p in small.parameters()} == {dtype} and small(ids).dtype == dtype
    for cast in (torch.float32, torch.bfloat16, torch.float16):
        save(small.to(cast), tmp_path / "cast")
        back = load(tmp_path / "cast")
        assert back.wte.weight.dtype == cast and torch.equal(back(ids), small(ids)) and back.pruned == small.pruned
    assert dense.wte.weight.dtype == dtype
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
