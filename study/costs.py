"""
What a model costs: bits a weight, bytes on disk, extra parameters, and the time of one question.
"""
import os
import statistics
import time

import torch

from recover import shape_of
from world.score import answer


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


def milliseconds(run, subjects):
    """Median milliseconds to answer one question, alone, {id: ms}; the subjects take turns."""
    fact, took = run.world.facts("heldout", 1)[:1], {s.about["id"]: [] for s in subjects}
    for _ in range(run.config.timing_rounds):
        for subject in subjects:
            began = time.perf_counter()
            answer(subject, fact, run.world.encoding)
            took[subject.about["id"]].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(t) for name, t in took.items()}
