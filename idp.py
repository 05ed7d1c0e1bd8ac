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
`prefill` computes them once; answering copies the winner's into the cache and runs the text tokens only.

Prompts of unequal length are aligned at their end. With Pmax the longest, prompt i stands at positions Pmax - P_i ..
Pmax - 1 and the text starts at Pmax: text and prompt are as far apart as with that prompt alone.

What it leaves out: prompts per layer, more than one winner, a choice made again during the answer.

    python idp.py --base "GPTQ 3 bits" --prompts 4 --length 8 --way competitive
"""
import torch
import torch.nn as nn

from model import take
from recover import inputs, objective


class PromptPool(nn.Module):
    """M soft prompts, `PromptPool([(P_1, C), (P_2, C), ...])`; lengths may differ."""

    def __init__(self, prompts):
        super().__init__()
        if not prompts:
            raise ValueError("a pool needs at least one prompt")
        self.prompts = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in prompts)

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
    attn, (B, T) = model.blocks[layer].attn, ids.shape
    M, _, Pmax, hs = filled.k[layer].shape
    x = model.embed(ids, start=Pmax)  # the text stands behind the longest prompt
    positions = torch.arange(Pmax, Pmax + T, device=ids.device)[None]  # (1, T)
    for block in model.blocks[:layer]:
        x = block(x, positions)
    q, k, _ = attn.qkv(model.blocks[layer].norm1(x), positions)  # (B, nh, T, hs), (B, nkv, T, hs)
    q = q.view(B, attn.n_kv_head, -1, T, hs) * hs ** -0.5  # (B, nkv, nh / nkv, T, hs): queries beside their key head
    to_text = q @ k[:, :, None].transpose(-1, -2)  # (B, nkv, nh / nkv, T, T)
    ahead = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
    to_text = to_text.masked_fill(ahead, -torch.inf)
    keys = filled.k[layer].transpose(0, 1).reshape(attn.n_kv_head, 1, M * Pmax, hs)  # all prompts side by side
    to_prompts = q @ keys.transpose(-1, -2)  # (B, nkv, nh / nkv, T, M * Pmax)
    slot = torch.arange(Pmax, device=ids.device)
    real = slot >= filled.first[:, None]  # (M, Pmax): a shorter prompt leaves its first slots empty
    to_prompts = to_prompts.masked_fill(~real.flatten(), -torch.inf)
    p = torch.cat([to_prompts, to_text], dim=-1).softmax(-1)[..., :M * Pmax]
    p = p.mean(dim=(1, 2)).view(B, T, M, Pmax).sum(-1) / real.sum(-1)  # (B, T, M): mean over heads and own tokens
    lengths = torch.full((B,), T, device=ids.device) if lengths is None else lengths
    text = torch.arange(T, device=ids.device) < lengths[:, None]  # (B, T): real tokens
    return (p * text[..., None]).sum(1) / lengths[:, None]  # (B, M)


@torch.no_grad()
def select(model, pool, ids, lengths=None, filled=None):
    """(B,) the index of the prompt each row of ids (B, T) attends to most; `lengths` (B,) real tokens a row.

    filled  the pool's `prefill`, when it is at hand
    """
    return attention_scores(model, filled or prefill(model, pool), ids, lengths).argmax(-1)


def forward(model, pool, ids, lengths=None, filled=None, chosen=None):
    """Logits (B, T, V) of ids (B, T), each row under the prompt it selected (or was given in `chosen`)."""
    filled = filled or prefill(model, pool)
    chosen = select(model, pool, ids, lengths, filled) if chosen is None else chosen
    return model(ids, cache=take(filled, chosen, ids.shape[1]), lengths=lengths)


# ---- three ways to train a pool: each returns what `recover.fit` trains on, batch -> scalar

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
        chosen = scores.argmax(-1)
        load = torch.bincount(chosen, minlength=len(pool)) / len(ids)
        share = (scores / scores.sum(-1, keepdim=True)).mean(0)
        kl = losses(model(ids, cache=take(filled, chosen, ids.shape[1])), batch).mean()
        return kl + balance * len(pool) * (load * share).sum()
    return loss


def competitive(model, pool, losses):
    """Each row trains the prompt under which its loss is lowest: the winner takes the row, and prompts specialise."""
    def loss(batch):
        ids, filled = inputs(batch), prefill(model, pool)
        rows = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        with torch.no_grad():
            each = torch.stack([losses(model(ids, cache=take(filled, rows + m, ids.shape[1])), batch).mean(-1)
                                for m in range(len(pool))])  # (M, B)
        return losses(model(ids, cache=take(filled, each.argmin(0), ids.shape[1])), batch).mean()
    return loss


def main():
    import study  # here, not above: as in recover.py
    parser = study.options("Train a pool of prompts for a compressed model of the small world, and ask before and after.")
    parser.add_argument("--base", choices=list(study.COMPRESSIONS), default="GPTQ 3 bits", help="what to repair")
    parser.add_argument("--prompts", type=int, default=4, help="M, prompts in the pool")
    parser.add_argument("--length", type=int, default=8, help="P, tokens of each prompt")
    parser.add_argument("--way", choices=["independent", "joint", "competitive"], default="independent",
                        help="of training the pool")
    parser.add_argument("--lr", type=float, default=3e-2, help="peak learning rate")
    args = parser.parse_args()
    study.guard(lambda: study.repair_one(study.sized(args.size, args.seed, args.out), args.base, "idp",
                                         (args.prompts, args.length, args.way), "distillation", args.lr))


if __name__ == "__main__":
    main()
