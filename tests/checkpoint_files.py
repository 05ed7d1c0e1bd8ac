"""What the tests of checkpoints share: the golden models in folders, GGUF files written from the specification.

The golden values were made by golden/make_weights.py; the models' weights are pseudorandom and made again here.
"""
import json
import pathlib
import resource
import struct
import sys

import numpy as np
import pytest
import torch

from checkpoints import load_pretrained
from engine.safetensors import write_safetensors
from golden.make_weights import fill

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden" / "weights.json").read_text(encoding="utf-8"))
ARRAYS = np.load(HERE / "golden" / "weights.npz")


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


@torch.no_grad()
def check_against(model, golden, logits):
    ids, logits = torch.tensor(golden["ids"]), torch.from_numpy(logits)
    assert logits.abs().max() > 3  # not a model that says nothing
    torch.testing.assert_close(model(ids), logits, atol=1e-4, rtol=0)
    cache = model.new_cache(len(ids), ids.shape[1])
    parts = [model(ids[:, :7], cache=cache)] + [model(ids[:, i:i + 1], cache=cache) for i in range(7, ids.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), logits, atol=1e-4, rtol=0)
    assert model.generate(ids, 16).tolist() == golden["greedy"]
