"""
A device that is not there: tensors that say they are on another device, compute on the CPU, and refuse to meet CPU
tensors.

    with Elsewhere():
        model = GPT(config).to(ELSEWHERE)             # or any factory function with device=ELSEWHERE
        model(torch.tensor(ids, device=ELSEWHERE))    # the numbers are those of the CPU
        model(torch.tensor(ids))                      # RuntimeError: on the CPU

What torch's own FakeTensorMode does for GPUs that are not there, with values: so `.item()` works, loops end, and
results can be compared with the CPU's. It is stricter than a GPU, which would take indices from the CPU and wait for
them. The device calls itself "meta", since torch without CUDA refuses to move anything to "cuda".
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")


class There(torch.Tensor):
    """A tensor elsewhere; `here` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, here):
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), here.storage_offset(),
                                                   dtype=here.dtype, device=ELSEWHERE, requires_grad=False)
        made.here = here
        return made

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While open, factory functions and `.to` with device=ELSEWHERE make tensors with values."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    """One operation on the CPU's values; its result is elsewhere if its inputs were, or if it was asked to be."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, There) for x in given)
    if there and operation not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        for x in given:
            if x.dim() and not isinstance(x, There):
                raise RuntimeError(f"{operation}: a tensor of shape {tuple(x.shape)} is on the CPU, "
                                   "others are elsewhere")
    if kwargs.get("device") is not None:
        there, kwargs = torch.device(kwargs["device"]) == ELSEWHERE, {**kwargs, "device": torch.device("cpu")}
    out = operation(*tree_map(here, args), **tree_map(here, kwargs))
    same = {id(here(x)): x for x in given}  # what was changed in place is returned as it was given
    return tree_map(lambda x: x if not isinstance(x, torch.Tensor) else same.get(id(x)) if id(x) in same
                    else There(x) if there else x, out)


def here(x):
    return x.here if isinstance(x, There) else x
