"""checkpoints/weights.py: Hugging Face folders against transformers' logits, what it cannot compute, hostile files."""
import copy
import json
import pathlib
import random
import struct
import subprocess
import sys

import pytest
import torch

from checkpoint_files import (ARRAYS, GOLDEN, HERE, check_against, golden_tensors, gguf_bytes, peak, refusal, tiny_gguf,
                              write_folder)
from checkpoints import load_pretrained, read_model, save
from checkpoints.vocabulary import save_ranks
from engine.safetensors import write_safetensors
from golden.make_weights import fill, texts
from model import GPT, GPTConfig

SMOLLM2 = HERE.parent / "out" / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="no SmolLM2: sh tests/get_smollm2.sh gets it (98 MB)")
MODELS = sorted(GOLDEN["models"])


# ---- the models

@pytest.mark.parametrize("name", MODELS)
def test_logits_cached_decode_and_greedy_text_equal_transformers(tmp_path, name):
    golden = GOLDEN["models"][name]
    model, encoding = load_pretrained(write_folder(tmp_path / name, name))
    assert encoding is None
    check_against(model, golden, ARRAYS[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_asked_for_is_the_rounded_float32(tmp_path, dtype):
    folder = write_folder(tmp_path / "m", "gpt2")
    full, half = load_pretrained(folder)[0], load_pretrained(folder, dtype=dtype)[0]
    for (name, a), b in zip(full.state_dict().items(), half.state_dict().values()):
        assert b.dtype == dtype and b.is_contiguous() and torch.equal(a.to(dtype), b), name
    assert half.lm_head.weight is half.wte.weight
    with pytest.raises(ValueError, match="int8"):
        load_pretrained(folder, dtype=torch.int8)


@pytest.mark.parametrize("stored, norms, own", [
    (torch.bfloat16, torch.float32, torch.bfloat16), (torch.float16, torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float32)])
def test_a_checkpoints_own_dtype_is_that_of_its_matrices(tmp_path, stored, norms, own):
    """As 16-bit files are written: norms and biases often stay in float32. One float32 matrix makes it float32."""
    tensors = {k: t.to(stored if t.dim() == 2 else norms) for k, t in golden_tensors("llama").items()}
    folder = write_folder(tmp_path / "m", "llama", tensors)
    model = load_pretrained(folder, dtype=None)[0]
    assert {p.dtype for p in model.parameters()} == {own}
    name = next(k for k, t in tensors.items() if t.dim() == 2 and "mlp" in k)
    write_folder(folder, "llama", {**tensors, name: tensors[name].float()})
    assert load_pretrained(folder, dtype=None)[0].wte.weight.dtype == torch.float32
    assert load_pretrained(folder)[0].wte.weight.dtype == torch.float32


def test_shards_old_names_and_old_settings_load_the_same(tmp_path):
    whole = load_pretrained(write_folder(tmp_path / "whole", "llama-scaled-gqa"))[0]
    config = copy.deepcopy(GOLDEN["models"]["llama-scaled-gqa"]["config"])
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), rope  # as before transformers 5
    tensors = golden_tensors("llama-scaled-gqa")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)     # as in the first Llama files
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = {"model-00001-of-00002.safetensors": list(tensors)[::2],
             "model-00002-of-00002.safetensors": list(tensors)[1::2]}
    for file, names in files.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = load_pretrained(folder)[0]
    assert sharded.config == whole.config
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), sharded.state_dict().values()))

    # the first GPT-2 file has no prefix, but its causal masks; others have the tied head once more
    first = {k.removeprefix("transformer."): t for k, t in golden_tensors("gpt2").items()}
    first.update({f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)})
    first["lm_head.weight"] = first["wte.weight"]
    model = load_pretrained(write_folder(tmp_path / "gpt2", "gpt2", first))[0]
    check_against(model, GOLDEN["models"]["gpt2"], ARRAYS["gpt2"])


