"""python -m checkpoints: what it says of every kind of file, and one line where it cannot."""
import re
import sys

import pytest
import torch

from checkpoint_files import HERE, gguf_bytes, tiny_gguf, write_folder
from checkpoints import __main__ as job
from checkpoints import save
from checkpoints.adapters import save_adapter
from compress import compress
from engine.script import guard
from model import GPT, GPTConfig

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
