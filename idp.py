"""
Inference-time dynamic prompting (IDP): a pool of soft prompts, and for each input the one that it
attends to most.

Hoang et al. 2023, arXiv 2310.00867, section 4. Exactly, here:

    In the first layer the input's queries attend to the keys of every prompt and, causally, to the
    input itself; prompts do not see one another. A prompt's score is the mean attention probability
    it receives, over heads, over the input's real tokens and over the prompt's own tokens (a mean,
    so that a longer prompt has no advantage). The highest score wins, the lowest index on a tie.

Layer, means, number of prompts and lengths are our choices. The choice is made once, on the
question, never on the answer; from there on the result is exactly that of the chosen prompt alone,
standing where it stands in the pool.

Why it costs almost nothing: a soft prompt does not depend on the input, so its keys and values in
every layer are constants. `prefill` computes them once; answering copies the winner's into the
cache and runs the text tokens only. The queries and keys that the choice needs are those of the
text in the first layer: `choose` computes them once and hands them on to the model.

Prompts of unequal length are aligned at their end. With Pmax the longest, prompt i stands at
positions Pmax - P_i .. Pmax - 1 and the text starts at Pmax, as far from it as with that prompt
alone.

What it leaves out: prompts per layer, more than one winner, a choice made again during the answer.

    python idp.py                          # a pool of four, what three texts attend to, in a second
"""
import argparse

from engine.script import guard  # before torch: Ctrl-C is one line

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.losses import inputs
from model import GPT, GPTConfig


class PromptPool(nn.Module):
    """M soft prompts, `PromptPool([(P_1, C), (P_2, C), ...])`; lengths may differ.

    probe  (M, C), the weights of a selector trained with the prompts (`selected`), or None: then
           the paper's rule chooses
    """

    def __init__(self, prompts, probe=None):
        super().__init__()
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("a pool needs at least one prompt, and each prompt a token")
        self.prompts = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in prompts)
        self.probe = None if probe is None else nn.Parameter(probe.detach().clone())

    def __len__(self):
        return len(self.prompts)

    @property
    def longest(self):
        return max(len(p) for p in self.prompts)


# ---- the rule

