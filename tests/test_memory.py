"""study/memory.py: parameters and activations counted by hand for small shapes; the published sizes of the paper's
models. engine/memory.py: whether freed memory stays."""
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from study import memory
from model import GPT, GPTConfig


@pytest.mark.parametrize("name, billions", [("llama-7b", 6.738), ("opt-6.7b", 6.658), ("smollm2-135m", 0.1345)])
def test_shapes_have_the_published_numbers_of_parameters(name, billions):
    assert memory.on_meta(memory.SHAPES[name]).n_parameters() / 1e9 == pytest.approx(billions, rel=1e-3)


def test_what_autograd_keeps_is_what_a_real_run_keeps():
    """Oracle: three layers with memory, counted directly. Attention without memory keeps the whole T x T matrices."""
    config = GPTConfig(vocab_size=300, n_layer=3, n_embd=32, n_head=2)
    model, B, T, P = GPT(config), 2, 16, 4
    for p in model.parameters():
        p.requires_grad_(False)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(t):
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes(), t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x = model.hidden(torch.zeros(B, T, dtype=torch.long), torch.zeros(P, 32).requires_grad_())
    real, counted = sum(n for n, _ in kept.values()), memory.kept_by_autograd(config, B, T, P)
    attention = 3 * B * config.n_head * (T + P) ** 2 * 4 * 3  # weights, mask, what the softmax keeps: at most
    assert real <= counted <= real + attention and x.requires_grad


def test_formulas_worked_by_hand():
    """One layer, width 8, 4 x 8 hidden: Pb = 4 * 64 + 2 * 256; float32 holds 4 bytes a parameter."""
    config = GPTConfig(vocab_size=300, n_layer=1, n_embd=8, n_head=1)
    steps = memory.bytes_by_step(config, calibration=(2, 4), batch=(1, 4), prompt=2, rank=1, bits=3, group=64)
    Pb, hidden = 4 * 64 + 2 * 8 * 32, 32
    values = list(steps.values())
    assert values[0] == 4 * (Pb + 300 * 8 + 3 * 8)
    assert values[1] == int(4 * (300 * 8 + 3 * 8) + Pb * (3 + 40 / 64) / 8
                            + 4 * 2 * 4 * 8 + 4 * 2 * 4 * (8 * 8 + 4 * hidden)
                            + 8 * (3 * 64 + hidden ** 2) + 28 * hidden ** 2)
    lora = 4 * (8 + 8) + 2 * (8 + hidden)
    kept = memory.kept_by_autograd(config, 1, 4, 0, 1)
    assert values[3] == 4 * Pb + kept + 12 * 4 * 300 + 16 * lora


def test_the_job_prints_a_row_a_step(capsys):
    memory.main(["--shape", "llama-7b", "--dtype", "bfloat16"])
    assert capsys.readouterr().out.count("|\n") == 6


def test_the_documented_table_is_what_the_job_prints():
    """Of three models, in docs/real-model.md."""
    shapes = ("smollm2-135m", 4), ("llama-7b", 2), ("opt-6.7b", 2)
    needs = [memory.bytes_by_step(memory.SHAPES[name], itemsize) for name, itemsize in shapes]
    written = (Path(__file__).parent.parent / "docs" / "real-model.md").read_text(encoding="utf-8")
    for step in needs[0]:
        assert f"| {step} | {' | '.join(f'{of[step] / 1e9:.2f}' for of in needs)} |" in written


FAULTS = """
import resource, sys
import torch
import recover
from engine.memory import keep_memory
from model import GPT, GPTConfig

if sys.argv[1] == "kept":
    keep_memory()
model = GPT(GPTConfig(vocab_size=1000)).init_weights(torch.Generator().manual_seed(0))
rows, faults = torch.zeros(32, 33, dtype=torch.long), []
for _ in range(4):  # the first steps are the ones that ask for the memory
    recover.fit(model, [model.wte.weight], [rows], recover.objective(model), recover.FitConfig(steps=10))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[3] - faults[2]) // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the C library of Linux")
def test_a_training_step_maps_no_page_again_once_memory_is_kept():
    """Pages mapped in a step: a thousand and more where memory is given back, a few where it is kept."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    kept, given_back = (int(subprocess.run([sys.executable, "-c", FAULTS, how], cwd=root, capture_output=True,
                                           text=True, check=True).stdout) for how in ("kept", "given back"))
    assert kept < given_back / 3, (kept, given_back)
