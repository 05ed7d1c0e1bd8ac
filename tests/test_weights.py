"""weights.py, gguf.py, vocabulary.py and facts/: against transformers' logits, tokenizers' ids, and hostile files.

The golden values were made by golden/make_weights.py; the models' weights are pseudorandom and made again here.
"""
import copy
import json
import math
import pathlib
import pickle
import random
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from checkpoints import gguf
from checkpoints import vocabulary
from checkpoints import weights
from golden.make_weights import fill, texts
from engine.safetensors import write_safetensors
from checkpoints.weights import load_pretrained

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden" / "weights.json").read_text(encoding="utf-8"))
ARRAYS = np.load(HERE / "golden" / "weights.npz")
SMOLLM2 = HERE.parent / "out" / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="no SmolLM2: sh tests/get_smollm2.sh gets it (98 MB)")
MODELS = sorted(GOLDEN["models"])


def golden_tensors(name):
    return {k: torch.from_numpy(fill(k, tuple(shape))) for k, shape in GOLDEN["models"][name]["shapes"].items()}


def write_folder(folder, name, tensors=None, tokenizer=None, **changes):
    """A Hugging Face folder of the golden model `name`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**GOLDEN["models"][name]["config"], **changes}))
    write_safetensors(folder / "model.safetensors", golden_tensors(name) if tensors is None else tensors)
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"][tokenizer]))
    return folder


def golden_gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(ARRAYS["gguf_file"].tobytes())
    return path


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(v):
    """A metadata value with its type in front."""
    if isinstance(v, bool):
        return struct.pack("<IB", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, list):
        items = [value(x) for x in v]
        kind = items[0][:4] if items else struct.pack("<I", 4)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(v)) + b"".join(item[4:] for item in items)
    return struct.pack("<I", 8) + string(v)


def gguf_bytes(metadata, tensors, version=3, kind=0, lies={}):
    """A GGUF file of float32 tensors, written from the specification and not from the reader."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(string(k) + value(v) for k, v in metadata.items())
    blobs = b""
    for name, t in tensors.items():
        at = lies.get(name, len(blobs))
        head += string(name) + struct.pack(f"<I{t.ndim}QIQ", t.ndim, *t.shape[::-1], kind, at)
        blobs += t.astype("<f4").tobytes()
        blobs += b"\0" * (-len(blobs) % 32)
    return head + b"\0" * (-len(head) % 32) + blobs


