"""checkpoints/gguf.py and the models in such files: blocks against the reference, logits, damaged and hostile files."""
import math
import struct

import numpy as np
import pytest
import torch

from checkpoint_files import ARRAYS, GOLDEN, check_against, gguf_bytes, golden_gguf, golden_tensors, refusal, tiny_gguf
from checkpoints import gguf, load_pretrained, weights
from engine.safetensors import write_safetensors
from golden.make_weights import texts


def test_a_gguf_file_of_every_kind_of_tensor_equals_transformers(tmp_path):
    model, encoding = load_pretrained(golden_gguf(tmp_path))
    assert {t.kind for t in gguf.read_header(tmp_path / "tiny.gguf")[1].values()} == set(gguf.BLOCKS)
    check_against(model, GOLDEN["gguf"], ARRAYS["gguf"])
    assert encoding.encode_ordinary(texts()[0]) == GOLDEN["token_ids"]["smollm"][0]
    assert (encoding.bos, encoding.eos) == (None, 0)


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


def test_tensors_are_the_same_only_if_every_value_is(tmp_path, monkeypatch):
    """Of one kind or of two; a difference in the last value of the last piece counts, and so does the shape."""
    monkeypatch.setattr(gguf, "PIECE", 32)
    t = torch.arange(100.0).view(10, 10)
    other = t.clone()
    other[-1, -1] += 1
    path = str(tmp_path / "t.safetensors")
    write_safetensors(path, {"a": t, "b": t.half(), "last": other, "flat": t.view(-1), "long": t.repeat(2, 1)})
    stored = weights.list_safetensors(path)
    assert {name for name in stored if gguf.same(stored["a"], stored[name])} == {"a", "b"}
    assert {name for name in stored if gguf.same(stored[name], stored["last"])} == {"last"}


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


HARMLESS = {"general.name": "x", "general.file_type": 2, "llama.tensor_data_layout": "Meta AI original pth",
            "llama.rope.scale_linear": 1.0, "llama.rope.scaling.type": "none", "llama.attention.causal": True,
            "quantize.imatrix.file": "x", "split.count": 1, "tokenizer.chat_template": "x", "llama.expert_count": 0,
            "llama.rope.scaling.original_context_length": 32, "tokenizer.ggml.padding_token_id": 1}


def test_harmless_metadata_is_passed_over(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf()))
    plain = load_pretrained(path)[0].state_dict()
    path.write_bytes(gguf_bytes(*tiny_gguf(**HARMLESS)))
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), load_pretrained(path)[0].state_dict().values()))


def as_gguf(name):
    """(metadata, tensors) of a golden model as llama.cpp's converter writes it: its names, llama's q and k permuted."""
    c, kind = GOLDEN["models"][name]["config"], "qwen2" if "qwen2" in name else "llama"
    heads, hs = {"q": c["num_attention_heads"], "k": c["num_key_value_heads"]}, 32 // c["num_attention_heads"]
    ours = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
             **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}, **{f"mlp.{x}_proj": f"ffn_{x}" for x in (
                 "gate", "up", "down")}}
    tensors = {}
    for key, t in golden_tensors(name).items():
        module, _, end = key.rpartition(".")
        if module not in ours:
            _, _, i, part = module.split(".", 3)
            ours[module] = f"blk.{i}.{parts[part]}"
            which = part.removeprefix("self_attn.")[0]
        t = t.numpy()
        if ".attn_q" in ours[module] or ".attn_k" in ours[module]:
            if kind == "llama":  # row 2i + j of a head is row i + j hs / 2 of it in transformers
                rows = [h * hs + i + j * hs // 2 for h in range(heads[which]) for i in range(hs // 2) for j in (0, 1)]
                t = t[rows]
        tensors[f"{ours[module]}.{end}"] = t
    metadata = {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in {
        "block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48,
        "attention.head_count": heads["q"], "attention.head_count_kv": heads["k"],
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": c["rope_parameters"]["rope_theta"]}.items()}}
    return metadata, tensors


@pytest.mark.parametrize("name", ["llama-tied-gqa", "llama-attention-bias", "qwen2", "qwen2-tied", "mistral"])
def test_a_model_converted_to_gguf_is_the_same_model(tmp_path, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*as_gguf(name)))
    check_against(load_pretrained(path)[0], GOLDEN["models"][name], ARRAYS[name])


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
    ({"general.architecture": "qwen3"}, "general.architecture"),
    ({"general.architecture": "qwen2"}, "qwen2.attention.head_count"), ({"general.type": "adapter"}, "general.type"),
    ({"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear=4.0"), ({"llama.rope.scaling.factor": 4.0}, "factor=4"),
    ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor"), ({"llama.attention.sliding_window": 16}, "ing_window"),
    ({"llama.attention.causal": False}, "causal"),
    ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5 is not known"),
    ({"llama.attn_logit_softcapping": 50.0}, "softcapping"), ({"llama.logit_scale": 8.0}, "logit_scale"),
    ({"llama.embedding_scale": 12.0}, "embedding_scale"), ({"llama.vocab_size": 5}, "vocab_size"),
    ({"llama.leading_dense_block_count": 1}, "leading_dense"), ({"adapter.type": "lora"}, "adapter.type"),
    ({"split.no": 1, "split.count": 3}, "part 2 of 3"),
    ({"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id is 99999"),
    ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 4000}, "bos_token_id is 4000"),
    ({"general.architecture": None}, "general.architecture"),
    ({"llama.block_count": None}, "llama.block_count"),
    ({"llama.block_count": 2}, "missing tensors: blk.1.attn_norm.weight"),
    ({"llama.block_count": 10 ** 6}, "layers"), ({"llama.attention.head_count": 3}, "n_head"),
    ({"llama.attention.head_count_kv": [1]}, "kv"),
    ({"llama.rope.dimension_count": 2}, "dimension_count"), ({"llama.rope.scaling.type": "linear"}, "scaling"),
    ({"llama.context_length": 2 ** 31}, "context_length"), ({"llama.rope.freq_base": float("nan")}, "freq_base"),
    ({"llama.expert_count": 8}, "expert_count"), ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
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
