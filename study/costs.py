"""
What a model costs: bits a weight, bytes on disk, extra parameters.

What it leaves out: time, which docs/speed.md is about. The study answers on weights unpacked once.
"""
import os

import torch

from engine.wrapping import shape_of


def costs(subject):
    """What a subject takes: bits a weight of the blocks' linear layers, bytes on disk, extra parameters."""
    bits = weights = 0
    for layer in subject.model.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            zeros = int((layer.weight == 0).sum())
            mask = layer.weight.numel() if zeros > layer.weight.numel() / 32 else 0  # as `save` stores it
            bits += mask + 32 * (layer.weight.numel() - (zeros if mask else 0))
            weights += layer.weight.numel()
        elif shape_of(layer):  # packed
            bits += 8 * sum(t.nbytes for t in layer.buffers())
            weights += layer.in_features * layer.out_features
    stored = subject.about.get("bytes") or os.path.getsize(subject.about["path"])
    return {"bits_per_weight": bits / weights, "bytes": stored + 4 * subject.about["extra"],
            "extra_parameters": subject.about["extra"]}
