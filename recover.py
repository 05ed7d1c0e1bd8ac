"""
Repair of a compressed model: LoRA inside it, soft prompts and prefixes in front of it, and the one training loop for
all.

    LoRA            y = W x + (alpha / rank) B A x        Hu et al. 2021, arXiv 2106.09685, section 4.1
    prompt tuning   P free embeddings before the text     Lester et al. 2021, arXiv 2104.08691
    prefix tuning   P free keys and values in each layer  Li & Liang 2021, arXiv 2101.00190 (without their MLP)

In all of them the base stays frozen, and only frozen weights are compressed. `fit` trains any list of parameters on
any loss: the next token, or distillation, which asks for the dense model's whole distribution instead of the one word
the text happens to have (Hinton et al. 2015, arXiv 1503.02531). It trains the dense model too, with Muon (Jordan et
al. 2024) on its matrices.

What it leaves out: quantized optimisers, gradient accumulation, LoRA's dropout, prefix re-parametrisation.

    python recover.py --base "GPTQ 3 bits" --method lora --repair-size 8
"""
import copy
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Cache, take

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # every linear layer of a block, by the last part of its name


# ---- LoRA

class LoRALinear(nn.Module):
    """A frozen layer and a trainable update of low rank beside it. B starts at zero, so step 0 changes nothing."""

    def __init__(self, base, n_in, n_out, rank, alpha, generator=None):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.A = nn.Parameter((torch.rand(rank, n_in, generator=generator) * 2 - 1) / math.sqrt(n_in))
        self.B = nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x):
        update = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * self.scale
        return self.base(x) + update.to(x.dtype)

    def update(self):
        """The dense (out, in) update this layer adds to its base."""
        return self.scale * self.B @ self.A


def shape_of(layer):
    """(in, out) of a linear layer, plain or packed; None for any other module."""
    n_in, n_out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return None if n_in is None or n_out is None else (n_in, n_out)


def add_lora(model, rank, alpha=None, targets=LINEARS, generator=None):
    """Wrap every linear layer of the blocks whose last name is in `targets`, in place; returns the new parameters.

    rank  of the update, at least 1;  alpha  scales it by alpha / rank (default: alpha = rank, a scale of 1)
    Raises ValueError for a rank below 1, for targets that name no layer, and for a model that has LoRA already.
    """
    if rank < 1 or (alpha is not None and alpha <= 0):
        raise ValueError(f"rank must be at least 1 and alpha above 0, got {rank} and {alpha}")
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("the model has LoRA already: merge_lora or remove_lora first")
    found = [(parent, name) for parent in model.blocks.modules() for name, child in parent.named_children()
             if name in targets and shape_of(child)]
    if not found:
        raise ValueError(f"no linear layer is named {' or '.join(targets)}")
    parameters = []
    for parent, name in found:
        base = getattr(parent, name)
        device = next(iter([*base.parameters(), *base.buffers()])).device
        layer = LoRALinear(base, *shape_of(base), rank, alpha or rank, generator).to(device)
        setattr(parent, name, layer)
        parameters += [layer.A, layer.B]
    return parameters


def lora_layers(model):
    """(parent, name, layer) of each LoRALinear in the model."""
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
            if isinstance(child, LoRALinear)]


@torch.no_grad()
def merge_lora(model, keep_zeros=False):
    """Add each update to the weight it stands beside and drop the wrapper, in place. Without LoRA it does nothing.

    A quantized layer is refused: rounded to its grid again, most of a small update is lost. So is a pruned one, whose
    zeros the update would fill - unless `keep_zeros` is set: then the update is masked. Nothing is changed when
    anything is refused. Returns {layer name: share of the update's squared norm that the mask threw away}, 0.0 for
    dense layers.
    """
    names = {id(m): name for name, m in model.named_modules()}
    layers = lora_layers(model)
    for _, _, layer in layers:
        if not isinstance(layer.base, nn.Linear):
            raise ValueError(f"{names[id(layer)]} is stored in few bits or without its zeros: merging would lose "
                             "most of the update; keep LoRA beside it")
        if not keep_zeros and (layer.base.weight == 0).float().mean() > 1e-3:
            raise ValueError(f"{names[id(layer)]} is pruned: merging would fill its zeros; pass keep_zeros=True to "
                             "merge under the mask and lose the rest")
    lost = {}
    for parent, name, layer in layers:
        weight, update = layer.base.weight, layer.update()
        kept = torch.where(weight == 0, 0, update) if keep_zeros else update
        lost[names[id(layer)]] = float((update - kept).square().sum() / update.square().sum().clamp_min(1e-30))
        merged = copy.copy(layer.base)  # the given layer may be shared with another model: leave its tensor alone
        merged._parameters = dict(layer.base._parameters, weight=nn.Parameter(weight + kept, weight.requires_grad))
        setattr(parent, name, merged)
    return lost


