"""adapters.py against files and logits that PEFT wrote (golden/make_adapters.py), and round trips."""
import copy
import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
import torch

from checkpoints import adapters
import recover
from checkpoints.adapters import fingerprint, load_adapter, save_adapter
from compress import magnitude, rtn
from idp import PromptPool
from kernels import PackedLinear, pack
from checkpoints import load, save
from engine.safetensors import read_safetensors, write_safetensors
from model import GPT, GPTConfig
from checkpoints.weights import load_pretrained

GOLDEN = pathlib.Path(__file__).parent / "golden" / "adapters"
PEFT = ["llama-lora", "llama-lora-partly", "llama-prompt", "llama-prefix", "llama-gains", "opt-lora", "opt-prompt",
        "opt-prefix"]
FAMILIES = {
    "ours": dict(),
    "gpt2": dict(position="learned", norm="layernorm", bias=True),
    "opt": dict(position="learned", position_offset=2, norm="layernorm", activation="relu", bias=True),
    "llama": dict(n_kv_head=2, activation="swiglu", tied=False),
}


def gpt(name="ours", seed=0, **more):
    config = GPTConfig(**{**dict(vocab_size=40, context=32, n_layer=2, n_head=4, n_embd=32, **FAMILIES[name]), **more})
    return GPT(config).init_weights(torch.Generator().manual_seed(seed)).requires_grad_(False)


def packed(model, bits=3):
    for block in model.blocks:
        for parent in (block.attn, block.mlp):
            for name, child in list(parent.named_children()):
                setattr(parent, name, PackedLinear(pack(rtn(child.weight, bits, group_size=16)), child.bias))
    return model


def zeros(model):
    for p in model.parameters():
        p.zero_()
    return model