def test_a_header_of_odd_length_is_read_too(tmp_path):
    """The original GPT-2 file's tensors do not start at a multiple of four bytes."""
    folder = write_folder(tmp_path / "m", "gpt2")
    raw = (folder / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    (folder / "model.safetensors").write_bytes((n + 3).to_bytes(8, "little") + raw[8:8 + n] + b"   " + raw[8 + n:])
    model = load_pretrained(folder)[0]
    check_against(model, GOLDEN["models"]["gpt2"], ARRAYS["gpt2"])


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_stays_below_the_model_and_a_fifth(tmp_path):
    """In a process of its own, behind a first load that brings torch's lazily imported modules into memory."""
    config = {**GOLDEN["models"]["llama"]["config"], "hidden_size": 512, "intermediate_size": 16000,
              "num_hidden_layers": 1, "head_dim": 128}  # three tensors are nearly all of it: one twice would show
    theirs = {"model.embed_tokens.weight": (90, 512), "lm_head.weight": (90, 512), "model.norm.weight": (512,)}
    block = "model.layers.0."
    theirs.update({f"{block}{name}.weight": (512,) for name in ("input_layernorm", "post_attention_layernorm")})
    theirs.update({f"{block}self_attn.{name}_proj.weight": (512, 512) for name in "qkvo"})
    theirs.update({f"{block}mlp.{name}_proj.weight": (16000, 512) for name in ("gate", "up")})
    theirs[f"{block}mlp.down_proj.weight"] = (512, 16000)
    big, small = tmp_path / "big", write_folder(tmp_path / "small", "llama")
    big.mkdir()
    (big / "config.json").write_text(json.dumps(config))
    write_safetensors(big / "model.safetensors", {k: torch.ones(shape) for k, shape in theirs.items()})
    script = ("import pathlib, re, sys, torch\nfrom checkpoints import weights\n"
              "torch.set_num_threads(1)\n"
              "def peak():\n"  # of this process alone: ru_maxrss begins at its parent's
              "    status = pathlib.Path('/proc/self/status').read_text()\n"
              "    return 1024 * int(re.search('VmHWM:[^0-9]*([0-9]+)', status)[1])\n"
              "weights.load_pretrained(sys.argv[1])\n"
              "before = peak()\n"
              "model, _ = weights.load_pretrained(sys.argv[2])\n"
              "own = sum(p.numel() * p.element_size() for p in model.parameters())\n"
              "print((peak() - before) / own, own)\n")
    done = subprocess.run([sys.executable, "-c", script, small, big], cwd=HERE.parent, capture_output=True, text=True,
                          check=True)
    ratio, own = map(float, done.stdout.split())
    assert own > 100e6 and 0.8 < ratio < 1.2, done.stdout


# ---- what is refused

@pytest.mark.parametrize("name, changes, says", [
    ("opt", {"do_layer_norm_before": False}, "OPT-350m normalizes behind each half block"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16: OPT-350m"),
    ("opt", {"activation_function": "gelu"}, "activation_function"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse"), ("gpt2", {"n_embd": "32"}, "n_embd"),
    ("gpt2", {"n_layer": None}, "n_layer"),
    ("gpt2", {"n_layer": 10 ** 9}, "n_layer"), ("gpt2", {"n_layer": 10 ** 6}, "layers"),
    ("gpt2", {"n_head": 5}, "n_head"),
    ("gpt2", {"n_head": True}, "n_head"), ("gpt2", {"model_type": "bert"}, "bert"),
    ("gpt2", {"model_type": None}, "model_type"),
    ("gpt2", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
    ("gpt2", {"n_positions": 10 ** 9}, "n_positions"),
    ("llama", {"attention_bias": True}, "missing tensors: layers.0.self_attn.q_proj.bias"),
    ("llama", {"head_dim": 16}, "head_dim"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_head"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
    ("llama", {"num_hidden_layers": 3}, "layers.2.input_layernorm.weight"),
    ("llama", {"num_hidden_layers": 1}, "layers.1.input_layernorm.weight"),
    ("llama", {"vocab_size": 91}, "embed_tokens.weight has shape"),
    ("llama", {"intermediate_size": 47}, "mlp.gate_proj.weight has shape"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradict"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_parameters": {"rope_type": "default", "attention_factor": 2.0}}, "attention_factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"), ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"num_experts": 8}, "num_experts"), ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already"),
    ("gpt2", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized already"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"), ("gpt2", {"add_cross_attention": True}, "cross"),
    ("gpt2", {"unheard_of": 1}, "unheard_of=1 is not known"), ("opt", {"_remove_final_layer_norm": True}, "_final"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"), ("qwen2", {"num_key_value_heads": None}, "num_key_"),
    ("qwen2", {"use_mrope": True}, "use_mrope"), ("mistral", {"sliding_window": 63}, "sliding_window=63"),
    ("mistral", {"sliding_window": "64"}, "sliding_window='64'"), ("mistral", {"attention_bias": True}, "n_bias=True"),
    ("qwen2", {"model_type": "qwen3"}, "qwen3"), ("qwen2", {"model_type": "llama"}, "use_sliding_window"),
])
def test_what_this_gpt_cannot_compute_is_refused_by_name(tmp_path, name, changes, says):
    assert says in refusal(write_folder(tmp_path / "m", name, **changes))


def absent(folder, *names):
    """The folder, its config.json without these settings."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
    return folder


def test_a_mistral_window_as_wide_as_the_context_is_none_and_narrower_by_default(tmp_path):
    folder = write_folder(tmp_path / "m", "mistral", sliding_window=64)
    check_against(load_pretrained(folder)[0], GOLDEN["models"]["mistral"], ARRAYS["mistral"])
    assert load_pretrained(absent(folder, "sliding_window"))[0].config.context == 64  # 4096, the family's default
    write_folder(folder, "mistral", max_position_embeddings=4097)
    assert "sliding_window=4096" in refusal(absent(folder, "sliding_window"))


def test_biases_that_a_family_lacks_are_zero(tmp_path):
    for name, lacks in (("qwen2", {"attn.o", "mlp.gate", "mlp.up", "mlp.down"}), ("llama-mlp-bias", set("qkvo")),
                        ("llama-attention-bias", {"gate", "up", "down"})):
        model = load_pretrained(write_folder(tmp_path / name, name), dtype=torch.bfloat16)[0]
        lacks = {last.rpartition(".")[2] for last in lacks}
        for path, module in model.blocks.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert module.bias.dtype == torch.bfloat16
                assert (not module.bias.any()) == (path.rpartition(".")[2] in lacks), path
    tensors = golden_tensors("qwen2")
    tensors["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(32)  # not a Qwen2
    assert "surplus tensors: layers.1.self_attn.o_proj.bias" in refusal(write_folder(tmp_path / "o", "qwen2", tensors))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama-tied-gqa"])
def test_a_head_of_its_own_counts_although_the_settings_tie_it(tmp_path, name):
    """As in transformers, which compares the two; a head that is the embedding once more stays tied."""
    tensors = golden_tensors(name)
    embedding = next(t for k, t in tensors.items() if k.endswith(("embed_tokens.weight", "wte.weight")))
    for head, tied in ((torch.from_numpy(fill("lm_head.weight", tuple(embedding.shape))), False),
                       (embedding.clone(), True), (embedding.bfloat16(), False)):
        folder = write_folder(tmp_path / name, name, {**tensors, "lm_head.weight": head})
        folder = folder if tied or "llama" in name else absent(folder, "tie_word_embeddings")  # tied is their default
        model = load_pretrained(folder)[0]
        assert model.config.tied == tied == (model.lm_head.weight is model.wte.weight)
        assert torch.equal(model.lm_head.weight, head.float())
        if head.dtype == torch.float32:
            expected = torch.from_numpy(ARRAYS[name][:, ::4] if tied else ARRAYS[name + "-own-head"])
            logits = model(torch.tensor(GOLDEN["models"][name]["ids"]))[:, ::4]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert "lm_head.weight has shape" in refusal(write_folder(
        tmp_path / name, name, {**tensors, "lm_head.weight": embedding[:-1].clone()}))


def test_whether_the_head_is_tied_where_no_setting_says(tmp_path):
    """GPT-2 and OPT are tied, llama and its kind are not."""
    for name in ("gpt2", "opt"):
        assert load_pretrained(absent(write_folder(tmp_path / name, name), "tie_word_embeddings"))[0].config.tied
    for name in ("llama", "qwen2", "mistral"):
        assert not load_pretrained(absent(write_folder(tmp_path / name, name), "tie_word_embeddings"))[0].config.tied
    for name in ("llama-tied-gqa", "qwen2-tied"):
        assert "missing tensors: lm_head.weight" in refusal(
            absent(write_folder(tmp_path / name, name), "tie_word_embeddings"))


def test_the_whole_file_counts_before_an_index_of_shards(tmp_path):
    """As in transformers: an index beside it may be of another checkpoint, and its shards may be missing."""
    folder = write_folder(tmp_path / "m", "gpt2")
    others = {name: t + 1 for name, t in golden_tensors("gpt2").items()}
    index = {"weight_map": {name: "model-00001-of-00001.safetensors" for name in others}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_against(load_pretrained(folder)[0], GOLDEN["models"]["gpt2"], ARRAYS["gpt2"])
    write_safetensors(folder / "model-00001-of-00001.safetensors", others)
    check_against(load_pretrained(folder)[0], GOLDEN["models"]["gpt2"], ARRAYS["gpt2"])
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_pretrained(folder)[0].wte.weight, others["transformer.wte.weight"])


def test_an_adapter_in_a_models_own_folder_is_refused(tmp_path):
    """Transformers would load the base that the adapter names, and the adapter; neither is the folder's model."""
    folder = write_folder(tmp_path / "m", "gpt2")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "other"}')
    assert "adapter_config.json beside config.json" in refusal(folder)


def test_of_two_rotary_bases_the_one_among_the_rotary_settings_counts(tmp_path):
    """As in transformers; files of two versions at once have both."""
    folder = write_folder(tmp_path / "m", "llama", rope_theta=77.0)
    check_against(load_pretrained(folder)[0], GOLDEN["models"]["llama"], ARRAYS["llama"])
    write_folder(folder, "llama", rope_theta=77.0, rope_parameters={"rope_type": "default"})
    assert load_pretrained(folder)[0].config.rope_theta == 77.0


def test_harmless_settings_are_passed_over(tmp_path):
    """Those of real files: SmolLM2's, Llama 3's, Qwen2.5's, GPT-2's and OPT's config.json."""
    for name, more in (
            ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"},
                       "pretraining_tp": 1, "torch_dtype": "bfloat16", "attention_dropout": 0.0, "use_cache": True,
                       "_name_or_path": "x", "rope_scaling": None, "unsloth_fixed": True, "bos_token_id": 1}),
            ("qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 21, "use_mrope": False}),
            ("gpt2", {"n_ctx": 64, "summary_type": "cls_index", "task_specific_params": {"text-generation": {}},
                      "resid_pdrop": 0.1, "reorder_and_upcast_attn": False, "pruned_heads": {}, "do_sample": True}),
            ("opt", {"prefix": "</s>", "layerdrop": 0.0, "dropout": 0.1, "init_std": 0.02, "unheard_of": None})):
        check_against(load_pretrained(write_folder(tmp_path / name, name, **more))[0], GOLDEN["models"][name],
                      ARRAYS[name])


def test_missing_and_surplus_tensors_are_listed(tmp_path):
    tensors = golden_tensors("gpt2")
    tensors["extra.weight"] = tensors.pop("transformer.h.1.mlp.c_fc.bias")
    message = refusal(write_folder(tmp_path / "a", "gpt2", tensors))
    assert "missing tensors: h.1.mlp.c_fc.bias; surplus tensors: extra.weight" in message
    tensors = golden_tensors("gpt2")
    tensors["wte.weight"] = tensors["transformer.wte.weight"]
    assert "twice" in refusal(write_folder(tmp_path / "b", "gpt2", tensors))
    tensors = golden_tensors("gpt2")
    tensors["transformer.wte.weight"] = torch.zeros(90, 32, dtype=torch.int8)
    assert "wte.weight is I8" in refusal(write_folder(tmp_path / "c", "gpt2", tensors))
    tensors["transformer.wte.weight"] = torch.full((90, 32), float("nan"))
    assert "wte.weight has weights that are not finite" in refusal(write_folder(tmp_path / "d", "gpt2", tensors))
    tensors["transformer.wte.weight"] = torch.full((90, 32), 1e30)
    assert "float16" in refusal(write_folder(tmp_path / "e", "gpt2", tensors), dtype=torch.float16)


def test_hostile_safetensors_are_refused_by_name(tmp_path):
    folder = write_folder(tmp_path / "m", "gpt2")
    file = folder / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2 ** 40) + good[8:])
    assert "model.safetensors: the header claims 1099511627776 bytes" in refusal(folder)
    for cut in (4, 500, len(good) - 1):
        file.write_bytes(good[:cut])
        assert "model.safetensors" in refusal(folder)
    file.write_bytes(good.replace(b'"data_offsets":[12672,', b'"data_offsets":[12668,', 1))
    assert "model.safetensors: tensor" in refusal(folder)
    write_safetensors(file, {"a\nb": torch.zeros(1)})
    assert "'a\\nb' is not printable" in refusal(folder)


