"""
One answer to each exercise of fill.py, as short as it can be said. The tasks and the shapes stand there.

    python exercises/check.py --solutions
"""
import math

import torch
import torch.nn.functional as F


# ---- sitting 1: a GPT that knows facts

def rotate(x, cos, sin):
    """Turn the pairs (i, i + hs/2) of x (B, heads, T, hs); cos, sin (T, hs / 2)."""
    a, b = x.chunk(2, dim=-1)  # each (B, heads, T, hs / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(q, k, v):
    """q (B, nh, T, hs) of the last T of S tokens, k and v (B, nkv, S, hs) of all -> (B, nh, T, hs)."""
    (nh, T, hs), (nkv, S) = q.shape[1:], k.shape[1:3]
    k, v = (t.repeat_interleave(nh // nkv, dim=1) for t in (k, v))  # (B, nh, S, hs)
    score = q @ k.mT / math.sqrt(hs)  # (B, nh, T, S)
    later = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)  # query i is token S - T + i
    return score.masked_fill(later, -torch.inf).softmax(-1) @ v


def cached_attention(q, k, v, cache):
    """Attention of T new tokens to themselves and to the cache (2, B, nkv, S, hs) -> y, the longer cache."""
    cache = torch.cat([cache, torch.stack([k, v])], dim=3)  # (2, B, nkv, S + T, hs)
    return attention(q, *cache), cache


# ---- sitting 2: compress it

def rtn(W, bits, group_size):
    """W (out, in) -> codes (out, in), scale and zero (out, groups)."""
    top = 2**bits - 1
    groups = W.view(len(W), -1, group_size)  # (out, groups, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # the grid has the value 0
    scale = (high - low) / top  # (out, groups)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round()
    codes = (groups / scale[:, :, None]).round() + zero[:, :, None]
    return codes.clamp(0, top).view(W.shape), scale, zero


def second_moments(X, lengths):
    """H (in, in), the mean of x xᵀ over the real tokens of X (B, T, in)."""
    real = torch.arange(X.shape[1]) < lengths[:, None]  # (B, T)
    X = X[real]  # (n, in)
    return X.T @ X / len(X)


def output_error(D, H):
    """tr(D H Dᵀ), the mean of |D x|² over the tokens that H was made of."""
    return ((D @ H) * D).sum()


def gptq(W, H, bits, damp=0.01):
    """Algorithm 1 of GPTQ, one grid a row -> codes (out, in), scale (out, 1), zero (out, 1)."""
    n = W.shape[1]
    _, scale, zero = rtn(W, bits, n)
    H = H + damp * H.diagonal().mean() * torch.eye(n, dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)  # UᵀU = H⁻¹
    W, codes = W.clone(), torch.empty_like(W)
    for j in range(n):
        codes[:, j] = ((W[:, j] / scale[:, 0]).round() + zero[:, 0]).clamp(0, 2**bits - 1)
        q = scale[:, 0] * (codes[:, j] - zero[:, 0])
        e = (W[:, j] - q) / U[j, j]
        W[:, j:] -= torch.outer(e, U[j, j:])
    return codes, scale, zero


def keep_n_of_m(score, n, m):
    """Keep-mask (rows, in): the n highest of every m neighbours; of equal scores the first lose."""
    padded = F.pad(score, (0, -score.shape[1] % m), value=-1.0)  # scores are at least 0: padding goes first
    order = padded.view(-1, m).argsort(dim=-1, stable=True)  # from the lowest, the first of equals in front
    keep = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :m - n], False)
    return keep.view(padded.shape)[:, :score.shape[1]]


def pack4(codes):
    """Codes (out, in) of 4 bits -> int32 words (out, in / 8)."""
    words = (codes.long().view(len(codes), -1, 8) << 4 * torch.arange(8)).sum(-1)  # (out, in / 8), below 2**32
    return torch.where(words < 2**31, words, words - 2**32).int()  # the top bit of an int32 is its sign


# ---- sitting 3: repair it

def distillation(logits, log_p, tokens):
    """KL(teacher || student) over the teacher's k likeliest tokens and one bucket for the rest -> (B, T)."""
    log_q = logits.log_softmax(-1).gather(-1, tokens)  # (B, T, k)
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = (1 - p.sum(-1)).clamp_min(1e-6), (1 - q.sum(-1)).clamp_min(1e-6)  # (B, T)
    return (p * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()


def mean_attention(q, k, keys, lengths):
    """(B, M): the mean attention probability that each text pays to each prompt of keys (M, nh, P, hs)."""
    (T, hs), (M, P) = q.shape[2:], keys.shape[::2]
    side = keys.transpose(0, 1).flatten(1, 2).expand(len(q), -1, -1, -1)  # (B, nh, M P, hs): side by side
    score = q @ torch.cat([side, k], dim=2).mT / math.sqrt(hs)  # (B, nh, T, M P + T)
    later = torch.ones(T, M * P + T, dtype=torch.bool).triu(M * P + 1)
    p = score.masked_fill(later, -torch.inf).softmax(-1)[..., :M * P]
    p = p.unflatten(-1, (M, P)).mean((1, -1))  # (B, T, M): over heads and a prompt's tokens
    real = torch.arange(T) < lengths[:, None]  # (B, T)
    return (p * real[..., None]).sum(1) / lengths[:, None]


# ---- sitting 4: displaced or re-learned?

def displaced(right, draws):
    """(3,): displaced and the ends of its 95 % interval, over resamples `draws` (R, people)."""
    def share(right):
        """Of right answers (..., people, 3). All models are asked the same facts: their number cancels."""
        dense, compressed, repaired = right.sum(-2).unbind(-1)
        return (repaired - compressed) / (dense - compressed)
    samples = share(right[draws])  # (R,): the same people for all three models
    ends = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype))
    return torch.cat([share(right)[None], ends])
