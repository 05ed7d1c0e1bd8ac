"""
Trained layers in the place of frozen ones: finding them, putting them in, taking them out.

A wrapper holds the layer that it stands for as `base`. Nothing here knows what it adds (recover.py).
"""
import copy

import torch.nn as nn

# every linear layer of a block, by the last part of its name; a model may have no gate
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class Wrapper(nn.Module):
    """A layer that stands in the place of another, `base`."""

    def __init__(self, base):
        super().__init__()
        self.base = base


def shape_of(layer):
    """(in, out) of a linear layer, plain or packed; None for any other module."""
    n_in, n_out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return None if n_in is None or n_out is None else (n_in, n_out)


def last(name):
    """The last part of a layer's name."""
    return name.rpartition(".")[2]


def check_bare(model):
    """ValueError for a model that has LoRA or biases beside its layers already."""
    if wrapped(model):
        raise ValueError("the model has LoRA or biases already: merge or remove them first")


def wrap(model, targets, make):
    """Replace each linear layer of the blocks whose last name is in `targets` by make(layer); returns the new ones, in
    the order of `named_modules`.

    targets  last parts of names, ("q", "v") or "q v"
    Raises ValueError where there is no such layer, and for a model with wrappers in it already.
    """
    targets = targets.split() if isinstance(targets, str) else targets
    check_bare(model)
    found = {name: layer for name, layer in model.blocks.named_modules() if last(name) in targets and shape_of(layer)}
    unknown = set(targets) - set(LINEARS) - set(map(last, found))
    if unknown or not found:
        raise ValueError(f"no linear layer is named {' or '.join(sorted(unknown) or targets)}")
    layers = []
    for name, base in found.items():
        device = next(iter([*base.parameters(), *base.buffers()])).device
        layers.append(make(base).to(device))
        model.blocks.set_submodule(name, layers[-1])
    return layers


def wrapped(model, kind=Wrapper):
    """{name: layer} of the wrappers of this kind in `model`, in the order in which its layers were made: model.py makes
    a block's in the order in which they run."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


def with_tensor(layer, name, value):
    """A copy of the layer with one tensor replaced: other models may share the given layer."""
    new = copy.copy(layer)
    new._parameters, new._buffers = dict(layer._parameters), dict(layer._buffers)
    if name in new._buffers:  # of a packed layer, which has nothing to train
        new._buffers[name] = value
    else:
        new._parameters[name] = nn.Parameter(value, layer.weight.requires_grad)
    return new


def shared_copy(model):
    """A copy of the model whose tensors are the same: modules can be wrapped in it without touching the given one."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})