def test_folders_that_are_not_one(tmp_path):
    with pytest.raises(OSError):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match="config.json"):
        load_pretrained(tmp_path)
    folder = write_folder(tmp_path / "m", "gpt2")
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json" in refusal(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    assert "config.json" in refusal(folder)
    write_folder(folder, "gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "save_pretrained" in refusal(folder)
    for weight_map in ("x", {"a": 1}, {"a": "../m/model.safetensors"}, {"a": "/etc/passwd"}, {"a": "config.json"}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert "index.json" in refusal(folder)


def test_no_flip_and_no_cut_does_more_than_raise(tmp_path):
    """2,000 seeded damages to small valid files: what loads is finite, all else is a ValueError."""
    r = random.Random(0)
    tokenizer = json.dumps(GOLDEN["tokenizers"]["smollm"], ensure_ascii=False).encode()
    folder = write_folder(tmp_path / "m", "llama-tied-gqa", vocab_size=400, num_hidden_layers=1, tensors={
        k: torch.from_numpy(fill(k, (400, 32) if "embed" in k else tuple(shape)))
        for k, shape in GOLDEN["models"]["llama-tied-gqa"]["shapes"].items() if ".1." not in k})
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(*tiny_gguf()))
    jobs = [(tmp_path / "x.gguf", tmp_path / "x.gguf", 900), (folder / "config.json", folder, 350),
            (folder / "model.safetensors", folder, 450), (folder / "tokenizer.json", folder, 300)]
    before = peak()
    loaded = refused = 0
    for file, path, times in jobs:
        good = file.read_bytes()
        # most damage where it matters most
        header = good.index(b"blk.0.ffn_down") + 60 if path == file else min(len(good), 2000)
        load_pretrained(path)
        for _ in range(times):
            raw = bytearray(good)
            for _ in range(r.choice((1, 1, 3))):
                raw[r.randrange(header if r.random() < 0.8 else len(raw))] = r.choice((r.randrange(256), 0, 255))
            if r.random() < 0.15:
                raw = raw[:r.randrange(len(raw))]
            file.write_bytes(raw)
            try:
                model, _ = load_pretrained(path)
            except ValueError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error), error
                refused += 1
            else:
                assert all(p.isfinite().all() for p in model.parameters())
                loaded += 1
        file.write_bytes(good)
    assert loaded + refused == 2000 and loaded > 100 and refused > 1000, (loaded, refused)
    assert peak() - before < 400e6  # no allocation on a file's word


