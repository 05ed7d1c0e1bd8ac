"""
Repair of a compressed model: a few trained parameters inside it or in front of it, and the one
training loop for all.

    LoRA            y = W x + (alpha / rank) B A x         Hu et al. 2021, arXiv 2106.09685, 4.1
    biases          y = W x + b, in `o` and `down`         Zimmer et al. 2023, arXiv 2312.15230
    bias correction b = (W - W') E[x], no training         Nagel et al. 2019, arXiv 1906.04721, 4.2
    gains           the norms' own weights                 Zimmer et al. 2023
    prompt tuning   P free embeddings before the text      Lester et al. 2021, arXiv 2104.08691
    prefix tuning   P free keys and values in each layer   Li & Liang 2021, arXiv 2101.00190

The base stays frozen in all of them. `fit` trains any list of parameters on any loss: the next
token, or distillation, which asks for the dense model's distribution instead of the one token
that the text has (Hinton et al. 2015, arXiv 1503.02531). It trains the dense model too.

What it leaves out: quantized optimizers, gradient accumulation, LoRA's dropout, the MLP through
which Li & Liang train a prefix.

    python recover.py                    # a small model is damaged, and repaired in five ways
"""
import argparse
import copy
import math
import warnings
from dataclasses import dataclass

from engine.script import guard  # before torch: Ctrl-C is one line

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.losses import add_targets, distillation, next_token, objective
from engine.muon import make_optimizers
from engine.wrapping import LINEARS, Wrapper, with_tensor, wrap, wrapped
from model import GPT, Cache, GPTConfig


# ---- inside the model: layers that wrap a frozen layer

class LoRALinear(Wrapper):
    """A frozen layer and an update of low rank. B starts at zero: step 0 changes nothing."""

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__(base)
        self.scale = alpha / rank
        start = torch.rand(rank, base.in_features, generator=generator) * 2 - 1
        self.A = nn.Parameter(start / math.sqrt(base.in_features))  # (rank, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))  # (out, rank)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        down = F.linear(x.to(self.A.dtype), self.A)  # (..., rank)
        update = F.linear(down, self.B) * self.scale  # (..., out)
        return self.base(x) + update.to(x.dtype)

    def update(self):
        """The (out, in) matrix that this layer adds to its base's weight."""
        return self.scale * self.B @ self.A


class BiasLinear(Wrapper):
    """A frozen layer and a constant added to its output, zero at step 0."""

    def __init__(self, base):
        super().__init__(base)
        self.shift = nn.Parameter(torch.zeros(base.out_features))  # (out,)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        y = self.base(x)
        return y + self.shift.to(y.dtype)


def add_lora(model, rank, alpha=None, targets=LINEARS, generator=None):
    """Put LoRA beside every layer of the blocks named in `targets`, in place.

    rank     at least 1;  alpha  scales the update by alpha / rank (default: alpha = rank)
    targets  last parts of names, ("q", "v") or "q v"
    Returns the new parameters, A and B of each layer in turn. Raises ValueError for a rank below 1,
    a target that is no layer, and a model that has LoRA or biases already.
    """
    if rank < 1 or (alpha is not None and alpha <= 0):
        raise ValueError(f"rank must be at least 1 and alpha above 0, got {rank} and {alpha}")
    layers = wrap(model, targets, lambda base: LoRALinear(base, rank, alpha or rank, generator))
    return [p for layer in layers for p in (layer.A, layer.B)]


def add_biases(model, targets=("o", "down")):
    """Add a trainable constant to the output of every layer named in `targets`, in place.

    After `o` and `down` it is a constant added to the residual stream. Returns the new parameters;
    raises ValueError as `add_lora` does.
    """
    return [layer.shift for layer in wrap(model, targets, BiasLinear)]