def mean_attention(q, k, keys, empty, lengths=None):
    """(B, M): the mean attention probability that each text pays to each prompt.

    q (B, nh, T, hs) and k (B, nkv, T, hs) of the texts, keys (M, nkv, P, hs) of the prompts
    empty    (M,) leading slots of each prompt that hold nothing: it is shorter than the longest
    lengths  (B,) real tokens of each text; default all T
    """
    (B, nh, T, hs), (M, nkv, P, _) = q.shape, keys.shape
    # who must not be seen: empty slots of prompts, later tokens of the text
    hidden = (torch.arange(P, device=q.device) < empty[:, None]).flatten().expand(T, -1)  # (T, M P)
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    hidden = torch.cat([hidden, later], dim=1)  # (T, M P + T)
    # all prompts side by side, and the text
    keys = keys.transpose(0, 1).flatten(1, 2).expand(B, -1, -1, -1)  # (B, nkv, M P, hs)
    keys = torch.cat([keys, k], dim=2).repeat_interleave(nh // nkv, dim=1)  # (B, nh, M P + T, hs)
    score = (q @ keys.mT) * hs ** -0.5  # (B, nh, T, M P + T)
    wide = torch.promote_types(score.dtype, torch.float32)  # in 16 bits near scores would tie
    p = score.masked_fill(hidden, -torch.inf).softmax(-1, dtype=wide)
    p = p[..., :M * P].unflatten(-1, (M, P)).sum(-1) / (P - empty)  # (B, nh, T, M)
    p = p.mean(1)  # (B, T, M)
    if lengths is None:
        return p.mean(1)
    real = torch.arange(T, device=q.device) < lengths[:, None]  # (B, T)
    return (p * real[..., None]).sum(1) / lengths[:, None]


def highest(scores):
    """(B,) the index of the highest score in each row of (B, M), the lowest index on a tie.

    Scores within 1e-5 of the highest tie with it: those of identical prompts differ by rounding.
    """
    top = scores.amax(-1, keepdim=True)  # (B, 1)
    tied = scores >= top - 1e-5 * top.abs()  # (B, M)
    return tied.byte().argmax(-1)  # the first of equal values


def select(model, pool, ids, lengths=None, filled=None):
    """(B,) the index of the prompt that each row of ids (B, T) attends to most.

    A pool with a probe: of the prompt to which that gives the highest score.
    lengths  (B,) real tokens a row; default all T
    filled   the pool's `prefill`, where it is known already
    Raises ValueError where the longest prompt and T tokens do not fit the model's context.
    """
    return choose(model, pool, ids, lengths, filled)[0]


def forward(model, pool, ids, lengths=None):
    """Logits (B, T, V) of ids (B, T), each row under the prompt that it selects."""
    filled = prefill(model, pool)
    return under(model, filled, select(model, pool, ids, lengths, filled), ids)


# ---- the same without computing anything twice

def prefill(model, pool):
    """The keys and values of the pool's prompts in every layer: a Cache of M rows and Pmax slots,
    each prompt at the end of its row.

    They are constants once the pool is trained. While it is trained gradients pass through them.
    """
    M, slots, device = len(pool), pool.longest, pool.prompts[0].device
    empty = [slots - len(p) for p in pool.prompts]  # slots of each row before its prompt
    cache = model.new_cache(M, slots)
    # made where the pool is: a step that is recorded takes nothing from the CPU (engine/graphs.py)
    cache.first = torch.cat([torch.full((1,), n, device=device) for n in empty])
    rows = [F.pad(p, (0, 0, n, 0)) for p, n in zip(pool.prompts, empty)]  # M of (Pmax, C)
    none = torch.empty(M, 0, dtype=torch.long, device=device)
    model.hidden(none, torch.stack(rows), cache)
    return cache


def read_first(model, filled, ids, layer=0):
    """What ids (B, T) are in the first layer, behind the longest prompt of `filled`.

    Returns x (B, T, C), which enters the layer, and (q, k, v): q (B, nh, T, hs), k and v
    (B, nkv, T, hs). They are the same under any prompt.

    layer  another layer; the text then runs through the layers before it without any prompt
    """
    T, P = ids.shape[1], filled.slots
    x = model.embed(ids, start=P)  # (B, T, C)
    positions = torch.arange(P, P + T, device=ids.device)[None]  # (1, T)
    for block in model.blocks[:layer]:
        x = block(x, positions)
    block = model.blocks[layer]
    return x, block.attn.qkv(block.norm1(x), positions)


def attention_scores(model, filled, ids, lengths=None, layer=0):
    """(B, M): `mean_attention` of ids (B, T) over the prompts of `filled`, in one layer."""
    _, (q, k, _) = read_first(model, filled, ids, layer)
    return mean_attention(q, k, filled.kv[layer][0], filled.first, lengths)


@torch.no_grad()
def choose(model, pool, ids, lengths=None, filled=None):
    """What `select` gives (B,), and `first`, what `read_first` gave on the way; None of a probe.

    With cache = filled.repeat(chosen, T + new), the model answers by
    `model.generate(ids, new, lengths, cache=cache, first=first)`: nothing is computed twice.
    """
    if pool.probe is not None:
        return highest(probed(model, pool, ids, lengths)), None
    filled = filled or prefill(model, pool)
    first = read_first(model, filled, ids)
    _, (q, k, _) = first
    scores = mean_attention(q, k, filled.kv[0][0], filled.first, lengths)  # (B, M)
    if bool(scores.isnan().any()):  # they would all choose prompt 0
        raise ValueError("the prompts' scores are not numbers (NaN)")
    return highest(scores), first


def probed(model, pool, ids, lengths=None):
    """(B, M): the scores of the pool's trained probe for ids (B, T), in place of attention.

    The probe reads what the first layer's queries are made of: norm1 of the token embeddings,
    averaged over real tokens and divided by C.
    """
    x = model.blocks[0].norm1(model.wte(ids))  # (B, T, C)
    if lengths is None:
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, T)
    mean = (x * real[..., None]).sum(1) / (lengths[:, None] * x.shape[-1])  # (B, C)
    return mean.to(pool.probe.dtype) @ pool.probe.T  # (B, M)


# ---- ways to train a pool: each returns what `recover.fit` trains on, batch -> scalar

def under(model, filled, chosen, ids):
    """Logits (B, T, V) of ids (B, T), row b behind row chosen[b] of `filled`."""
    return model(ids, cache=filled.repeat(chosen, ids.shape[1]))


