"""
This project's own checkpoints: one safetensors file a model, dense or compressed.

The metadata holds the GPTConfig and how to rebuild each layer that is no longer an nn.Linear. What it leaves out: LoRA
beside a model, which is a file of its own (adapters.py), and checkpoints of other families (weights.py).
"""
import json
import math
from dataclasses import asdict

import numpy as np
import torch
import torch.nn as nn

from checkpoints.vocabulary import to_json
from engine.safetensors import read_safetensors, write_safetensors
from engine.wrapping import shape_of
from kernels import from_spec
from model import GPT, GPTConfig


def save(model, path, encoding=None):
    """Write the model, compressed or not, to one safetensors file, whole or not at all.

    The metadata holds the config and how to rebuild each module that is no longer an nn.Linear (its `spec()`). The
    weight of a layer that `compress` pruned (`model.pruned`) is stored as one bit a weight and the values that remain,
    which is also how `load` knows it; a tied head is not stored twice. Raises ValueError, and writes nothing, for a
    model that `load` would not read.

    encoding  the model's vocabulary, to be kept in the file too: `read_model` gives it back
    """
    if any(name.endswith(".base") for name, _ in model.named_modules()):
        raise ValueError("a model with LoRA or biases beside its layers is not one checkpoint: save the adapter alone, "
                         "or merge it first")
    specs = {name: m.spec() for name, m in model.named_modules() if hasattr(m, "spec")}
    for name, spec in specs.items():
        try:
            with torch.device("meta"):
                from_spec(json.loads(json.dumps(spec)))
        except ValueError as error:  # `load` would refuse it
            raise ValueError(f"{name}: {error}") from None
    own_head = isinstance(model.lm_head, nn.Linear) and model.lm_head.weight is not model.wte.weight
    config = {**asdict(model.config), "tied": model.config.tied and not own_head}
    tensors = {}
    for name, t in model.state_dict().items():
        if name == "lm_head.weight" and config["tied"]:
            continue
        if name.removesuffix(".weight") in model.pruned:
            kept = t != 0
            tensors[name + ".bitmap"] = torch.from_numpy(np.packbits(kept.cpu().numpy()))
            tensors[name + ".values"] = t[kept]
        else:
            tensors[name] = t
    metadata = {"format": "pt", "config": json.dumps(config), "modules": json.dumps(specs)}
    write_safetensors(path, tensors, metadata if encoding is None else {**metadata, "vocabulary": to_json(encoding)})


def load(path):
    """Read what `save` wrote. Raises ValueError for a damaged or foreign file, OSError for a missing one; runs no
    pickle.
    """
    tensors, metadata = read_safetensors(path)
    try:
        fields = json.loads(metadata["config"])
        check_config(fields)
        config = GPTConfig(**fields)
        specs = json.loads(metadata["modules"])
        if not isinstance(specs, dict):
            raise ValueError("modules is not an object")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no usable model configuration in the file ({error})") from None
    return assemble(config, tensors, specs, path)


def check_config(fields):
    """Raise ValueError for what a file may hold and no program writes: GPTConfig fields of the wrong type, or numbers
    for which there is no memory."""
    if not isinstance(fields, dict):
        raise ValueError(f"the configuration is not an object but {fields!r}")
    for name in ("vocab_size", "context", "n_layer", "n_head", "n_embd", "n_kv_head", "n_hidden", "position_offset"):
        value = fields.get(name)
        if value is not None and (type(value) is not int or not 0 <= value <= 2**24):
            raise ValueError(f"{name} must be an integer in [0, {2**24}], got {value!r}")
    for name in ("norm_eps", "rope_theta"):
        value = fields.get(name, 1)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    scaling, keys = fields.get("rope_scaling"), ("factor", "low_freq_factor", "high_freq_factor", "original_context")
    if scaling is not None and not (isinstance(scaling, dict)
                                    and all(type(scaling.get(k)) in (int, float) and scaling[k] > 0 for k in keys)):
        raise ValueError(f"rope_scaling must hold positive numbers for {', '.join(keys)}, got {scaling!r}")


def assemble(config, tensors, specs=None, path="checkpoint"):
    """A GPT of `config` from {name: tensor}; missing, surplus and misshapen tensors are named in the ValueError."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = GPT(config)
    for name, spec in (specs or {}).items():
        try:
            packed, plain = from_spec(spec), model.get_submodule(name)
            if shape_of(packed) != shape_of(plain):
                raise ValueError(f"(in, out) is {shape_of(packed)}, the model needs {shape_of(plain)}")
            model.set_submodule(name, packed, strict=True)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{path}: module {name!r}: {error}") from None
    expected = model.state_dict()
    tensors = {name: t.clone() for name, t in tensors.items()}  # out of the mapped file
    pruned = [n[:-len(".bitmap")] for n in tensors if n.endswith(".bitmap")]
    for name in pruned:
        bitmap, values = tensors.pop(name + ".bitmap"), tensors.pop(name + ".values", torch.empty(0))
        shape = expected[name].shape if name in expected else (0,)
        if bitmap.dtype != torch.uint8:
            raise ValueError(f"{path}: {name}: a bitmap of {bitmap.dtype}")
        kept = torch.from_numpy(np.unpackbits(bitmap.numpy())[:math.prod(shape)]).bool()
        if not values.is_floating_point() or kept.numel() != math.prod(shape) or int(kept.sum()) != values.numel():
            raise ValueError(f"{path}: {name}: its bitmap and its values disagree")
        tensors[name] = torch.zeros(math.prod(shape), dtype=values.dtype).masked_scatter_(kept, values).view(shape)
    if config.tied and "lm_head.weight" in expected and "wte.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["wte.weight"])
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        raise ValueError(f"{path}: missing tensors {missing[:4]}, surplus tensors {surplus[:4]}")
    for name, t in tensors.items():
        if t.shape != expected[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(t.shape)}, "
                             f"the model needs {tuple(expected[name].shape)}")
        if t.dtype != expected[name].dtype and not (t.is_floating_point() and expected[name].is_floating_point()):
            raise ValueError(f"{path}: {name} is of {t.dtype}, the model needs {expected[name].dtype}")
        if t.is_floating_point() and not t.isfinite().all():
            raise ValueError(f"{path}: {name} has weights that are not finite numbers")
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie()
    model.pruned = frozenset(name.removesuffix(".weight") for name in pruned)
    return model
