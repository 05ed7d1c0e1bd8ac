"""
Inference-time dynamic prompting (IDP): a pool of soft prompts, and for each input the one it attends to most.

Hoang et al. 2023, arXiv 2310.00867, section 4: "the prompt with the maximal mean attention wins". Exactly, here:

    In the first layer the input's queries attend to the keys of every prompt and, causally, to the input itself;
    prompts do not see one another. A prompt's score is the mean attention probability it receives, over heads, over
    the input's real tokens and over the prompt's own tokens (a mean, so that length buys no votes). The highest score
    wins, the lowest index on a tie.

Layer, number of prompts and lengths are our choices. The choice is made once, on the question, never on the answer;
from there on the result is exactly that of the chosen prompt alone.

Why it costs nothing: a soft prompt does not depend on the input, so its keys and values in every layer are constants.
`prefill` computes them once; answering copies the winner's into the cache and runs the text tokens only. The queries
and keys of the text that the choice needs are those of the first layer, which `start` hands on to it.

Prompts of unequal length are aligned at their end. With Pmax the longest, prompt i stands at positions Pmax - P_i ..
Pmax - 1 and the text starts at Pmax: text and prompt are as far apart as with that prompt alone.

What it leaves out: prompts per layer, more than one winner, a choice made again during the answer.

    python idp.py --base "GPTQ 3 bits" --prompts 4 --length 8 --way competitive
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import take
from recover import inputs, objective


class PromptPool(nn.Module):
    """M soft prompts, `PromptPool([(P_1, C), (P_2, C), ...])`; lengths may differ.

    probe  (M, C), the weights of a selector trained with them (`selected`); without it, the paper's rule chooses
    """

    def __init__(self, prompts, probe=None):
        super().__init__()
        if not prompts:
            raise ValueError("a pool needs at least one prompt")
        self.prompts = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in prompts)
        self.probe = None if probe is None else nn.Parameter(probe.detach().clone())

    def __len__(self):
        return len(self.prompts)

    @property
    def longest(self):
        return max(len(p) for p in self.prompts)


def prefill(model, pool):
    """The pool's keys and values in every layer: a Cache of M rows and Pmax slots. Constants, once the pool is trained.

    Gradients reach the prompts when they are wanted: then nothing here is a constant, and it runs once a training step.
    """
    rows = [prefill_one(model, prompt, pool.longest) for prompt in pool.prompts]
    pooled = model.new_cache(len(pool), 0)
    pooled.k = [torch.cat([row.k[i] for row in rows]) for i in range(len(model.blocks))]  # each (M, nkv, Pmax, hs)
    pooled.v = [torch.cat([row.v[i] for row in rows]) for i in range(len(model.blocks))]
    pooled.length, pooled.first = torch.cat([row.length for row in rows]), torch.cat([row.first for row in rows])
    pooled.slots = pooled.used = pool.longest
    if not torch.is_grad_enabled():
        pooled.stacked, L = torch.stack(pooled.k + pooled.v), len(pooled.k)  # (2 L, M, nkv, Pmax, hs)
        pooled.k, pooled.v = list(pooled.stacked[:L]), list(pooled.stacked[L:])  # the same memory
    pooled.flat = [k.transpose(0, 1).flatten(1, 2)[None] for k in pooled.k]  # each (1, nkv, M * Pmax, hs): to choose by
    own = torch.eye(len(pool)).to(pooled.k[0]) / (pool.longest - pooled.first)[:, None]
    own = own.repeat_interleave(pool.longest, dim=0)  # (M * Pmax, M): row m * Pmax + j has 1 / P_m in column m
    wider = max(0, model.config.head_size - len(pool))  # as wide as a head: the fast kernel
    pooled.owner = F.pad(own, (0, wider, 0, pooled.context))  # the text belongs to no prompt
    empty = torch.arange(pool.longest, device=own.device) < pooled.first[:, None]  # (M, Pmax)
    pooled.hidden = empty.flatten().to(own.dtype).masked_fill(empty.flatten(), -torch.inf)  # (M * Pmax,)
    pooled.masks = {}
    return pooled


def prefill_one(model, prompt, slots):
    """A Cache of one row with the prompt (P, C) at the end of its `slots`; those before it are never attended to."""
    cache, start = model.new_cache(1, slots), slots - len(prompt)
    cache.length, cache.first, cache.used = cache.length + start, cache.first + start, start
    model.hidden(torch.empty(1, 0, dtype=torch.long, device=prompt.device), prompt, cache)
    return cache


def attention_scores(model, filled, ids, lengths=None, layer=0):
    """(B, M): the mean attention that each row of ids (B, T) pays to each prompt of `filled`, in the first layer.

    layer  another layer to look at; the text then runs through the layers before it without any prompt
    """
    return scores(filled, text_qkv(model, filled, ids, layer), lengths, layer)


def text_qkv(model, filled, ids, layer=0):
    """What ids (B, T) are in one layer, behind the longest prompt of `filled`: x (B, T, C), which enters it, q
    (B, nh, T, hs), k and v (B, nkv, T, hs)."""
    if filled.slots + ids.shape[1] > filled.context:
        raise ValueError(f"a prompt of {filled.slots} and {ids.shape[1]} text tokens do not fit the context of "
                         f"{filled.context}")
    positions = torch.arange(filled.slots, filled.slots + ids.shape[1], device=ids.device)[None]  # (1, T)
    x = model.place(model.wte(ids), positions)
    for block in model.blocks[:layer]:
        x = block(x, positions)
    return x, *model.blocks[layer].attn.qkv(model.blocks[layer].norm1(x), positions)


def scores(filled, qkv, lengths=None, layer=0):
    """(B, M): `attention_scores` from what `text_qkv` gave.

    One call of attention over all prompts, side by side, and the text. Its values say which prompt a key belongs to,
    1 / P_m in column m: what comes out for each query is the mean probability that every prompt gets.
    """
    _, q, k, _ = qkv
    (M, nkv, Pmax, _), (B, nh, T, _) = filled.k[layer].shape, q.shape
    keys = torch.cat([filled.flat[layer].expand(B, -1, -1, -1), k], dim=2)  # (B, nkv, M * Pmax + T, hs)
    owner = filled.owner[:M * Pmax + T].expand(B, nkv, -1, -1)  # (B, nkv, M * Pmax + T, at least M)
    if T not in filled.masks:  # made once for all questions of a length
        later = torch.full((T, T), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
        filled.masks[T] = torch.cat([filled.hidden.expand(T, -1), later], dim=1)  # (T, M * Pmax + T), added to scores
    p = F.scaled_dot_product_attention(q, keys, owner, attn_mask=filled.masks[T], enable_gqa=nkv != nh)
    if lengths is None:
        return p[..., :M].mean((1, 2))
    p = p[..., :M].sum(1)  # (B, T, M)
    text = torch.arange(T, device=q.device) < lengths[:, None]  # (B, T): real tokens
    return (p * text[..., None]).sum(1) / (nh * lengths[:, None])


def highest(scores):
    """(B,) the index of the highest score in each row of (B, M), the lowest on a tie: prompts that are the same add up
    in another order, so scores within 1e-5 of the highest tie with it.
    """
    top = scores.amax(-1, keepdim=True)
    return (scores >= top.sub(top.abs(), alpha=1e-5)).byte().argmax(-1)


@torch.no_grad()
def select(model, pool, ids, lengths=None, filled=None):
    """(B,) the index of the prompt each row of ids (B, T) attends to most; `lengths` (B,) real tokens a row.

    filled  the pool's `prefill`, when it is at hand
    """
    return highest(attention_scores(model, filled or prefill(model, pool), ids, lengths))


@torch.no_grad()
def start(model, filled, ids, lengths=None, room=0):
    """Choose for each row of ids (B, T) and stand the winner in front: (Cache with `room` slots behind T, first).

    `model.generate(ids, room, lengths, cache=cache, first=first)` answers from there. `first`, what `text_qkv` gives
    for the first layer, was needed to choose, and is the same under any prompt: it is not computed again.
    """
    first = text_qkv(model, filled, ids)
    chosen = highest(scores(filled, first, lengths))
    return take(filled, chosen, ids.shape[1] + room), first


def probed(model, pool, ids, lengths=None):
    """(B, M): what the pool's trained probe makes of ids (B, T), in place of attention; the highest is its choice.

    It reads what the first layer's queries are made of, averaged over real tokens: one product of (B, C) and (C, M).
    """
    x = model.blocks[0].norm1(model.wte(ids))  # (B, T, C)
    lengths = torch.full((len(ids),), ids.shape[1], device=ids.device) if lengths is None else lengths
    text = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, T): real tokens
    return (x * text[..., None]).sum(1) / (lengths[:, None] * x.shape[-1]) @ pool.probe.T


def forward(model, pool, ids, lengths=None, filled=None, chosen=None):
    """Logits (B, T, V) of ids (B, T), each row under the prompt it selected (or was given in `chosen`)."""
    filled = filled or prefill(model, pool)
    chosen = select(model, pool, ids, lengths, filled) if chosen is None else chosen
    return model(ids, cache=take(filled, chosen, ids.shape[1]), lengths=lengths)


# ---- four ways to train a pool: each returns what `recover.fit` trains on, batch -> scalar

def independent(model, pool, losses, m):
    """Prompt m alone; called for each m on a shard of the data of its own, the pool is M prompts that never met."""
    def forward(ids):
        filled = prefill_one(model, pool.prompts[m], pool.longest)
        return model(ids, cache=take(filled, torch.zeros(len(ids), dtype=torch.long, device=ids.device), ids.shape[1]))
    return objective(forward, losses)


def joint(model, pool, losses, look=8, balance=0.1):
    """Each row trains the prompt that it selects, by its first `look` tokens, as at inference.

    A prompt that is never selected never learns: `balance` weighs the load term of Switch Transformers (Fedus et al.
    2021, arXiv 2101.03961, equation 4), M * sum of (share of rows that chose m) * (mean share of the score that m
    gets).
    """
    def loss(batch):
        ids, filled = inputs(batch), prefill(model, pool)
        scores = attention_scores(model, filled, ids[:, :look])  # (B, M)
        chosen = highest(scores)
        load = torch.bincount(chosen, minlength=len(pool)) / len(ids)
        share = (scores / scores.sum(-1, keepdim=True)).mean(0)
        kl = losses(model(ids, cache=take(filled, chosen, ids.shape[1])), batch).mean()
        return kl + balance * len(pool) * (load * share).sum()
    return loss


def competitive(model, pool, losses):
    """Each row trains the prompt under which its loss is lowest: the winner takes the row, and prompts specialise."""
    def loss(batch):
        ids, filled = inputs(batch), prefill(model, pool)
        with torch.no_grad():
            each = under_all(model, filled, losses, batch)  # (M, B)
        return losses(model(ids, cache=take(filled, each.argmin(0), ids.shape[1])), batch).mean()
    return loss


def selected(model, pool, losses, look=8):
    """Prompts and the probe that chooses among them, together: a mixture of experts (Jacobs et al. 1991).

    With g_m the probe's softmax on a row's first `look` tokens and E_m the row's summed loss under prompt m, it lowers
    -log sum_m g_m exp(-E_m): a prompt learns the rows that it does well on and that the probe can tell.
    """
    def loss(batch):
        ids = inputs(batch)
        errors = ids.shape[1] * under_all(model, prefill(model, pool), losses, batch)  # (M, B)
        gate = probed(model, pool, ids[:, :look]).log_softmax(-1).T  # (M, B)
        return -(gate - errors).logsumexp(0).mean() / ids.shape[1]
    return loss


def under_all(model, filled, losses, batch):
    """(M, B): the mean loss of each row of the batch under each prompt."""
    ids, rows = inputs(batch), torch.zeros(len(inputs(batch)), dtype=torch.long, device=filled.length.device)
    return torch.stack([losses(model(ids, cache=take(filled, rows + m, ids.shape[1])), batch).mean(-1)
                        for m in range(len(filled.length))])
