"""
How much faster a repair's step is when it is recorded as a CUDA graph (engine/graphs.py), in SmolLM2-135M's shape.

    python tests/bench_graphs.py                 # two minutes on a GPU
    python tests/bench_graphs.py --layers 2      # a shorter model

The same steps with and without the recording take turns, each a whole training of --steps steps with its start and its
recording; a ratio is the median over rounds of the ratio within a round. The last column is the largest difference
between what the two trained: 0 where they are the same to the last bit.
"""
import argparse
import dataclasses
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from engine.script import guard  # noqa: E402  the path comes first, and this before torch

import torch  # noqa: E402

import recover  # noqa: E402
from engine.device import add_device, device_of  # noqa: E402
from model import GPT  # noqa: E402
from study import repairs  # noqa: E402
from study.memory import SHAPES  # noqa: E402

KINDS = {"biases": ("bias", "o down"), "gains": ("gains", None), "prompt 16": ("prompt", 16),
         "prompt 64": ("prompt", 64), "IDP 4 x 16": ("idp", (4, 16, "together")), "LoRA rank 8": ("lora", 8)}


def main():
    """The script: see the top of this file, and --help."""
    parser = argparse.ArgumentParser(description="A repair's step, plain and recorded as a CUDA graph.")
    parser.add_argument("--layers", type=int, default=30, help="of the model")
    parser.add_argument("--steps", type=int, default=30, help="of each training, of 16 rows of 24 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    add_device(parser)
    parser.set_defaults(device="cuda")
    args = parser.parse_args()
    device, dtype = device_of(args)
    if device.type != "cuda":
        raise ValueError(f"--device {args.device}: only steps on a GPU are recorded")
    generator = torch.Generator().manual_seed(0)
    model = GPT(dataclasses.replace(SHAPES["smollm2-135m"], n_layer=args.layers)).init_weights(generator)
    model = model.requires_grad_(False).to(device, dtype)
    ids = torch.randint(model.config.vocab_size, (args.steps, 16, 25), generator=generator)
    batches = recover.add_targets(model, list(ids.to(device)))
    for p in model.blocks.parameters():
        p.mul_(0.9)  # a student that is its own teacher has rounding errors for gradients
    fit, record = recover.FitConfig(steps=args.steps, lr=1e-2), repairs.recorded
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {args.layers} layers, {args.steps} steps")
    print(f"{'':12s} {'plain s':>8s} {'recorded s':>10s} {'ratio':>6s} {'differ':>7s}")
    for name, (kind, size) in KINDS.items():
        took, far = [], 0.0
        for _ in range(args.rounds):
            made, seconds = [], []
            for how in (lambda loss, parameters, batch: loss, record):
                repairs.recorded, began = how, time.perf_counter()
                made.append(repairs.train_repair(model, kind, size, batches, recover.distillation, fit, 0))
                torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - began)
            took.append(seconds)
            far = max(far, *(float((a - b).abs().max().detach()) for a, b in zip(*made)))
        plain, recorded = (statistics.median(s) for s in zip(*took))
        ratio = statistics.median(a / b for a, b in took)
        print(f"{name:12s} {plain:8.2f} {recorded:10.2f} {ratio:6.1f} {far:7.1g}", flush=True)


if __name__ == "__main__":
    guard(main)