def side_by_side(model, pool, losses):
    """Every prompt alone, all at the cost of one: row b of a batch trains prompt b % M.

    The sum of M means, so that each prompt gets the gradient that it would get alone; with
    FitConfig.clip_each one fit then equals M fits, each on every Mth row.
    """
    def loss(batch):
        ids = inputs(batch)
        if len(ids) < len(pool):
            raise ValueError(f"{len(pool)} prompts take turns at a batch of {len(ids)} rows: give "
                             "each a row")
        turn = torch.arange(len(ids), device=ids.device) % len(pool)  # (B,)
        each = losses(under(model, prefill(model, pool), turn, ids), batch).mean(-1)  # (B,)
        return sum(each[m::len(pool)].mean() for m in range(len(pool)))
    return loss


def joint(model, pool, losses, look=8, balance=0.1):
    """Each row trains the prompt that it selects, by its first `look` tokens, as at inference.

    A prompt that is never selected never learns: `balance` weighs the load term of Switch
    Transformers (Fedus et al. 2021, arXiv 2101.03961, equation 4), M times the sum over prompts of
    (share of rows that chose m) * (mean share of the score that m gets).
    """
    def loss(batch):
        ids, filled = inputs(batch), prefill(model, pool)
        scores = attention_scores(model, filled, ids[:, :look])  # (B, M)
        chosen = highest(scores)
        each = torch.arange(len(pool), device=ids.device)
        load = (chosen[:, None] == each).float().mean(0)  # (M,)
        share = (scores / scores.sum(-1, keepdim=True)).mean(0)  # (M,)
        repair = losses(under(model, filled, chosen, ids), batch).mean()
        return repair + balance * len(pool) * (load * share).sum()
    return loss


def competitive(model, pool, losses):
    """Each row trains the prompt under which its loss is lowest: prompts specialise."""
    def loss(batch):
        filled = prefill(model, pool)
        with torch.no_grad():
            each = under_all(model, filled, losses, batch)  # (M, B)
        return losses(under(model, filled, each.argmin(0), inputs(batch)), batch).mean()
    return loss


def selected(model, pool, losses, look=8):
    """Prompts and the probe that chooses among them: a mixture of experts (Jacobs et al. 1991).

    With g_m the probe's softmax on a row's first `look` tokens and E_m the row's summed loss under
    prompt m, the loss is -log sum_m g_m exp(-E_m): a prompt learns the rows on which it does well
    and which the probe can tell from the others.
    """
    def loss(batch):
        ids = inputs(batch)
        errors = ids.shape[1] * under_all(model, prefill(model, pool), losses, batch)  # (M, B)
        gate = probed(model, pool, ids[:, :look]).log_softmax(-1).T  # (M, B)
        return -(gate - errors).logsumexp(0).mean() / ids.shape[1]
    return loss


def under_all(model, filled, losses, batch):
    """(M, B): the mean loss of each row of the batch under each prompt."""
    ids = inputs(batch)
    row = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    return torch.stack([losses(under(model, filled, row + m, ids), batch).mean(-1)
                        for m in range(len(filled.first))])


def main():
    """The lesson: three texts choose among four prompts, and the answer is the chosen one's."""
    parser = argparse.ArgumentParser(description="A pool of prompts, and what three texts choose.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of model, prompts and texts")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    model = GPT(GPTConfig()).init_weights(generator).requires_grad_(False)
    lengths = [4, 8, 8, 12]
    pool = PromptPool([torch.randn(n, model.config.n_embd, generator=generator) for n in lengths])
    ids = torch.randint(model.config.vocab_size, (3, 10), generator=generator)  # (B, T)
    filled = prefill(model, pool)
    scores = attention_scores(model, filled, ids)
    chosen = select(model, pool, ids)
    print(f"prompts of {lengths} tokens; the mean attention of each of three texts to them:\n")
    for b, row in enumerate(scores.tolist()):
        print(f"  text {b}:  " + "  ".join(f"{s:.5f}" for s in row) + f"   -> prompt {chosen[b]}")
    logits = forward(model, pool, ids)
    away = max((model(ids[b:b + 1], prompt=pool.prompts[m])[0] - logits[b]).abs().max().item()
               for b, m in enumerate(chosen.tolist()))
    print(f"\nlogits under the pool and under the chosen prompt alone differ by at most {away:.0e}")
    print("\nnext: python -m study repair --size quick --method idp    # what a pool restores")


if __name__ == "__main__":
    guard(main)
