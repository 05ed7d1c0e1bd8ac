"""
What repairs do inside a model: its attention rows and block outputs, beside the dense model's on the same text (the
paper's section 5).

What it leaves out: causal interventions on single heads.
"""
import numpy as np
import torch
import torch.nn.functional as F

from study.statistics import interval, resampled


@torch.no_grad()
def inside(subject, ids):
    """What happens in each layer on text ids (B, T): attention rows over text tokens, renormalised (L, B, nh, T, T),
    and block outputs (L, B, T, C).
    """
    model, (B, T), ids = subject.model, ids.shape, ids.to(subject.device)
    _, cache, _ = subject.start(ids, torch.full((B,), T, device=ids.device))
    positions = cache.positions(T)  # (B, T)
    mask = cache.mask(positions)  # (B, 1, T, S)
    x, attention, outputs = model.place(model.wte(ids), positions), [], []
    for i, block in enumerate(model.blocks):
        q, _, _ = block.attn.qkv(block.norm1(x), positions)  # (B, nh, T, hs)
        x = block(x, positions, mask, cache.kv[i])  # fills the cache with this layer's keys
        k, _ = cache.kv[i]  # (B, nkv, S, hs)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, nh, S, hs)
        score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        attention.append(score[..., -T:].softmax(-1))  # text alone: what a loud prompt leaves may be 0.0
        outputs.append(x)
    return torch.stack(attention), torch.stack(outputs)


def similarity(subject, reference, ids):
    """Cosine similarity to `reference`, what `inside` gave of the dense model on ids (B, T): {"attention": [[a head] a
    layer], "output": [a layer]}, and the means over layers and heads, one a text: {"texts": {"attention": [..],
    "output": [..]}}.
    """
    (a, x), (b, y) = (tuple(t.cpu() for t in pair) for pair in (inside(subject, ids), reference))
    rows = F.cosine_similarity(a, b, dim=-1)[..., 1:].mean(-1)  # (L, B, nh); the first row has one entry only
    outputs = F.cosine_similarity(x, y, dim=-1).mean(-1)  # (L, B)
    return {"attention": rows.mean(1).tolist(), "output": outputs.mean(1).tolist(),
            "texts": {"attention": rows.mean(dim=(0, 2)).tolist(), "output": outputs.mean(0).tolist()}}


def nearer(after, before, seed):
    """How much nearer to the dense model a repair brought attention and outputs: {name: 95 % interval} over texts."""
    generator = torch.Generator().manual_seed(seed)
    change = np.array([np.subtract(after[name], before[name]) for name in ("attention", "output")]).T  # (texts, 2)
    samples = resampled(change, 10_000, generator).numpy()
    return {name: interval(samples[:, i]) for i, name in enumerate(("attention", "output"))}