def test_any_checkpoint_is_read_by_one_function(tmp_path):
    """Ours with its vocabulary beside it or without, a folder, a .gguf file; each loads as its own reader loads it."""
    gguf_file = tmp_path / "x.gguf"
    gguf_file.write_bytes(gguf_bytes(*tiny_gguf()))
    for path in (write_folder(tmp_path / "m", "gpt2"), gguf_file):
        (model, encoding), (again, vocabulary_) = load_pretrained(path), read_model(path)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        assert (encoding is None) == (vocabulary_ is None) == (path != gguf_file)
    ranks = {bytes([b]): b for b in range(256)}
    model = GPT(GPTConfig(vocab_size=257, context=8, n_layer=1, n_head=1, n_embd=4))
    save(model, tmp_path / "ours.safetensors")
    again, encoding = read_model(tmp_path / "ours.safetensors")
    assert encoding is None and torch.equal(again.wte.weight, model.wte.weight)
    save_ranks(ranks, tmp_path / "tokens.tiktoken")
    _, encoding = read_model(str(tmp_path / "ours.safetensors"))
    assert encoding.encode("a<|endoftext|>", allowed_special="all") == [97, 256]
    save_ranks({**ranks, b"ab": 256}, tmp_path / "tokens.tiktoken")
    with pytest.raises(ValueError, match="tokens.tiktoken: 258 tokens, .*ours.safetensors has 257: not its vocabulary"):
        read_model(tmp_path / "ours.safetensors")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(ValueError, match="no usable model configuration"):
        read_model(tmp_path / "m" / "model.safetensors")
    with pytest.raises(OSError, match="nowhere"):
        read_model(tmp_path / "nowhere")


