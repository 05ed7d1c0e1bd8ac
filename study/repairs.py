"""
Every repair of the study, trained on a frozen compressed model, and the Subject that comes of it.
"""
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch

import idp
import recover
from engine.graphs import recorded
from engine.products import Linear
from engine.wrapping import shared_copy
from kernels import PackedLinear
from world.score import Subject, always, answer

POOL_LOSSES = {"together": idp.side_by_side, "joint": idp.joint, "competitive": idp.competitive,
               "selected": idp.selected}
INSIDE = ("lora", "bias", "correction", "gains")  # repairs that stand inside the model; the others stand in front


def train_repair(model, kind, size, batches, losses, fit_config, seed, progress=None, bfloat16=False):
    """Train one repair of the frozen `model` -> its tensors. `losses` is recover.next_token or recover.distillation.

    bfloat16  matrix products in bfloat16, all else and what is trained in float32: faster where the CPU has them
    """
    with products(model.wte.weight.device, bfloat16):
        return trained(unpacked(model), kind, size, batches, losses, fit_config, seed, progress)


@contextmanager
def products(device, bfloat16):
    """How matrix products of training are computed while this is open: in bfloat16, or as they come, on a GPU in TF32
    (float32 with 10 bits of mantissa in place of 23: 8 times as fast)."""
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        # a cached cast would outlive the step that changes what was cast
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if bfloat16 else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def trained(model, kind, size, batches, losses, fit_config, seed, progress):
    """The body of `train_repair`, on float weights."""
    generator = torch.Generator().manual_seed(seed)

    def fit(parameters, loss, config=fit_config):
        recover.fit(model, parameters, batches, recorded(loss, parameters, batches[0]), config, progress=progress)
    if kind in INSIDE:
        parameters = add_inside(model, kind, size, generator)
        fit(parameters, recover.objective(model, losses))
        return parameters
    if kind == "prefix":
        prefix = recover.Prefix(recover.prefix_init(model, recover.prompt_init(model, size, generator=generator)))
        fit([prefix.weight], recover.objective(lambda ids: model(ids, cache=prefix.cache(model, *ids.shape)), losses))
        return [prefix.weight]
    M, P, way = size if kind == "idp" else (1, size, "together")
    prompts = [recover.prompt_init(model, P, generator=generator) for _ in range(M)]
    probe = torch.zeros(M, model.config.n_embd, device=model.wte.weight.device) if way == "selected" else None
    pool = idp.PromptPool(prompts, probe)
    fit(list(pool.parameters()), POOL_LOSSES[way](model, pool, losses),
        replace(fit_config, clip_each=way == "together"))  # each prompt learns as it would alone
    return [*pool.prompts] + ([pool.probe] if way == "selected" else [])


def add_inside(model, kind, size, generator=None):
    """Put a repair that stands inside the model into it; returns its tensors."""
    if kind == "lora":
        rank, targets = lora_size(size)
        return recover.add_lora(model, rank, targets=targets, generator=generator)
    return recover.own_gains(model) if kind == "gains" else recover.add_biases(model, size)


def lora_size(size):
    """(rank, targets) of a LoRA's size: a rank, for every linear layer, or (rank, "q v")."""
    return (size, recover.LINEARS) if isinstance(size, int) else (size[0], tuple(size[1].split()))


def attach(model, kind, size, tensors):
    """The Subject that a trained repair makes of `model`."""
    if kind in INSIDE:
        model = shared_copy(model)
        with torch.no_grad():
            for p, trained in zip(add_inside(model, kind, size), tensors):
                p.copy_(trained)
        recover.merge_biases(model)
        return Subject(model)
    if kind == "prefix":
        with torch.no_grad():
            return Subject(model, recover.Prefix(tensors[0]).cache(model, 1, 0))
    return pool_subject(model, make_pool(kind, size, tensors))


def make_pool(kind, size, tensors):
    """The pool of a trained prompt or pool: its prompts and, of one that was trained with it, its probe."""
    M = size[0] if kind == "idp" else 1
    return idp.PromptPool(tensors[:M], *tensors[M:])


def pool_subject(model, pool):
    """The Subject of a pool under the paper's rule, or its probe if it has one; one prompt leaves nothing to choose."""
    with torch.no_grad():
        filled = idp.prefill(model, pool)
    return Subject(model, filled, partial(idp.choose, model, pool, filled=filled) if len(pool) > 1 else always(0))


def light(subject):
    """The same Subject on weights that are unpacked once: the same numbers, without unpacking at every product."""
    return replace(subject, model=unpacked(subject.model))


def answers(subject, asked, encoding):
    """{split: what the subject answers} to asked {split: facts}, on weights that are unpacked once."""
    subject = light(subject)
    return {split: answer(subject, facts, encoding) for split, facts in asked.items()}


def unpacked(model):
    """A shared copy whose packed layers are float ones of the same values: unpacked once, not at every step."""
    model = shared_copy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            weight = layer.packed.dequantize().to(model.wte.weight.dtype)
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                plain.bias = torch.nn.Parameter(layer.bias.to(weight.dtype), requires_grad=False)
            model.set_submodule(name, plain)
    return model