def own_gains(model):
    """Give every norm of the model a weight of its own, in place: returns these parameters.

    Another model that shared its norms with this one keeps the old weights.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.RMSNorm, nn.LayerNorm))]
    for norm in norms:
        norm.weight = nn.Parameter(norm.weight.detach().clone())
    return [norm.weight for norm in norms]


@torch.no_grad()
def correct_biases(model, dense, ids, targets=("o", "down")):
    """`add_biases` without training: b = (W - W') E[x], in place; returns the parameters.

    model  the compressed one, W';  dense  what it was made of, W
    ids    (N, T) calibration tokens: E[x] is the mean over all of them of a layer's input, with the
           layers in front of it compressed and corrected already
    """
    shifts = add_biases(model, targets)
    x = model.embed(ids)  # (N, T, C)
    for block, original in zip(model.blocks, dense.blocks):
        for name, layer in wrapped(block, BiasLinear).items():  # as a block runs them
            plain, seen = original.get_submodule(name), []
            hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            block(x)
            hook.remove()
            mean = seen[0].flatten(0, 1).mean(0, keepdim=True)  # (1, in)
            layer.shift.copy_((plain(mean) - layer.base(mean))[0])  # old biases cancel or add up
        x = block(x)
    return shifts


@torch.no_grad()
def merge_lora(model, keep_zeros=False):
    """Add each update to the weight beside it and drop the wrapper, in place; no LoRA: nothing.

    Refused with a ValueError, and nothing is changed: a quantized layer, as rounding to its grid
    again loses most of a small update; one that `model.pruned` names, whose zeros the update would
    fill. With `keep_zeros` the update of such a layer is masked instead.
    Returns {layer name: share of the update's squared norm that the mask took away}.
    """
    layers = wrapped(model, LoRALinear)
    for name, layer in layers.items():
        if not isinstance(layer.base, nn.Linear):
            raise ValueError(f"{name} is stored in few bits or without its zeros: "
                             "merging would lose most of the update; keep LoRA beside it")
        if not keep_zeros and name in model.pruned:
            raise ValueError(f"{name} is pruned: merging would fill its zeros; pass "
                             "keep_zeros=True to merge under the mask and lose the rest")
    lost = {}
    for name, layer in layers.items():
        weight, update = layer.base.weight, layer.update()
        kept = torch.where(weight == 0, 0, update) if name in model.pruned else update
        taken = (update - kept).square().sum() / update.square().sum().clamp_min(1e-30)
        lost[name] = float(taken)
        merged = (weight + kept).to(weight.dtype)
        model.set_submodule(name, with_tensor(layer.base, "weight", merged))
    return lost


@torch.no_grad()
def merge_biases(model):
    """Add each constant to the bias of the layer it stands beside, in place, exactly: plain, pruned
    and packed layers alike.
    """
    for name, layer in wrapped(model, BiasLinear).items():
        base, merged = layer.base, layer.shift.clone()
        if base.bias is not None:
            merged = (base.bias + merged).to(base.bias.dtype)
        elif isinstance(base, nn.Linear):
            merged = merged.to(base.weight.dtype)
        model.set_submodule(name, with_tensor(base, "bias", merged))


def remove_lora(model):
    """Take every wrapper of LoRA off again, in place: the base as it was."""
    for name, layer in wrapped(model, LoRALinear).items():
        model.set_submodule(name, layer.base)


# ---- in front of the model: soft prompts and prefixes

class SoftPrompt(nn.Module):
    """P free vectors (P, C) in front of the text's embeddings: `model(ids, prompt=soft())`."""

    def __init__(self, init):
        super().__init__()
        self.weight = nn.Parameter(init.detach().clone())

    def forward(self):
        return self.weight


class Prefix(nn.Module):
    """Free keys and values of P positions in every layer, (L, 2, nkv, P, hs).

    `model(ids, cache=prefix.cache(model, B, T))` reads ids (B, T) behind it.
    """

    def __init__(self, init):
        super().__init__()
        self.weight = nn.Parameter(init.detach().clone())

    def cache(self, model, batch, slots):
        """A Cache of `batch` rows: the prefix, then `slots` free slots. Gradients reach it."""
        one = Cache(model.config, 1, self.weight.shape[3], self.weight.device)
        one.kv = [layer[:, None] for layer in self.weight]  # each (2, 1, nkv, P, hs)
        one.advance(one.slots)
        return one.repeat(torch.zeros(batch, dtype=torch.long, device=self.weight.device), slots)


@torch.no_grad()
def prompt_init(model, length, generator=None):
    """The first value (P, C) of a soft prompt: the embeddings of `length` random tokens."""
    if length < 1:
        raise ValueError(f"a prompt needs at least 1 token, got {length}")
    ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
    return model.wte(ids.to(model.wte.weight.device))  # (P, C)


@torch.no_grad()
def prefix_init(model, prompt):
    """The first value (L, 2, nkv, P, hs) of a prefix: what a prompt (P, C) leaves in each layer."""
    cache = model.new_cache(1, len(prompt))
    model.hidden(torch.empty(1, 0, dtype=torch.long, device=prompt.device), prompt, cache)
    return torch.stack([kv[:, 0] for kv in cache.kv])


# ---- the one training loop

@dataclass
class FitConfig:
    steps: int = 250
    lr: float = 1e-3            # AdamW's peak
    warmup: float = 0.05        # share of the steps that climb to it; then a cosine down to zero
    weight_decay: float = 0.0   # on matrices only
    betas: tuple = (0.9, 0.99)
    clip: float = 1.0           # largest norm of the whole gradient
    clip_each: bool = False     # of each parameter's own gradient instead
    muon: float = 0.0           # Muon's rate; above 0 it trains the matrices of the blocks

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.lr < math.inf:
            raise ValueError("steps must be at least 1 and lr above 0, "
                             f"got {self.steps} and {self.lr}")

    def rate(self, step):
        """The factor on the learning rates at `step`."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        x = (step - warm) / max(1, self.steps - warm)
        return 0.5 * (1 + math.cos(math.pi * x))


KEEP = 50  # steps between two copies of the parameters that `fit` can go back to


def fit(model, parameters, batches, loss=None, config=None, progress=None):
    """Train `parameters`, and nothing else, on `batches`; returns the losses, one a step.

    model       only for its frozen parameters: none of them gets a gradient while this runs
    batches     an iterable of what `loss` takes; a list is read again until config.steps are done
    loss        batch -> scalar, see `objective`; default: objective(model)
    progress    called with (step, loss) after every step
    A loss or a gradient that is not finite ends the training with a warning; the parameters go back
    to those of at most KEEP steps before, with which both were finite.
    """
    config, loss, parameters = config or FitConfig(), loss or objective(model), list(parameters)
    clipped = [[p] for p in parameters] if config.clip_each else [parameters]
    # freeze everything, then thaw what is trained
    before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
        p.grad = None
    optimizers = make_optimizers(model, parameters, config)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    losses, stream = [], iter(batches)
    good = [p.detach().clone() for p in parameters]
    try:
        for step in range(config.steps):
            # the next batch; a list that is through begins again
            batch = next(stream, None)
            if batch is None:
                stream = iter(batches)
                batch = next(stream, None)
            if batch is None:
                raise ValueError(f"no batch for step {step}: give a list, which is read again")
            # forward, backward, clip
            value = loss(batch)
            finite = bool(value.isfinite())
            if finite:
                value.backward()
                for together in clipped:
                    norm = torch.nn.utils.clip_grad_norm_(together, config.clip)
                    finite = finite and bool(norm.isfinite())
            if not finite:
                warnings.warn(f"the loss is {value.item()}, or its gradient not finite, at step "
                              f"{step}: training ends at the last good state")
                restore(parameters, good)
                break
            # these parameters are good: remember them now and then
            if step % KEEP == 0:
                good = [p.detach().clone() for p in parameters]
            # the step, at the scheduled rate
            for optimizer, lrs in zip(optimizers, peaks):
                for group, lr in zip(optimizer.param_groups, lrs):
                    group["lr"] = lr * config.rate(step)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(value.item())
            if progress:
                progress(step, losses[-1])
    finally:
        for p, wanted in before.items():
            p.requires_grad_(wanted)
    return losses


@torch.no_grad()
def restore(parameters, values):
    for p, value in zip(parameters, values):
        p.copy_(value)
        p.grad = None


def damage(model, bits):
    """A copy of the model, its blocks' weights rounded crudely: one scale for a whole matrix."""
    model = copy.deepcopy(model)
    for p in model.blocks.parameters():
        step = 2 * p.abs().max() / (2 ** bits - 1)
        p.data = (p / step).round() * step if p.dim() == 2 else p.data
    return model


def main():
    """The lesson: what a crude rounding takes from a small GPT, and what each repair restores."""
    parser = argparse.ArgumentParser(description="Damage a small GPT, and repair it in five ways.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, help="of the rounded weights, 2 to 8")
    bits = parser.parse_args().bits
    if not 2 <= bits <= 8:
        raise ValueError(f"--bits must be in [2, 8], got {bits}")
    # a GPT that knows one text by heart; a token is a character
    text, generator = __doc__.strip()[:600], torch.Generator().manual_seed(0)
    letters = sorted(set(text))
    rows = torch.tensor([letters.index(c) for c in text]).unfold(0, 33, 8)  # (rows, 33)
    dense = GPT(GPTConfig(vocab_size=len(letters), n_layer=2, n_embd=48)).init_weights(generator)
    fit(dense, dense.parameters(), [rows[0::2], rows[1::2]], config=FitConfig(80, 5e-3, muon=0.03))
    dense.requires_grad_(False)
    targets = add_targets(dense, [rows])

    def repaired(name, add=None, lr=None):
        """One line of the table: what `add` put into a damaged copy, after 60 steps at rate lr."""
        model = dense if name == "dense" else damage(dense, bits)
        parameters, prompt = (add(model) if add else []), None
        if isinstance(parameters, SoftPrompt):
            parameters, prompt = [parameters.weight], parameters.weight
        if lr:
            loss = objective(lambda ids: model(ids, prompt=prompt), distillation)
            fit(model, parameters, targets, loss, FitConfig(60, lr))
        loss = next_token(model(rows[:, :-1], prompt=prompt), rows).mean().item()
        print(f"{name:24s} {sum(p.numel() for p in parameters):6,d} {loss:8.3f}")

    print(f"{'':24s} {'added':>6s} {'loss':>8s}")
    repaired("dense")
    repaired(f"rounded to {bits} bits")
    repaired("bias correction", lambda m: correct_biases(m, dense, rows[:, :-1]))
    repaired("prompt of 4 tokens", lambda m: SoftPrompt(prompt_init(m, 4, generator)), 0.1)
    repaired("biases", add_biases, 0.01)
    repaired("LoRA rank 1 on o", lambda m: add_lora(m, 1, None, "o", generator), 0.01)
    repaired("LoRA rank 4", lambda m: add_lora(m, 4, generator=generator), 0.01)
    print("\nnext: python -m study repair --size quick --method lora    # what LoRA restores")


if __name__ == "__main__":
    guard(main)