def tiny_gguf(scaling=None, **changes):
    """(metadata, tensors) of a one-layer llama with the golden vocabulary of SmolLM's kind."""
    t = GOLDEN["tokenizers"]["smollm"]["model"]
    vocab = sorted(t["vocab"], key=t["vocab"].get)
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 32,
                "llama.embedding_length": 8,
                "llama.feed_forward_length": 12, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
                "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
                "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": vocab,
                "tokenizer.ggml.token_type": [3] * 2 + [1] * (len(vocab) - 2),
                "tokenizer.ggml.merges": [" ".join(m) for m in t["merges"]], "tokenizer.ggml.eos_token_id": 0}
    shapes = {"token_embd": (len(vocab), 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
              "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8),
              "blk.0.ffn_gate": (12, 8),
              "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}
    tensors = {k + ".weight": fill(k + ".weight", shape) for k, shape in shapes.items()}
    if scaling is not None:
        tensors["rope_freqs.weight"] = scaling
    return {k: v for k, v in {**metadata, **changes}.items() if v is not None}, tensors


def peak():
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def refusal(path, **options):
    """The one line that a bad checkpoint is refused with."""
    with pytest.raises(ValueError) as caught:
        load_pretrained(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message


# ---- the models

@pytest.mark.parametrize("name", MODELS)
def test_logits_cached_decode_and_greedy_text_equal_transformers(tmp_path, name):
    golden = GOLDEN["models"][name]
    model, encoding = load_pretrained(write_folder(tmp_path / name, name))
    assert encoding is None
    check_against(model, golden, ARRAYS[name])


def test_a_gguf_file_of_every_kind_of_tensor_equals_transformers(tmp_path):
    model, encoding = load_pretrained(golden_gguf(tmp_path))
    assert {t.kind for t in gguf.read_header(tmp_path / "tiny.gguf")[1].values()} == set(gguf.BLOCKS)
    check_against(model, GOLDEN["gguf"], ARRAYS["gguf"])
    assert encoding.encode_ordinary(texts()[0]) == GOLDEN["token_ids"]["smollm"][0]
    assert (encoding.bos, encoding.eos) == (None, 0)


@torch.no_grad()
def check_against(model, golden, logits):
    ids, logits = torch.tensor(golden["ids"]), torch.from_numpy(logits)
    assert logits.abs().max() > 3  # not a model that says nothing
    torch.testing.assert_close(model(ids), logits, atol=1e-4, rtol=0)
    cache = model.new_cache(len(ids), ids.shape[1])
    parts = [model(ids[:, :7], cache=cache)] + [model(ids[:, i:i + 1], cache=cache) for i in range(7, ids.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-4, rtol=0)
    assert model.generate(ids, 16).tolist() == golden["greedy"]


@pytest.mark.parametrize("kind", [k for k in gguf.BLOCKS if k not in ("F32", "F16")])
def test_every_block_decodes_exactly_as_the_reference(kind):
    raw, expected = ARRAYS[f"block_{kind}_bytes"], ARRAYS[f"block_{kind}_weights"]
    assert np.array_equal(gguf.BLOCKS[kind][2](raw), expected, equal_nan=True)


def test_pieces_do_not_show(tmp_path, monkeypatch):
    path = golden_gguf(tmp_path)
    whole = load_pretrained(path)[0].state_dict()
    monkeypatch.setattr(gguf, "PIECE", 512)
    for name, t in load_pretrained(path)[0].state_dict().items():
        assert torch.equal(t, whole[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_asked_for_is_the_rounded_float32(tmp_path, dtype):
    folder = write_folder(tmp_path / "m", "gpt2")
    full, half = load_pretrained(folder)[0], load_pretrained(folder, dtype=dtype)[0]
    for (name, a), b in zip(full.state_dict().items(), half.state_dict().values()):
        assert b.dtype == dtype and b.is_contiguous() and torch.equal(a.to(dtype), b), name
    assert half.lm_head.weight is half.wte.weight
    with pytest.raises(ValueError, match="int8"):
        load_pretrained(folder, dtype=torch.int8)


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


def test_llama3_scaling_is_recognized_in_a_gguf_file(tmp_path):
    def divisor(wavelength):  # the three cases of Llama 3, on the wavelength
        if wavelength < 8192 / 4:
            return 1.0
        if wavelength > 8192 / 1:
            return 8.0
        smooth = (8192 / wavelength - 1) / (4 - 1)
        return 1 / ((1 - smooth) / 8 + smooth)
    base, width = 500000.0, 64
    freqs = np.array([divisor(2 * math.pi * base ** (i / width)) for i in range(0, width, 2)], np.float32)
    assert len(set(freqs.tolist())) > 3
    config = dict(vocab_size=8, n_layer=1, n_head=2, n_embd=128, context=32, rope_theta=base)
    scaling = weights.gguf_scaling("file", config, torch.from_numpy(freqs))
    assert scaling == {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}
    with pytest.raises(ValueError, match="rope_freqs"):
        weights.gguf_scaling("file", config, torch.from_numpy(freqs[::-1].copy()))
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf(scaling=np.array([1, 1], np.float32))))
    assert load_pretrained(path)[0].config.rope_scaling["factor"] == 1
    path.write_bytes(gguf_bytes(*tiny_gguf(scaling=np.array([1, np.nan], np.float32))))
    assert "rope_freqs" in refusal(path)


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


# ---- the tokenizers

@pytest.mark.parametrize("name", sorted(GOLDEN["tokenizers"]))
def test_token_ids_equal_the_original_tokenizers(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"][name]))
    encoding = vocabulary.from_folder(tmp_path, {"eos_token_id": [1, 5]}, 400)
    for text, ids in zip(texts(), GOLDEN["token_ids"][name], strict=True):
        assert encoding.encode_ordinary(text) == ids, text
        assert encoding.decode(ids) == text
    assert bool(encoding.ids) == (name == "opt") and encoding.eos == 1
    assert encoding.bos == (378 if name == "llama3" else None)
    end = GOLDEN["tokenizers"][name]["model"]["vocab"].get("<|endoftext|>", 378)
    assert encoding.eot_token == end and encoding.encode("a<|endoftext|>", allowed_special="all")[-1] == end
    assert encoding.n_vocab == 380


def test_mapped_ids_go_through_every_door(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"]["opt"]))
    encoding = vocabulary.from_folder(tmp_path, {}, 400)
    page, ids = texts()[0], GOLDEN["token_ids"]["opt"][0]
    for e in (encoding, pickle.loads(pickle.dumps(encoding)), copy.deepcopy(encoding)):
        assert e.encode(page) == e.encode_to_numpy(page).tolist() == ids
        assert e.encode_ordinary_batch([page]) == e.encode_batch([page]) == [ids]
        assert e.decode(ids) == e.decode_batch([ids])[0] == e.decode_with_offsets(ids)[0] == page
        assert e.decode_bytes(ids) == b"".join(e.decode_tokens_bytes(ids)) == page.encode()
        for i in range(380):
            assert e.encode_single_token(e.decode_single_token_bytes(i)) == i


def test_vocab_and_merges_files_say_the_same_as_tokenizer_json(tmp_path):
    t = GOLDEN["tokenizers"]["opt"]["model"]
    vocab = {{"<|endoftext|>": "</s>"}.get(token, token): i for token, i in t["vocab"].items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in t["merges"])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    config = {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoding = vocabulary.from_folder(tmp_path, {}, 400)
    assert [encoding.encode_ordinary(text) for text in texts()] == GOLDEN["token_ids"]["opt"]
    assert encoding.special_tokens_set == {"</s>", "<|im_start|>"}
    assert encoding.bos == encoding.eot_token == encoding.encode_single_token("<|im_start|>")
    (tmp_path / "tokenizer_config.json").unlink()
    encoding = vocabulary.from_folder(tmp_path, {"eos_token_id": vocab["</s>"]}, 400)
    assert encoding.bos is None and encoding.eos == encoding.eot_token == vocab["</s>"]


def test_characters_whose_bytes_a_vocabulary_lacks_are_passed_over(tmp_path):
    t = copy.deepcopy(GOLDEN["tokenizers"]["smollm"])
    lacking = [c for c, b in vocabulary.BYTES.items() if b in (0x04, 0x1D, 0xC0, 0xF1, 0xFF)]
    kept = [token for token in sorted(t["model"]["vocab"], key=t["model"]["vocab"].get) if token not in lacking]
    t["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(t))
    encoding = vocabulary.from_folder(tmp_path, {}, 400)
    assert encoding.decode(encoding.encode_ordinary("a\x04b\U00050000c \x1d!?")) == "abc !?"
    del t["model"]["vocab"]["a"]
    t["model"]["vocab"] = {token: i for i, token in enumerate(t["model"]["vocab"])}
    t["model"]["merges"] = [m for m in t["model"]["merges"] if "a" not in "".join(m)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(t))
    with pytest.raises(ValueError, match="0x61"):
        vocabulary.from_folder(tmp_path, {}, 400)


def change(path, *keys, to):
    """The golden llama3 tokenizer with one entry changed."""
    t = copy.deepcopy(GOLDEN["tokenizers"]["llama3"])
    at = t
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    (path / "tokenizer.json").write_text(json.dumps(t))


@pytest.mark.parametrize("keys, to, says", [
    (["model", "vocab", "a"], 7, "ids"), (["model", "vocab", "a"], 1000, "ids"),
    (["model", "vocab", "new"], 400, "ids"),
    (["model", "vocab", "a"], "7", "integers"), (["model", "vocab", "a"], True, "ids"),
    (["model", "vocab", "a"], -1, "ids"),
    (["model", "merges", 3], ["a"], "merge 3"), (["model", "merges", 3], ["a", "zz"], "merge 3"),
    (["model", "merges", 3], ["a", 1], "pairs"),
    (["model", "merges", 3], ["", "a"], "merge 3"), (["model", "merges"], {}, "BPE"),
    (["model", "byte_fallback"], True, "tokenizer=False"),
    (["normalizer"], {"type": "NFC"}, "tokenizer=False"),
    (["pre_tokenizer"], {"type": "Metaspace"}, "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], "(a+)+$", "pre_tokenizer"),
    (["pre_tokenizer"], None, "pre_tokenizer"),
    (["added_tokens", 0, "id"], 3, "ids"), (["added_tokens", 0, "content"], "a", "two ids"),
    (["added_tokens"], [1], "added_tokens"),
    (["added_tokens", 0, "content"], "", "special"), (["added_tokens", 0, "content"], "\ud800", "special"),
    (["model"], None, "BPE"), (["post_processor"], {"processors": 5}, None), (["post_processor"], [1], None),
])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, keys, to, says):
    change(tmp_path, *keys, to=to)
    if says is None:  # no business of ours
        assert vocabulary.from_folder(tmp_path, {}, 400).bos is None
        return
    with pytest.raises(ValueError, match=says) as caught:
        vocabulary.from_folder(tmp_path, {}, 400)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_sentencepiece_is_refused_and_the_weights_still_load(tmp_path):
    folder = write_folder(tmp_path / "m", "llama")
    (folder / "tokenizer.model").write_bytes(b"\n\x0e")
    assert "tokenizer=False" in refusal(folder)
    assert load_pretrained(folder, tokenizer=False)[1] is None
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf(**{"tokenizer.ggml.model": "llama"})))
    assert "tokenizer=False" in refusal(path)
    assert load_pretrained(path, tokenizer=False)[1] is None


# ---- what is refused

@pytest.mark.parametrize("name, changes, says", [
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
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
    ("llama", {"attention_bias": True}, "mlp_bias"), ("llama", {"head_dim": 16}, "head_dim"),
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
])
def test_what_this_gpt_cannot_compute_is_refused_by_name(tmp_path, name, changes, says):
    assert says in refusal(write_folder(tmp_path / "m", name, **changes))


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


def test_hostile_gguf_files_are_refused_by_name(tmp_path):
    path = tmp_path / "x.gguf"
    metadata, tensors = tiny_gguf()
    good = gguf_bytes(metadata, tensors)

    def says(raw):
        path.write_bytes(raw)
        return refusal(path)
    path.write_bytes(good)
    load_pretrained(path)
    assert "too short" in says(good[:20])
    assert "does not begin" in says(b"GGML" + good[4:])
    assert "version 1" in says(gguf_bytes(metadata, tensors, version=1))
    assert "version 50331648" in says(good[:4] + b"\0\0\0\3" + good[8:])  # big-endian
    for count in (8, 16):  # of tensors, of metadata
        assert str(path) in says(good[:count] + b"\xff" * 8 + good[count + 8:])
    for cut in range(24, len(good), 997):
        assert str(path) in says(good[:cut])
    at = good.index(b"general.architecture")
    assert "claims" in says(good[:at - 8] + struct.pack("<Q", 2 ** 63) + good[at:])          # a string's length
    at = good.index(b"tokenizer.ggml.tokens") + 21
    assert "unknown type 13" in says(good[:at] + struct.pack("<I", 13) + good[at + 4:])
    assert "claims" in says(good[:at + 8] + struct.pack("<Q", 2 ** 62) + good[at + 16:])     # an array's
    assert "unknown type 9" in says(good[:at + 4] + struct.pack("<I", 9) + good[at + 8:])    # an array of arrays
    assert "not UTF-8" in says(gguf_bytes({**metadata, "general.name": b"\xff"}, tensors))
    assert "is there twice" in says(good.replace(b"llama.block_count", b"llama.vocab_sizee").replace(
        b"llama.context_length", b"general.architecture"))
    assert "not printable" in says(good.replace(b"blk.0.attn_k", b"blk.0\nattn_k"))
    assert "is there twice" in says(good.replace(b"blk.0.attn_k", b"blk.0.attn_v"))
    assert "Q2_K" in says(gguf_bytes(metadata, tensors, kind=10))
    assert "type 77" in says(gguf_bytes(metadata, tensors, kind=77))
    assert "blocks of 32" in says(gguf_bytes(metadata, tensors, kind=8))
    assert "alignment" in says(gguf_bytes({**metadata, "general.alignment": 0}, tensors))
    assert "overlap" in says(gguf_bytes(metadata, tensors, lies={"output_norm.weight": 32}))
    assert "beyond the end" in says(gguf_bytes(metadata, tensors, lies={"output_norm.weight": 2 ** 62}))
    assert "misaligned" in says(gguf_bytes(metadata, tensors, lies={"token_embd.weight": 4}))
    tensors["output_norm.weight"] = np.full(8, np.inf)
    assert "output_norm.weight has weights that are not finite" in says(gguf_bytes(metadata, tensors))


@pytest.mark.parametrize("changes, says", [
    ({"general.architecture": "qwen2"}, "general.architecture"),
    ({"general.architecture": None}, "general.architecture"),
    ({"llama.block_count": None}, "llama.block_count"),
    ({"llama.block_count": 2}, "missing tensors: blk.1.attn_norm.weight"),
    ({"llama.block_count": 10 ** 6}, "layers"), ({"llama.attention.head_count": 3}, "n_head"),
    ({"llama.attention.head_count_kv": [1]}, "kv"),
    ({"llama.rope.dimension_count": 2}, "dimension_count"), ({"llama.rope.scaling.type": "linear"}, "scaling"),
    ({"llama.context_length": 2 ** 31}, "context_length"), ({"llama.rope.freq_base": float("nan")}, "freq_base"),
    ({"llama.expert_count": 8}, "expert_count"), ({"tokenizer.ggml.pre": "qwen2"}, "qwen2"),
    ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": []}, "twice"),
    ({"tokenizer.ggml.token_type": [1]}, "types"), ({"tokenizer.ggml.merges": ["a b c"]}, "merge 0"),
    ({"tokenizer.ggml.merges": "a"}, "merges"),
    ({"tokenizer.ggml.tokens": [1, 2], "tokenizer.ggml.token_type": []}, "text"),
    ({"tokenizer.ggml.tokens": []}, "types"),
])
def test_gguf_metadata_is_refused_by_name(tmp_path, changes, says):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf(**changes)))
    assert says in refusal(path)


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


def test_the_scripts_go_on_with_a_text_and_refuse_in_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf()))
    monkeypatch.setattr(sys, "argv", ["weights.py", str(path), "--text", "The capital", "--tokens", "3"])
    weights.main()
    assert capsys.readouterr().out.splitlines()[2].startswith("The capital")
    monkeypatch.setattr(sys, "argv", ["gguf.py", str(path)])
    gguf.main()
    assert "blk.0.ffn_down.weight" in capsys.readouterr().out
    path.write_bytes(b"GGUF" + bytes(40))
    for script in (weights, gguf):
        monkeypatch.setattr(sys, "argv", [script.__name__, str(path)])
        with pytest.raises(SystemExit) as end:
            script.main()
        printed = capsys.readouterr()
        assert end.value.code == 2 and printed.err.count("\n") == 1 and "version 0" in printed.err and not printed.out


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


# ---- the facts

def test_the_facts_are_what_the_table_makes_of_them():
    sys.path.insert(0, str(HERE.parent / "real" / "facts"))
    import make_countries
    lines = (HERE.parent / "real" / "facts" / "countries.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines]
    assert facts == make_countries.make_facts()
    table = {row["country"].removeprefix("the "): row for row in make_countries.read_table()}
    assert len(table) == 197
    asked = {(f["entity"], f["attribute"]) for f in facts}
    assert len({f["question"] for f in facts}) == len(facts) == 2 * len(asked) > 1600
    for f in facts:
        row = table[f["entity"]]
        asked = row["capital"] if f["attribute"] == "country" else f["entity"]
        assert f["answer"] == row[f["attribute"]] and asked in f["question"]
        assert f["options"].count(f["answer"]) == 1 and len(set(f["options"])) == len(f["options"]) in (6, 8)
        assert not set(f["options"]) & {"-", *row["also true"].split(", ")}
        answer = row["capital"] if f["attribute"] == "country" else f["answer"]
        assert not make_countries.gives_away(f["entity"], answer)
    for attribute in make_countries.QUESTIONS:
        places = [f["options"].index(f["answer"]) for f in facts if f["attribute"] == attribute]
        counts = np.bincount(places)
        assert counts.max() - counts.min() <= 2  # a guesser who always takes one place is at chance


def test_giving_away():
    from make_countries import gives_away
    for pair in (("Mexico", "Mexico City"), ("Tunisia", "Tunis"), ("Spain", "Spanish"), ("Sierra Leone", "leone"),
                 ("São Tomé and Príncipe", "Sao Tome"), ("Afghanistan", "afghani")):
        assert gives_away(*pair), pair
    for pair in (("Kenya", "Nairobi"), ("the Philippines", "Manila"), ("Sri Lanka", "rupee")):
        assert not gives_away(*pair), pair