def remove_lora(model):
    """Take every wrapper off again, in place: the base as it was."""
    for parent, name, layer in lora_layers(model):
        setattr(parent, name, layer.base)


# ---- soft prompts and prefixes

class SoftPrompt(nn.Module):
    """P free vectors (P, C) that stand in front of the text's embeddings: `model(ids, prompt=soft())`."""

    def __init__(self, init):
        super().__init__()
        self.weight = nn.Parameter(init.detach().clone())

    def forward(self):
        return self.weight


class Prefix(nn.Module):
    """Free keys and values of P positions for every layer, (L, 2, nkv, P, hs).

    `model(ids, cache=prefix.cache(model, B, T))` reads ids (B, T) behind it.
    """

    def __init__(self, init):
        super().__init__()
        self.weight = nn.Parameter(init.detach().clone())

    def cache(self, model, batch, slots):
        """A Cache of `batch` rows, the prefix in front, `slots` free ones behind it; gradients reach the prefix."""
        P, device = self.weight.shape[3], self.weight.device
        filled = Cache(model.config, 1, 0, device)
        filled.k, filled.v = ([layer[i:i + 1] for layer in self.weight] for i in (0, 1))  # each (1, nkv, P, hs)
        filled.length += P
        filled.slots = filled.used = P
        return take(filled, torch.zeros(batch, dtype=torch.long, device=device), slots)


@torch.no_grad()
def prompt_init(model, length, how="vocabulary", ids=None, generator=None):
    """The first value (P, C) of a soft prompt: embeddings of random tokens, of given `ids`, or of noise as loud as
    embeddings.

    how  "vocabulary", "text" (then `ids`, repeated or cut to `length`) or "random"
    """
    if length < 1:
        raise ValueError(f"a prompt needs at least 1 token, got {length}")
    if how == "vocabulary":
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
    elif how == "text":
        if ids is None or len(ids) == 0:
            raise ValueError("initialising from text needs its token ids")
        ids = torch.as_tensor(ids).repeat(math.ceil(length / len(ids)))[:length]
    elif how == "random":
        std = model.wte.weight.float().std().item()
        return torch.randn(length, model.config.n_embd, generator=generator).to(model.wte.weight.device) * std
    else:
        raise ValueError(f"a prompt starts from vocabulary, text or random, got {how!r}")
    return model.wte(ids.to(model.wte.weight.device))  # (P, C)


@torch.no_grad()
def prefix_init(model, prompt):
    """The keys and values (L, 2, nkv, P, hs) that a prompt (P, C) leaves in every layer: where prefix tuning starts."""
    cache = model.new_cache(1, len(prompt))
    model.hidden(torch.empty(1, 0, dtype=torch.long, device=prompt.device), prompt, cache)
    return torch.stack([torch.stack([k[0], v[0]]) for k, v in zip(cache.k, cache.v)])


# ---- losses: logits (B, T, V) and the batch they came from -> (B, T), one loss a token

def inputs(batch):
    """The ids (B, T) a model reads of a batch: ids (B, T + 1) alone, or with a teacher's targets as `add_targets`
    makes them.
    """
    return (batch[0] if isinstance(batch, tuple) else batch)[:, :-1]


def next_token(logits, batch):
    """Cross-entropy of the token that follows, in nats."""
    ids = batch[0] if isinstance(batch, tuple) else batch
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(logits.shape[:2])


@torch.no_grad()
def add_targets(teacher, batches, k=64):
    """[(ids (B, T + 1), log-probabilities (B, T, k), their tokens (B, T, k))]: the teacher's k likeliest next tokens.

    Computed once a batch, however many students read them. Beyond the k the vocabulary is one bucket, "anything else".
    """
    out = []
    for ids in batches:
        log_p = F.log_softmax(teacher(ids[:, :-1]).float(), dim=-1)
        out.append((ids, *log_p.topk(min(k, log_p.shape[-1]), dim=-1)))
    return out