def with_lora(model, rank=2, alpha=3, targets=recover.LINEARS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in recover.add_lora(model, rank, alpha, targets, generator):
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def some_repair(kind, c, seed=2):
    """A random repair of each kind but LoRA."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"prompt": [(3, c.n_embd)], "prefix": [(c.n_layer, 2, c.n_kv_head, 3, c.head_size)],
              "idp": [(2, c.n_embd), (4, c.n_embd), (1, c.n_embd)]}[kind]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    if kind == "idp":
        return PromptPool(tensors)
    return {"prompt": recover.SoftPrompt, "prefix": recover.Prefix}[kind](tensors[0])


IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, kind, repair, ids=IDS):
    if kind == "prefix":
        return model(ids, cache=repair.cache(model, *ids.shape))
    return model(ids, prompt=repair() if kind == "prompt" else None)


# ---- PEFT

@pytest.mark.parametrize("name", PEFT)
def test_what_peft_saved_computes_what_peft_computed(name):
    golden = np.load(GOLDEN / "logits.npz")
    model, _ = load_pretrained(GOLDEN / name.partition("-")[0])
    ids = torch.from_numpy(golden["ids"])
    plain = logits(model, "none", None, ids)
    kind, repair = load_adapter(GOLDEN / name, model)
    assert kind == name.split("-")[1]
    ours = logits(model, kind, repair, ids)
    assert (ours - torch.from_numpy(golden[name])).abs().max() < 1e-5
    assert (ours - plain).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("name", PEFT)
def test_written_again_it_is_what_peft_wrote(name, tmp_path):
    model, _ = load_pretrained(GOLDEN / name.partition("-")[0])
    kind, repair = load_adapter(GOLDEN / name, model)
    if kind == "gains":
        repair, model = dict(zip(adapters.norm_names(model), repair)), load_pretrained(GOLDEN / "llama")[0]
    save_adapter(tmp_path, model, kind, repair, base_name=name.partition("-")[0])
    (theirs, _), (ours, metadata) = (read_safetensors(f / adapters.WEIGHTS) for f in (GOLDEN / name, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert metadata["format"] == "pt" and metadata["base_fingerprint"] == fingerprint(model)
    theirs, ours = (json.loads((f / adapters.CONFIG).read_text()) for f in (GOLDEN / name, tmp_path))
    assert ours.keys() <= theirs.keys()  # no key that PEFT would not know
    if name == "llama-lora-partly":  # the same scale as alpha / r; names in full: short ones mean both layers
        assert ours.pop("lora_alpha") == pytest.approx(theirs["lora_alpha"] * 3 ** 0.5)
        assert theirs["use_rslora"] and not ours.pop("use_rslora")
        assert ours.pop("target_modules") == ["model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.o_proj"]
    targets = set(theirs.pop("target_modules", []))
    assert set(ours.pop("target_modules", targets)) == targets
    assert ours == {key: theirs[key] for key in ours}


def test_pefts_other_lora_is_refused_by_name(tmp_path):
    for field, value in (("use_dora", True), ("alpha_pattern", {"q_proj": 3}), ("rank_pattern", {"q_proj": 3}),
                         ("modules_to_save", ["lm_head"]), ("layer_replication", [[0, 1]]), ("use_rslora", "yes"),
                         ("alora_invocation_tokens", [1]), ("r", 3), ("r", 0), ("r", "2"), ("lora_alpha", None),
                         ("lora_alpha", float("nan")), ("lora_alpha", -1), ("peft_type", "IA3"), ("peft_type", None),
                         ("task_type", "SEQ_CLS"), ("bias", "lora_only"), ("lora_bias", True), ("use_qalora", True),
                         ("trainable_token_indices", [3]), ("target_parameters", ["mlp.experts"]),
                         ("loftq_config", {"loftq_bits": 4}), ("corda_config", {"cache_file": "x"}),
                         ("monteclora_config", {"n": 2}), ("kasa_config", {}), ("use_bdlora", True),
                         ("arrow_config", {"top_k": 2}), ("something_new", 1), ("init_lora_weights", "pissa"),
                         ("init_lora_weights", "pissa_niter_16"), ("init_lora_weights", "olora"),
                         ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"), ("init_lora_weights", "new"),
                         ("init_lora_weights", "lora_ga")):
        folder = edited(tmp_path / "lora", "llama-lora", **{field: value})
        model, _ = load_pretrained(GOLDEN / "llama")
        said = "lora_A.weight must" if (field, value) == ("r", 3) else "adapter_config.json.*" + field
        with pytest.raises(ValueError, match=said):
            load_adapter(folder, model)
        assert not recover.wrapped(model, recover.LoRALinear)
    for kind in ("prompt", "prefix"):
        for field, value in (("modules_to_save", ["lm_head"]), ("something_new", 1), ("num_transformer_submodules", 2)):
            with pytest.raises(ValueError, match="adapter_config.json.*" + field):
                load_adapter(edited(tmp_path / kind, "llama-" + kind, **{field: value}), model)


def test_settings_that_change_nothing_are_passed_over(tmp_path):
    golden = np.load(GOLDEN / "logits.npz")
    for field, value in (("init_lora_weights", False), ("init_lora_weights", "gaussian"), ("init_lora_weights", "eva"),
                         ("init_lora_weights", "orthogonal"), ("init_lora_weights", None), ("lora_dropout", 0.3),
                         ("peft_version", "9"), ("something_new", None), ("eva_config", {"rho": 2.0}),
                         ("layers_to_transform", [0, 1]), ("base_model_name_or_path", "elsewhere")):
        model, _ = load_pretrained(GOLDEN / "llama")
        load_adapter(edited(tmp_path / "lora", "llama-lora", **{field: value}), model)
        ours = logits(model, "lora", None, torch.from_numpy(golden["ids"]))
        assert (ours - torch.from_numpy(golden["llama-lora"])).abs().max() < 1e-5


# ---- round trips

@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lora_round_trip_is_exact(name, form, tmp_path):
    make = (lambda: packed(gpt(name))) if form == "packed" else lambda: gpt(name)
    model = with_lora(make())
    save_adapter(tmp_path, model, "lora")
    again = make()
    kind, parameters = load_adapter(tmp_path, again)
    assert kind == "lora" and torch.equal(logits(again, kind, None), logits(model, kind, None))
    expected = [p for layer in recover.wrapped(model, recover.LoRALinear).values() for p in (layer.A, layer.B)]
    assert len(parameters) == len(expected) and {id(p) for p in parameters} <= {id(p) for p in again.parameters()}
    assert all(p.requires_grad for p in parameters)
    recover.remove_lora(again)
    assert torch.equal(logits(again, "none", None), logits(make(), "none", None))


def test_small_gpt_goes_by_llamas_names(tmp_path):
    save_adapter(tmp_path, with_lora(gpt(), targets=("q", "down")), "lora")
    names = read_safetensors(tmp_path / adapters.WEIGHTS)[0].keys()
    assert names == {f"base_model.model.model.layers.{i}.{layer}.lora_{part}.weight" for i in (0, 1) for part in "AB"
                     for layer in ("self_attn.q_proj", "mlp.down_proj")}


@pytest.mark.parametrize("rank, alpha", [(2, 2), (3, 1), (49, 1), (8, 0.5)])
def test_alpha_survives_its_division_by_the_rank(rank, alpha, tmp_path):
    save_adapter(tmp_path, with_lora(gpt(), rank, alpha), "lora")
    config = json.loads((tmp_path / adapters.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, alpha) and type(config["lora_alpha"]) is type(alpha)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "idp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_round_trip_is_exact(name, kind, tmp_path):
    model = gpt(name)
    repair = some_repair(kind, model.config)
    plain = [p.detach() for p in repair.parameters()]
    for given in (repair, plain if kind == "idp" else plain[0]):
        save_adapter(tmp_path, model, kind, given)
        found, again = load_adapter(tmp_path, gpt(name))
        assert found == kind and type(again) is type(repair)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain, strict=True))
    assert sorted(os.listdir(tmp_path)) == [adapters.CONFIG, adapters.WEIGHTS]


def test_loaded_lora_does_not_lie_in_the_file(tmp_path):
    save_adapter(tmp_path, with_lora(gpt()), "lora")
    model = gpt()
    load_adapter(tmp_path, model)
    with open(tmp_path / adapters.WEIGHTS, "r+b") as f:  # a mapped tensor would change with its file, or die with it
        f.write(bytes(os.path.getsize(tmp_path / adapters.WEIGHTS)))
    assert torch.equal(logits(model, "lora", None), logits(with_lora(gpt()), "lora", None))


# ---- how the study keeps its repairs: lists of tensors

def draws(*shapes, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("form", ["dense", "packed", "pruned", "half"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_repair_the_study_trains_comes_back_as_its_list_of_tensors(name, form, tmp_path):
    """The order is that of recover.add_lora, asked of recover itself; every list, form of base and dtype is exact."""
    base = gpt(name)
    base = {"dense": lambda: base, "packed": lambda: packed(base), "half": base.bfloat16,
            "pruned": lambda: prune(base)}[form]()
    c, before = base.config, fingerprint(base)
    repairs = [("prompt", draws((3, c.n_embd)), {}), ("prefix", draws((c.n_layer, 2, c.n_kv_head, 3, c.head_size)), {}),
               ("idp", draws((2, c.n_embd), (4, c.n_embd)), {}),
               ("idp", draws((2, c.n_embd), (2, c.n_embd), (2, c.n_embd)), {"probe": True}),
               ("bias", draws(*[(c.n_embd,)] * (2 * c.n_layer)), {"targets": ("o", "down")})]
    if form == "half":
        repairs[1][1][0] = repairs[1][1][0].bfloat16()  # a prefix is read as the cache is
    for rank, targets in ((1, ("o",)), (3, ("q", "v")), (2, recover.LINEARS)):
        wrapped = copy.deepcopy(base)
        lora = [p.detach() for p in recover.add_lora(wrapped, rank, targets=targets)]
        lora[1::2] = draws(*[B.shape for B in lora[1::2]])
        repairs.append(("lora", lora, {"targets": targets}))
        adapters.save_tensors(tmp_path / "lora", base, "lora", lora, targets)
        for p, value in zip(recover.wrapped(wrapped, recover.LoRALinear).values(), zip(lora[::2], lora[1::2])):
            p.A.data, p.B.data = value
        again = copy.deepcopy(base)
        load_adapter(tmp_path / "lora", again)
        assert torch.equal(logits(again, "lora", None), logits(wrapped, "lora", None))
    for i, (kind, tensors, more) in enumerate(repairs):
        adapters.save_tensors(tmp_path / str(i), base, kind, tensors, **more)
        again = adapters.load_tensors(tmp_path / str(i), base, kind)
        assert len(again) == len(tensors) and all(torch.equal(a, b) for a, b in zip(again, tensors)), kind
        assert [t.dtype for t in again] == [t.dtype for t in tensors]
    assert fingerprint(base) == before and not recover.wrapped(base, recover.LoRALinear)


def prune(model):
    for block in model.blocks:
        block.attn.q.weight.mul_(magnitude(block.attn.q.weight, 0.5))
    return model


def test_a_scaled_lora_as_a_list_is_that_of_scale_one(tmp_path):
    model = with_lora(gpt(), rank=2, alpha=3)
    save_adapter(tmp_path, model, "lora")
    recover.remove_lora(model)
    again = copy.deepcopy(model)
    for p, value in zip(recover.add_lora(again, 2), adapters.load_tensors(tmp_path, model, "lora")):
        p.data = value
    torch.testing.assert_close(logits(again, "lora", None), logits(with_lora(gpt()), "lora", None))


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_stand_beside_their_layers_by_name(name, tmp_path):
    model = gpt(name)
    before = fingerprint(model)
    for shift in recover.add_biases(model, ("o", "down")):
        shift.data.copy_(torch.randn(shift.shape, generator=torch.Generator().manual_seed(6)))
    save_adapter(tmp_path, model, "bias")
    tensors, metadata = read_safetensors(tmp_path / adapters.WEIGHTS)
    prefix, *layers = {"gpt2": ("blocks.{}.", "attn.o", "mlp.down"),
                       "opt": ("model.decoder.layers.{}.", "self_attn.out_proj", "fc2")}.get(
                           name, ("model.layers.{}.", "self_attn.o_proj", "mlp.down_proj"))
    assert tensors.keys() == {f"base_model.model.{prefix.format(i)}{layer}.bias" for i in (0, 1) for layer in layers}
    assert metadata["base_fingerprint"] == before == fingerprint(model)
    again = gpt(name)
    kind, parameters = load_adapter(tmp_path, again)
    assert kind == "bias" and len(parameters) == 4 and all(p.requires_grad for p in parameters)
    assert torch.equal(logits(again, kind, None), logits(model, kind, None))
    assert not torch.equal(logits(again, kind, None), logits(gpt(name), kind, None))


@pytest.mark.parametrize("name", FAMILIES)
def test_gains_replace_the_norms_own(name, tmp_path):
    model = gpt(name)
    gains = recover.own_gains(model)
    for i, gain in enumerate(gains):
        gain.data += torch.randn(gain.shape, generator=torch.Generator().manual_seed(i))
    adapters.save_tensors(tmp_path, gpt(name), "gains", gains)
    again = gpt(name)
    assert all(torch.equal(a, b) for a, b in zip(adapters.load_tensors(tmp_path, again, "gains"), gains, strict=True))
    assert torch.equal(logits(again, "none", None), logits(gpt(name), "none", None))
    kind, parameters = load_adapter(tmp_path, again)
    assert kind == "gains" and len(parameters) == 5
    assert torch.equal(logits(again, "none", None), logits(model, "none", None))


def test_a_list_that_does_not_fit_is_refused(tmp_path):
    model = gpt()
    for kind, tensors, more, said in (
            ("lora", draws((2, 32)), {}, "1 tensors for 12 layers"),
            ("lora", draws((2, 32), (32, 2)) * 2, {"targets": ("down",)}, r"A \(2, 32\) .* must be \(2, 128\)"),
            ("lora", draws((2, 32), (32, 2), (3, 32), (32, 3)), {"targets": ("q",)},
             r"A \(3, 32\) .* must be \(2, 32\)"),
            ("bias", draws((32,)), {"targets": ("o", "down")}, "1 tensors for 4 layers named o or down"),
            ("bias", draws((31,), (32,)), {"targets": ("o",)}, r"bias \(31,\) for 32 outputs"),
            ("bias", [], {"targets": ("nothing",)}, "bias: none of this model's blocks.0.attn.q"),
            ("gains", draws((32,)), {}, "1 tensors for 5 layers"), ("gains", draws(*[(31,)] * 5), {}, r"gains \(31,\)"),
            ("idp", draws((2, 32), (1, 32), (3, 32)), {"probe": True},
             r"probe has shape \(3, 32\), 2 prompts .*\(2, 32\)")):
        with pytest.raises(ValueError, match=said):
            adapters.save_tensors(tmp_path / "folder", model, kind, tensors, **more)
        assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match=r"gains: .'blocks.0.attn.q'. of this model's blocks.0.norm1"):
        save_adapter(tmp_path / "folder", model, "gains", {"blocks.0.attn.q": torch.zeros(32)})
    with pytest.raises(ValueError, match="bias: none of this"):
        save_adapter(tmp_path / "folder", model, "bias")
    adapters.save_tensors(tmp_path, model, "prompt", draws((3, 32)))
    with pytest.raises(ValueError, match="a repair of kind prompt, not lora"):
        adapters.load_tensors(tmp_path, model, "lora")
    adapters.save_tensors(tmp_path, model, "bias", draws((32,), (32,)), ("o",))
    for base in (gpt("opt"), gpt(seed=1)):
        with pytest.raises(ValueError, match="made for the base"):
            adapters.load_tensors(tmp_path, base, "bias")


# ---- the base

def test_fingerprint_knows_a_base_with_and_without_lora_and_from_its_checkpoint(tmp_path):
    for model in (gpt(), packed(gpt()), gpt("llama"), packed(gpt("opt"))):
        before = fingerprint(model)
        assert fingerprint(with_lora(model)) == before
        recover.remove_lora(model)
        save(model, tmp_path / "base.safetensors")
        assert fingerprint(model) == before == fingerprint(load(tmp_path / "base.safetensors"))


def test_fingerprint_of_a_pruned_base_does_not_depend_on_the_sign_of_zero(tmp_path):
    model = gpt()
    weight = model.blocks[0].attn.q.weight
    weight.mul_(magnitude(weight, 0.5))  # a negative number times 0 is -0
    model.pruned = frozenset(["blocks.0.attn.q"])  # so that its zeros are stored as one bit each, without a sign
    save(model, tmp_path / "base.safetensors")
    back = load(tmp_path / "base.safetensors")
    minus = [bool(((w == 0) & w.signbit()).any()) for w in (weight, back.blocks[0].attn.q.weight)]
    assert minus == [True, False] and fingerprint(model) == fingerprint(back)


def test_fingerprint_tells_bases_apart():
    big = dict(vocab_size=40, n_embd=512, n_layer=1, n_head=4)  # matrices large enough to be sampled
    bases = [gpt(), gpt(seed=1), gpt(n_head=2), gpt(context=31), gpt("llama"), gpt().bfloat16(), packed(gpt()),
             packed(gpt(), 4), gpt(**big)]
    bases += [zeros(gpt().half()), zeros(gpt().bfloat16())]  # the same bytes
    changed = gpt()
    changed.blocks[1].mlp.down.weight[5, 7] += 1e-6
    pruned = gpt(**big)
    pruned.blocks[0].mlp.up.weight.mul_(magnitude(pruned.blocks[0].mlp.up.weight, 0.01))
    assert len({fingerprint(model) for model in bases + [changed, pruned]}) == len(bases) + 2


@pytest.mark.parametrize("size", [192, 256, 768])
def test_fingerprint_reads_every_column(size):
    model = gpt(n_embd=size, n_layer=1)
    before = fingerprint(model)
    for column in range(0, size, 37):
        weight = model.blocks[0].mlp.up.weight
        weight[:, column] += 1
        assert fingerprint(model) != before
        before = fingerprint(model)


def test_fingerprint_of_a_hundred_million_weights_takes_well_under_a_second():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=30000, n_layer=12, n_head=12, n_embd=768))
    model = model.to_empty(device="cpu")
    model.tie()
    assert model.n_parameters() > 1e8
    began = time.process_time()
    fingerprint(model)
    assert time.process_time() - began < 0.5


def test_another_base_is_refused_and_both_are_named(tmp_path):
    save_adapter(tmp_path, with_lora(gpt()), "lora")
    for other in (gpt(seed=1), packed(gpt()), gpt("llama")):
        before = logits(other, "none", None)
        with pytest.raises(ValueError) as error:
            load_adapter(tmp_path, other)
        for name in (fingerprint(gpt())[:12], fingerprint(other)[:12], "0 packed", adapters.describe(other)):
            assert name in str(error.value)
        assert torch.equal(logits(other, "none", None), before)


def test_without_a_fingerprint_names_and_shapes_must_do(tmp_path):
    load_adapter(GOLDEN / "llama-prompt", gpt(n_embd=16, seed=5))
    for base, name, said in ((gpt(n_embd=32), "llama-lora", r"lora_A.weight must have shape \(2, 32\), has \(2, 16\)"),
                             (gpt("opt", n_embd=16), "llama-lora", "no layer of this model.*mlp.down_proj"),
                             (gpt("llama", n_embd=16, n_hidden=24, n_layer=1), "llama-lora",
                              "no layer of this model.*layers.1"),
                             (gpt(n_embd=16, n_kv_head=2), "llama-lora-partly", "no layer of this model.*gate_proj"),
                             (gpt(n_embd=32), "llama-prompt", r"\(3, 16\), this model takes \(P, 32\)"),
                             (gpt(n_embd=16), "llama-prefix", r"\(3, 32\), this model takes \(P, 64\)"),
                             (gpt(n_embd=16, context=3), "llama-prompt", "from 1 to 2")):
        with pytest.raises(ValueError, match=said):
            load_adapter(GOLDEN / name, base)
        assert not recover.wrapped(base, recover.LoRALinear)


# ---- what cannot be saved

def test_what_has_no_place_in_the_layout_is_refused(tmp_path):
    uneven = with_lora(gpt())
    uneven.blocks[0].attn.q.scale = 9.0
    for model, kind, repair, said in (
            (gpt(), "lora", None, r"one rank and one scale.*\[\] and \[\]"),
            (uneven, "lora", None, r"one rank and one scale.*\[2\] and \[1.5, 9.0\]"),
            (gpt(), "ia3", None, "kind must be one of"),
            (gpt(), "prompt", torch.zeros(3, 31), r"\(3, 31\), this model takes \(P, 32\)"),
            (gpt(), "prompt", torch.zeros(0, 32), "from 1 to 31"),
            (gpt(), "prompt", torch.zeros(32, 32), "from 1 to 31"),
            (gpt(), "prefix", torch.zeros(3, 2, 4, 5, 8), r"\(5, 192\)"), (gpt(), "idp", [], "got none")):
        with pytest.raises(ValueError, match=said):
            save_adapter(tmp_path / "folder", model, kind, repair)
        assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match="has LoRA or biases already"):
        load_adapter(GOLDEN / "llama-lora", with_lora(load_pretrained(GOLDEN / "llama")[0]))


def test_an_interrupted_save_leaves_a_whole_adapter_or_none(tmp_path, monkeypatch):
    model, replace = gpt(), os.replace
    save_adapter(tmp_path, model, "prompt", torch.ones(3, 32))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(*_, **__):
        raise OSError("no space left on device")
    for where, what in ((adapters, "dump"), (json, "dump")):
        with monkeypatch.context() as m, pytest.raises(OSError, match="no space"):
            m.setattr(where, what, full)
            save_adapter(tmp_path, model, "prompt", torch.zeros(4, 32))
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before

    def stopped(source, target):
        if str(target).endswith(adapters.CONFIG):
            raise OSError("stopped")
        replace(source, target)
    with monkeypatch.context() as m, pytest.raises(OSError, match="stopped"):
        m.setattr(os, "replace", stopped)
        save_adapter(tmp_path, model, "prompt", torch.zeros(3, 32))  # new weights, and the old config would fit
    with pytest.raises(FileNotFoundError, match=adapters.CONFIG):
        load_adapter(tmp_path, model)
    assert os.listdir(tmp_path) == [adapters.WEIGHTS]


# ---- damaged files

def edited(folder, name, tensors=None, **fields):
    """A copy of a golden adapter with other settings (None: without it) or other tensors."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / adapters.CONFIG).read_text()) | fields
    (folder / adapters.CONFIG).write_text(json.dumps(config))
    if tensors is not None:
        write_safetensors(folder / adapters.WEIGHTS, tensors)
    return folder


def test_damaged_tensors_are_named(tmp_path):
    good = {name: t.clone() for name, t in read_safetensors(GOLDEN / "llama-lora" / adapters.WEIGHTS)[0].items()}
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    without = {key: t for key, t in good.items() if key != name}
    p, q = torch.zeros(3, 16), torch.zeros(3, 32)
    for adapter, tensors, said in (
            ("llama-lora", without, name + ".*missing"),
            ("llama-lora", good | {name: good[name][:-1]}, name + ".*must have shape"),
            ("llama-lora", good | {name: good[name].int()}, name), ("llama-lora", good | {name: good[name] / 0}, name),
            ("llama-lora", good | {name[:-7] + ".bias": good[name]}, "lora_B.bias"), ("llama-lora", {}, "no tensors"),
            ("llama-prompt", {}, "must be prompt_embeddings, got none"), ("llama-prompt", {"prompt": p}, "got prompt"),
            ("llama-prompt", {"prompt_embeddings": p, "more": p}, "got .*more"),
            ("llama-prompt", {"prompt_embeddings": p[:2]}, r"num_virtual_tokens is 3, the tensors have \[2\]"),
            ("llama-prefix", {"prompt_embeddings": q[:, :16]}, "prompt_embeddings"),
            ("llama-prefix", {"prompt_embeddings": q[:2]}, "num_virtual_tokens")):
        with pytest.raises(ValueError, match=said) as error:
            load_adapter(edited(tmp_path / "folder", adapter, tensors), load_pretrained(GOLDEN / "llama")[0])
        assert adapters.WEIGHTS in str(error.value) or adapters.CONFIG in str(error.value)


def test_prompts_of_an_encoder_and_a_decoder_are_refused(tmp_path):
    folder = edited(tmp_path / "folder", "llama-prompt", num_transformer_submodules=2)
    with pytest.raises(ValueError, match="num_transformer_submodules=2"):
        load_adapter(folder, load_pretrained(GOLDEN / "llama")[0])


def test_damaged_pools_are_named(tmp_path):
    model = gpt()
    save_adapter(tmp_path, model, "idp", some_repair("idp", model.config))
    tensors, metadata = read_safetensors(tmp_path / adapters.WEIGHTS)
    tensors = {name: t.clone() for name, t in tensors.items()}
    write_safetensors(tmp_path / adapters.WEIGHTS, dict(reversed(tensors.items())), metadata)
    assert [len(p) for p in load_adapter(tmp_path, model)[1].prompts] == [2, 4, 1]  # by name
    without, one_more = {k: t for k, t in tensors.items() if k[-1] != "1"}, {"prompt_embeddings.3": torch.zeros(1, 32)}
    for damaged, said in ((without, "must be prompt_embeddings.0, prompt_embeddings.1,"), ({}, "none"),
                          (tensors | one_more, "num_virtual_tokens is .2, 4, 1.")):
        write_safetensors(tmp_path / adapters.WEIGHTS, damaged, metadata)
        with pytest.raises(ValueError, match=said):
            load_adapter(tmp_path, model)


def test_any_truncation_is_a_clear_error(tmp_path):
    model, _ = load_pretrained(GOLDEN / "llama")
    for file in (adapters.CONFIG, adapters.WEIGHTS):
        whole = (GOLDEN / "llama-prompt" / file).read_bytes()
        for n in range(0, len(whole.rstrip()), 7):
            folder = edited(tmp_path / "cut", "llama-prompt")
            (folder / file).write_bytes(whole[:n])
            with pytest.raises(ValueError, match=file):
                load_adapter(folder, model)
    os.remove(folder / adapters.WEIGHTS)
    with pytest.raises(FileNotFoundError, match=adapters.WEIGHTS):
        load_adapter(folder, model)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="pickle"):
        load_adapter(folder, model)
