"""checkpoints/compression.py: `python compress.py --in MODEL --text FILE ...`, what it reads, writes, and refuses.

    python -m pytest tests/test_compression.py
"""
import os
import pathlib
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import compress as compress_module
from checkpoints import load, save
from checkpoints.compression import compress_files, default_name, option_parser, parameters, read_rows
from checkpoints.vocabulary import make_encoding, save_ranks
from compress import compress
from engine.settings import CompressConfig
from model import GPT, GPTConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
RANKS = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257}
TEXT = "the cat sat on the mat, and the rat ate the hat. " * 40


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of ours, its vocabulary beside it, and a text."""
    sizes = dict(vocab_size=259, context=48, n_layer=2, n_head=2, n_embd=32, n_hidden=64)
    save(GPT(GPTConfig(**sizes)).init_weights(torch.Generator().manual_seed(0)), tmp_path / "a.safetensors")
    save(GPT(GPTConfig(**sizes)).init_weights(torch.Generator().manual_seed(1)), tmp_path / "b.safetensors")
    save_ranks(RANKS, tmp_path / "tokens.tiktoken")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(folder, *arguments, source="a.safetensors", text="text.txt"):
    compress_files(["--in", str(folder / source), "--text", str(folder / text), *map(str, arguments)], compress)


def files(folder):
    return {p.name for p in folder.iterdir()} - {"a.safetensors", "b.safetensors", "tokens.tiktoken", "text.txt"}


def test_the_job_is_compress_on_the_rows_of_the_text(folder, capsys):
    run(folder, "--bits", 3, "--group-size", 16, "--act-order", "--out", folder / "new")
    ids = torch.tensor(make_encoding(RANKS).encode_ordinary(TEXT))
    ids = ids[:len(ids) // 48 * 48].view(-1, 48)  # the context is shorter than 128 tokens
    new, report = compress(load(folder / "a.safetensors"), ids, "gptq", bits=3, group_size=16, act_order=True)
    assert torch.equal(load(folder / "new")(ids), new(ids))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 + len(report) and f"{len(ids)} rows of 48 tokens" in printed[0]
    assert [line.split()[0] for line in printed[2:-2]] == [r["name"] for r in report]
    size = os.path.getsize(folder / "new")
    assert f"{size:,} bytes" in printed[-1] and f"{new.n_parameters() + 16384:,} parameters" in printed[-1]


@pytest.mark.parametrize("arguments", [
    ["--method", "rtn", "--bits", "4", "--symmetric"], ["--bits", "3", "--search", "--refit"],
    ["--bits", "3", "--damp", "0.1", "--block-size", "16", "--keep-zeros"], ["--method", "wanda", "--n-m", "2", "4"],
    ["--method", "magnitude", "--sparsity", "0.5"],
    ["--method", "sparsegpt", "--sparsity", "0.5", "--bits", "4", "--targets", "mlp.down", "blocks.0.attn.q"]])
def test_every_setting_reaches_compress(folder, arguments, monkeypatch):
    seen = []

    def watching(model, ids, **settings):
        settings.pop("progress")
        seen.append(CompressConfig(**settings))
        return compress(model, ids, **settings)
    compress_files(["--in", str(folder / "a.safetensors"), "--text", str(folder / "text.txt"), *arguments], watching)
    args = option_parser().parse_args(arguments)
    for name, value in asdict(seen[0]).items():
        given = getattr(args, name)
        assert value == (tuple(given) if isinstance(given, list) else given)
    assert seen[0] != CompressConfig("gptq", bits=3)


def test_two_checkpoints_and_two_settings_are_four_files(folder):  # C10
    for source in ("a.safetensors", "b.safetensors"):
        run(folder, "--bits", 3, source=source)
        run(folder, "--method", "sparsegpt", "--n-m", 2, 4, source=source)
    assert files(folder) == {f"{m}-{s}.safetensors" for m in "ab" for s in ("gptq-bits3", "sparsegpt-nm2-4")}
    ids = torch.zeros(1, 4, dtype=torch.long)
    first, other = (load(folder / f"{m}-gptq-bits3.safetensors")(ids) for m in "ab")
    assert not torch.equal(first, other)
    before = (folder / "a-gptq-bits3.safetensors").read_bytes()
    with pytest.raises(ValueError, match="a-gptq-bits3.safetensors is there already: name another"):
        run(folder, "--bits", 3)  # or was it made of another a.safetensors?
    run(folder, "--bits", 3, "--out", folder / "a-gptq-bits3.safetensors")  # by name, it is replaced
    assert (folder / "a-gptq-bits3.safetensors").read_bytes() == before


def test_no_two_settings_share_a_name():
    given = [dict(method="gptq", bits=3), dict(method="gptq", bits=4), dict(method="gptq", bits=3, group_size=4),
             dict(method="gptq", bits=3, search=True), dict(method="gptq", bits=3, refit=True),
             dict(method="gptq", bits=3, act_order=True), dict(method="gptq", bits=3, damp=0.1),
             dict(method="gptq", bits=3, block_size=4), dict(method="gptq", bits=3, symmetric=True),
             dict(method="gptq", bits=3, keep_zeros=True), dict(method="gptq", bits=3, targets=("mlp.up",)),
             dict(method="gptq", bits=3, targets=("mlp.up", "attn.q")), dict(method="rtn", bits=3),
             dict(method="wanda", n_m=(2, 4)), dict(method="wanda", sparsity=0.24),
             dict(method="wanda", n_m=(2, 4), bits=3)]
    names = [default_name(f"out/{m}", CompressConfig(**g)) for g in given for m in ("m.safetensors", "m.gguf", "m/")]
    assert len(set(names)) == len(names) - len(given)  # m.safetensors and the folder m: the second is refused
    assert all(os.path.dirname(name) == "out" for name in names)


def test_the_folder_that_one_is_in_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "model" / "inside").mkdir(parents=True)
    for here, path in (("model", "."), ("model", "./"), ("model/inside", ".."), ("model", "inside/..")):
        monkeypatch.chdir(tmp_path / here)
        assert default_name(path, CompressConfig("rtn", bits=4)) == str(tmp_path / "model-rtn-bits4.safetensors")


def test_sizes_count_packed_parameters(folder, capsys):  # C5
    run(folder, "--bits", 4, "--targets", "attn.q", "attn.k", "attn.v", "--out", folder / "half")
    run(folder, "--bits", 3, "--out", folder / "whole", source="half")
    printed = capsys.readouterr().out
    dense = load(folder / "a.safetensors").n_parameters()
    assert printed.count(f"{dense:,} parameters") == 4
    assert parameters(load(folder / "whole")) == parameters(load(folder / "half")) == dense


def test_the_result_has_the_dtype_of_the_checkpoint(folder):  # C6
    for dtype in (torch.bfloat16, torch.float16):
        save(load(folder / "a.safetensors").to(dtype), folder / "small.safetensors")
        for i, settings in enumerate((["--method", "magnitude", "--sparsity", "0.5"], ["--bits", "4"],
                                      ["--method", "wanda", "--n-m", "2", "4"])):
            out = folder / f"small-{dtype}-{i}"
            run(folder, *settings, "--out", out, source="small.safetensors")
            new, old = load(out), load(folder / "small.safetensors")
            assert new.wte.weight.dtype == dtype and torch.equal(new.wte.weight, old.wte.weight)
            assert bool(new(torch.zeros(1, 4, dtype=torch.long)).isfinite().all())


GOOD = ["--in", "a.safetensors", "--text", "text.txt", "--bits", "3"]  # accepted; an option given again replaces these
REFUSED = {  # what: (arguments, what the line says)
    "no model": (["--text", "text.txt", "--bits", "3"], "give --in MODEL and --text FILE"),
    "no text": (["--in", "a.safetensors", "--bits", "3"], "give --in MODEL and --text FILE"),
    "no bits": (["--in", "a.safetensors", "--text", "text.txt"], "gptq needs bits"),
    "bits out of range": ([*GOOD, "--bits", "9"], "from 2 to 8, got 9"),
    "a model that is not there": ([*GOOD, "--in", "c.safetensors"], "c.safetensors: No such"),
    "a text that is not there": ([*GOOD, "--text", "no.txt"], "no.txt: No such"),
    "a text that is a folder": ([*GOOD, "--text", "."], ".: Is a directory"),
    "an empty text": ([*GOOD, "--text", "empty.txt"], "empty.txt: no text in it"),
    "a text that is not UTF-8": ([*GOOD, "--text", "latin.txt"], "not UTF-8 at byte 3"),
    "no vocabulary": ([*GOOD, "--in", "alone/a.safetensors"], "no tokenizer beside it"),
    "a model that is a text": ([*GOOD, "--in", "text.txt"], "text.txt:"),
    "no rows": ([*GOOD, "--rows", "0"], "--rows must be at least 1"),
    "the model itself": ([*GOOD, "--out", "./a.safetensors"], "is the checkpoint to compress"),
    "a folder that is not there": ([*GOOD, "--out", "no/x"], "no/x"),
    "a folder": ([*GOOD, "--out", "alone"], "alone"),
    "a target that is none": ([*GOOD, "--targets", "mlp.x"], "mlp.x"),
    "a setting that the method lacks": ([*GOOD, "--method", "rtn", "--refit"], "rtn has no setting refit"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_one_line(folder, what, monkeypatch, capsys):
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (folder / "alone").mkdir()
    (folder / "alone" / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    there = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    arguments, message = REFUSED[what]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["compress.py", *arguments])
    with pytest.raises(SystemExit) as left:
        compress_module.guard(compress_module.main)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("compress.py: ") and message in said and said.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == there  # and nothing was written


def test_the_text_in_rows(folder):
    encoding = make_encoding(RANKS)
    ids = encoding.encode_ordinary(TEXT)
    assert read_rows(folder / "text.txt", encoding, 3, 16).tolist() == [ids[16 * i:16 * i + 16] for i in range(3)]
    assert read_rows(folder / "text.txt", encoding, 10**6, 100).shape == (len(ids) // 100, 100)
    assert read_rows(folder / "text.txt", encoding, 5, 10**5).tolist() == [ids]  # shorter than a row
    (folder / "long.txt").write_text("x" * 10**6)  # what is not needed is not tokenized
    assert read_rows(folder / "long.txt", encoding, 2, 8).shape == (2, 8)


def test_alone_it_is_a_lesson_that_needs_nothing_above():
    """A fresh process, an empty folder: seconds, no file, and the loss of Algorithm 1 equals the error it made."""
    probe = ("import runpy, sys; sys.argv = ['compress.py']; runpy.run_path('compress.py', run_name='__main__'); "
             "print(sorted(m for m in sys.modules if m.split('.')[0] in ('checkpoints', 'world', 'study', 'real')))")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.splitlines()[-1] == "[]"
    line = next(line for line in done.stdout.splitlines() if line.startswith("Algorithm 1"))
    loss, trace = (float(part.split("= ")[1].split(",")[0]) for part in line.split(", ")[1:])
    assert loss == pytest.approx(trace, rel=1e-6) and "0 of 6,144 codes differ" in done.stdout
    assert "next: python -m study compress" in done.stdout