def distillation(logits, batch):
    """KL(teacher || student) over the teacher's k likeliest tokens and the bucket of all others, in nats."""
    _, log_p, tokens = batch
    log_q = F.log_softmax(logits.float(), dim=-1).gather(-1, tokens)  # (B, T, k)
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = (1 - p.sum(-1)).clamp_min(1e-6), (1 - q.sum(-1)).clamp_min(1e-6)
    return (p * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()


def objective(forward, losses=next_token):
    """What `fit` trains on: batch -> scalar, the mean of `losses` (next_token or distillation) of `forward(ids)`'s
    logits.
    """
    return lambda batch: losses(forward(inputs(batch)), batch).mean()


# ---- the one training loop

@dataclass
class FitConfig:
    steps: int = 250
    lr: float = 1e-3            # AdamW's peak
    warmup: float = 0.05        # share of the steps that climb to it
    schedule: str = "cosine"    # then down to zero; or "linear"
    weight_decay: float = 0.0   # on matrices only
    betas: tuple = (0.9, 0.99)
    clip: float = 1.0           # largest norm of the whole gradient
    muon: float = 0.0           # learning rate of Muon; above 0 it takes the matrices of the blocks from AdamW
    every: int = 50             # steps between two looks at the validation loss

    def __post_init__(self):
        if self.steps < 1 or self.every < 1 or not 0 < self.lr < math.inf:
            raise ValueError(f"steps and every must be at least 1 and lr above 0, "
                             f"got {self.steps}, {self.every} and {self.lr}")
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"schedule must be cosine or linear, got {self.schedule!r}")

    def rate(self, step):
        """The factor on the learning rate at `step`: warm-up, then the schedule."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        x = (step - warm) / max(1, self.steps - warm)
        return 0.5 * (1 + math.cos(math.pi * x)) if self.schedule == "cosine" else 1 - x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: every direction of a matrix learns at the same pace, rare facts too.

    Five Newton-Schulz iterations push all singular values of the momentum towards 1 (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). For the weights of hidden layers; embeddings and vectors stay with AdamW.
    """

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One update of every parameter from its gradient."""
        for group in self.param_groups:
            shapes = {}  # matrices of one shape take their step together: fewer and larger products
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.mul_(group["momentum"]).add_(p.grad)
                ahead = p.grad.add(average, alpha=group["momentum"])  # Nesterov: the momentum one step on
                shapes.setdefault(p.shape, []).append((p, ahead))
            for (m, n), pairs in shapes.items():
                steps = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                for (p, _), step in zip(pairs, steps):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(step, alpha=-group["lr"] * max(1, m / n) ** 0.5)


def orthogonal(G, steps=5):
    """The nearest matrices to G (..., m, n) with singular values near 1: X <- aX + bXXᵀX + cXXᵀXXᵀX, five times."""
    a, b, c = 3.4445, -4.7750, 2.0315  # chosen to lift small singular values fast; they end between 0.7 and 1.2
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        S = X @ X.mT
        X = a * X + (b * S + c * S @ S) @ X
    return X.mT if tall else X


def make_optimizers(model, parameters, config):
    """[AdamW], or with config.muon above 0 [AdamW, Muon], where Muon takes the matrices of the blocks."""
    blocks = {id(p) for p in model.blocks.parameters() if p.dim() == 2} if config.muon > 0 else set()
    hidden = [p for p in parameters if id(p) in blocks]
    rest = [p for p in parameters if id(p) not in blocks]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)] if groups else []
    if hidden:
        optimizers.append(Muon(hidden, config.muon, config.weight_decay))
    return optimizers


def fit(model, parameters, batches, loss=None, config=None, validate=None, progress=None):
    """Train `parameters`, and nothing else, on `batches`; returns the losses, one a step.

    model       only for its frozen parameters: none of them gets a gradient while this runs
    batches     an iterable of what `loss` takes; a list is gone through again until config.steps are done
    loss        batch -> scalar, see `objective`; default: the next token
    validate    () -> float, lower is better, asked every config.every steps: the best state is the one that is kept
    progress    called with (step, loss) after every step
    A loss that is not finite ends the training with a warning, at the last good state.
    """
    config, loss, parameters = config or FitConfig(), loss or objective(model), list(parameters)
    frozen = {p: p.requires_grad for p in model.parameters()}
    for p in frozen:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
        p.grad = None
    optimizers = make_optimizers(model, parameters, config)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    best, losses, stream = (math.inf, None), [], iter(batches)
    good = [p.detach().clone() for p in parameters]  # the parameters that the last finite loss was computed with
    try:
        for step in range(config.steps):
            batch = next(stream, None)
            if batch is None:  # the list is through: once more
                stream = iter(batches)
                batch = next(stream, None)
            if batch is None:
                raise ValueError("there are no batches to train on")
            value = loss(batch)
            if value.isfinite():
                value.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            if not value.isfinite() or not norm.isfinite():
                warnings.warn(f"the loss is {value.item()}, or its gradient not finite, at step {step}: "
                              "training ends at the last good state")
                restore(parameters, good)
                break
            for p, kept in zip(parameters, good):
                kept.copy_(p.detach())
            for o, lrs in zip(optimizers, peaks):
                for group, lr in zip(o.param_groups, lrs):
                    group["lr"] = lr * config.rate(step)
                o.step()
                o.zero_grad()
            losses.append(value.item())
            if progress:
                progress(step, losses[-1])
            if validate and ((step + 1) % config.every == 0 or step + 1 == config.steps):
                with torch.no_grad():
                    score = validate()
                if score < best[0]:
                    best = score, [p.detach().clone() for p in parameters]
    finally:
        for p, wanted in frozen.items():
            p.requires_grad_(wanted)
    if best[1] is not None:
        restore(parameters, best[1])
    return losses


@torch.no_grad()
def restore(parameters, values):
    for p, value in zip(parameters, values):
        p.copy_(value)
        p.grad = None
