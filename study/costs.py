"""
What a model costs: bits a weight, bytes on disk, extra parameters.

What it leaves out: time, which docs/speed.md is about. The study answers on weights unpacked once.
"""
import os

import torch

from engine.wrapping import shape_of


def costs(subject):
    """What a subject takes: bits a weight of the blocks' linear layers, bytes on disk, extra parameters."""
    bits = weights = 0  # without the layers' biases
    for name, layer in subject.model.blocks.named_modules(prefix="blocks"):
        if isinstance(layer, torch.nn.Linear):
            stored = numel = layer.weight.numel()
            if name.removesuffix(".base") in subject.model.pruned:  # `save` stores a bit each, and the others
                stored -= int((layer.weight == 0).sum())
                bits += numel
            bits += 8 * layer.weight.itemsize * stored
            weights += numel
        elif shape_of(layer):  # packed
            bits += 8 * sum(t.nbytes for part, t in layer.named_buffers() if part != "bias")
            weights += layer.in_features * layer.out_features
    file = subject.about.get("bytes") or os.path.getsize(subject.about["path"])
    return {"bits_per_weight": bits / weights, "bytes": file + 4 * subject.about["extra"],
            "extra_parameters": subject.about["extra"]}