# ---- SmolLM2

@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained(SMOLLM2)


@needs_smollm2
def test_smollm2_token_ids(smollm2):
    _, encoding = smollm2
    for text, ids in zip(texts(), GOLDEN["smollm2"]["token_ids"], strict=True):
        assert encoding.encode_ordinary(text) == ids, text
        assert encoding.decode(ids) == text
    assert not encoding.ids and (encoding.bos, encoding.eos, encoding.eot_token) == (None, 2, 0)
    assert encoding.encode("<|im_start|>user", allowed_special="all")[0] == 1


@needs_smollm2
@torch.no_grad()
def test_smollm2_logits_and_greedy_text(smollm2):
    model, _ = smollm2
    assert model.n_parameters() == 134_515_008
    logits = model(torch.tensor([GOLDEN["smollm2"]["token_ids"][0][:256]]))[0]
    torch.testing.assert_close(logits[::16, ::97], torch.from_numpy(ARRAYS["smollm2"]), atol=1e-3, rtol=0)
    assert logits.argmax(-1).tolist() == GOLDEN["smollm2"]["best"]
    prompt = torch.tensor([GOLDEN["smollm2"]["prompt"]])
    assert model.generate(prompt, 50)[0].tolist() == GOLDEN["smollm2"]["greedy"]
