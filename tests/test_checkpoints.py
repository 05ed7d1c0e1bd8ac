"""python -m checkpoints: what it says of every kind of file, and one line where it cannot."""
import copy
import re
import sys

import pytest
import torch

from checkpoint_files import HERE, gguf_bytes, tiny_gguf, write_folder
from checkpoints import __main__ as job
from checkpoints import read_model, save
from checkpoints.adapters import save_adapter, save_tensors
from compress import compress
from engine.script import guard
from idp import PromptPool, probed
from model import GPT, GPTConfig
from recover import Prefix
from study.repairs import add_inside, attach

ADAPTERS = HERE / "golden" / "adapters"
TRAINED = HERE / "golden" / "trained" / "dense.safetensors"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["checkpoints", *map(str, args)])
        guard(job.main, "checkpoints")
        return capsys.readouterr().out
    return run


def gpt(seed=0):
    return GPT(GPTConfig(vocab_size=40, context=32, n_layer=1, n_head=2, n_embd=32)).init_weights(
        torch.Generator().manual_seed(seed))


def test_models_are_described_and_go_on_with_a_text(tmp_path, run):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf()))
    lines = run(path, "--text", "The capital", "--tokens", 3).splitlines()
    assert lines[0].startswith("GPTConfig(vocab_size=") and lines[1].endswith(" parameters")
    assert lines[2].startswith("The capital") and len(lines[2]) > len("The capital")
    save(gpt(), tmp_path / "ours.safetensors")
    assert "vocab_size=40" in run(tmp_path / "ours.safetensors")
    assert "position='learned'" in run(write_folder(tmp_path / "folder", "gpt2"))


def test_a_packed_model_has_as_many_parameters_as_before(tmp_path, run):  # a sibling of C5
    save(gpt(), tmp_path / "dense.safetensors")
    for name, settings in (("half", dict(bits=3, targets=("attn.q", "mlp.up"))), ("whole", dict(bits=4))):
        small, _ = compress(gpt(), torch.zeros(1, 4, dtype=torch.long), "rtn", **settings)
        save(small, tmp_path / f"{name}.safetensors")
    lines = [run(tmp_path / f"{name}.safetensors").splitlines()[1] for name in ("dense", "half", "whole")]
    assert lines == [f"{gpt().n_parameters():,} parameters"] * 3


def test_tensors_are_listed(tmp_path, run):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*tiny_gguf()))
    assert "llama.block_count" in run(path, "--tensors") and "blk.0.ffn_down.weight" in run(path, "--tensors")
    save(gpt(), tmp_path / "ours.safetensors")
    listed = run(tmp_path / "ours.safetensors", "--tensors")
    assert "blocks.0.attn.q.weight                           F32   (32, 32)                    4,096 bytes" in listed
    assert re.search(r"^config +'\{.*vocab_size\W+40\b", listed, re.M)  # of its __metadata__
    assert "transformer.wte.weight" in run(write_folder(tmp_path / "folder", "gpt2"), "--tensors")


def test_adapters_are_described_and_held_to_a_base(tmp_path, run):
    lines = run(ADAPTERS / "llama-lora", "--base", ADAPTERS / "llama").splitlines()
    assert lines[0].startswith("lora: 12 tensors, 384 parameters") and lines[1].endswith("by names and shapes alone")
    save_adapter(tmp_path, gpt(), "idp", [torch.zeros(2, 32)])
    save(gpt(), tmp_path / "0.safetensors")
    assert "it fits this base\n" in run(tmp_path, "--base", tmp_path / "0.safetensors")


def test_a_base_goes_on_with_a_text_under_its_adapter(tmp_path, run):
    """Each kind says what the repair itself says: in front of the text, inside the model, or chosen by the text."""
    stored, encoding = read_model(TRAINED)
    model = copy.deepcopy(stored).float()
    ids, generator = torch.tensor([encoding.encode_ordinary("The capital")]), torch.Generator().manual_seed(11)

    def random(*shapes):
        return [4 * torch.randn(shape, generator=generator) for shape in shapes]

    def said(*tensors, kind, targets=None, probe=False):
        save_tensors(tmp_path / kind, stored, kind, tensors, targets, probe)
        said = run(tmp_path / kind, "--base", TRAINED, "--text", "The capital", "--tokens", 12).split("\n", 2)
        assert said[1] == "it fits this base"
        return said[2].removesuffix("\n")

    def text(model, **how):
        return encoding.decode(model.generate(ids, 12, **how)[0].tolist())
    C, plain = model.config.n_embd, text(model)
    for kind, size, targets in (("lora", 2, None), ("bias", "o down", ("o", "down")), ("gains", None, None)):
        shapes = [p.shape for p in add_inside(copy.deepcopy(model), kind, size)]
        tensors = random(*shapes)
        assert said(*tensors, kind=kind, targets=targets) == text(attach(model, kind, size, tensors).model) != plain
    prompt, = random((4, C))
    assert said(prompt, kind="prompt") == text(model, prompt=prompt) != plain
    pool = random(*[(3, C)] * 8)
    scores = attention_to(model, pool, ids)
    assert said(*pool, kind="idp") == text(model, prompt=pool[scores.index(max(scores))]) != text(model, prompt=pool[0])
    probe, = random((8, C))
    best = int(probed(model, PromptPool(pool, probe), ids).argmax())
    assert best != 0 and said(*pool, probe, kind="idp", probe=True) == text(model, prompt=pool[best])
    prefix, = random((model.config.n_layer, 2, model.config.n_kv_head, 3, C // model.config.n_head))
    behind = Prefix(prefix).cache(model, 1, ids.shape[1] + 12)
    assert said(prefix, kind="prefix") == text(model, cache=behind) != plain


def attention_to(model, pool, ids):
    """What a text attends to each prompt (P, C) of a pool in the first layer: one softmax over all of them and itself.
    """
    (P, _), T, at = pool[0].shape, ids.shape[1], torch.arange(len(pool[0]) + ids.shape[1])[None]
    q, keys = None, []
    for prompt in pool:
        x = model.place(torch.cat([prompt[None], model.wte(ids)], 1), at)
        q, k, _ = model.blocks[0].attn.qkv(model.blocks[0].norm1(x), at)
        keys.append(k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    scores = q[:, :, P:] @ torch.cat([*(k[:, :, :P] for k in keys), keys[0][:, :, P:]], 2).mT / q.shape[-1] ** 0.5
    seen = torch.ones(T, len(pool) * P + T).tril(len(pool) * P).bool()
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)[..., :len(pool) * P]
    return p.mean((0, 1, 2)).view(len(pool), P).mean(1).tolist()


def test_what_cannot_be_read_is_one_line(tmp_path, run, capsys):
    save_adapter(tmp_path / "adapter", gpt(), "idp", [torch.zeros(2, 32)])
    save(gpt(seed=1), tmp_path / "1.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    for args, said in (([tmp_path / "x.gguf"], "version 0"), ([tmp_path / "x.gguf", "--tensors"], "version 0"),
                       ([tmp_path / "nowhere"], "No such file"), ([tmp_path], "config.json: No such file"),
                       ([tmp_path / "adapter", "--base", tmp_path / "1.safetensors"], "made for the base"),
                       ([TRAINED, "--text", ""], "--text must not be empty"),
                       ([tmp_path / "adapter", "--base", tmp_path / "nowhere"], "No such file")):
        with pytest.raises(SystemExit) as stop:
            run(*args)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("checkpoints: ") and err.count("\n") == 1 and said in err, err
