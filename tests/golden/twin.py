"""
The GPT, the choice among prompts and the packed layout once more, from docs/porting.md alone: one row at a time, in
float64, no line of ours called. The tests hold the golden files against this, so that a file holds more than what our
code said.

Tensors are torch's for the sake of gradients; the arithmetic is spelled out.
"""
import math

import numpy as np
import torch


# ---- the GPT: config and weights as model.json has them, tensors in float64

def norm(config, w, name, x):
    """RMSNorm, or LayerNorm where the config says so."""
    if config["norm"] == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / ((x * x).mean(-1, keepdim=True) + config["norm_eps"]).sqrt()
    bias = f"{name}.bias" in w and config["norm"] == "layernorm"
    return x * w[f"{name}.weight"] + (w[f"{name}.bias"] if bias else 0)


def linear(w, name, x):
    """x Wᵀ, and the bias if there is one."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def turned(config, x, positions):
    """Rotary positions: x (heads, T, hs); position t turns the pair (i, i + hs / 2) by t theta^(-2 i / hs)."""
    if config["position"] != "rotary":
        return x
    half = x.shape[-1] // 2
    speed = torch.tensor([config["rope_theta"] ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.tensor(positions, dtype=torch.float64)[:, None] * speed  # (T, half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def heads(config, w, i, x, positions):
    """q (nh, T, hs), k and v (nkv, T, hs) of block i, of x (T, C) behind its first norm."""
    hs = config["n_embd"] // config["n_head"]
    q, k, v = (linear(w, f"blocks.{i}.attn.{name}", x).view(len(x), -1, hs).transpose(0, 1) for name in "qkv")
    return turned(config, q, positions), turned(config, k, positions), v


def attend(config, q, k, v, past):
    """(T, C): each of T tokens attends to all of the past, keys and values (nkv, S, hs), and to those up to itself."""
    T, out = q.shape[1], []
    k, v = (torch.cat([old, new], 1) for old, new in zip(past, (k, v))) if past else (k, v)
    S = k.shape[1] - T
    for h in range(config["n_head"]):
        shared = h // (config["n_head"] // config["n_kv_head"])
        rows = []
        for t in range(T):
            score = (k[shared, :S + t + 1] @ q[h, t]) / math.sqrt(q.shape[-1])
            p = (score - score.max()).exp()
            rows.append((p / p.sum()) @ v[shared, :S + t + 1])
        out.append(torch.stack(rows))
    return torch.cat(out, -1)


def mlp(config, w, i, x):
    """The second half of block i."""
    up = linear(w, f"blocks.{i}.mlp.up", x)
    if config["activation"] == "swiglu":
        gate = linear(w, f"blocks.{i}.mlp.gate", x)
        up = gate / (1 + (-gate).exp()) * up
    elif config["activation"] == "relu":
        up = up * (up > 0)
    elif config["activation"] == "gelu":
        up = up / 2 * (1 + (up / math.sqrt(2)).erf())
    else:
        up = up / 2 * (1 + (math.sqrt(2 / math.pi) * (up + 0.044715 * up ** 3)).tanh())
    return linear(w, f"blocks.{i}.mlp.down", up)


def forward(config, w, x, start=0, past=None):
    """Logits (T, V) of one row x (T, C) of embeddings, the first at position `start`; and each block's keys and values
    [(k, v)], those of `past` in front.
    """
    positions = list(range(start, start + len(x)))
    if config["position"] == "learned":
        x = x + w["wpe.weight"][[p + config["position_offset"] for p in positions]]
    kept = []
    for i in range(config["n_layer"]):
        q, k, v = heads(config, w, i, norm(config, w, f"blocks.{i}.norm1", x), positions)
        before = past[i] if past else None
        x = x + linear(w, f"blocks.{i}.attn.o", attend(config, q, k, v, before))
        x = x + mlp(config, w, i, norm(config, w, f"blocks.{i}.norm2", x))
        kept.append(tuple(torch.cat([old, new], 1) for old, new in zip(before, (k, v))) if before else (k, v))
    head = w["wte.weight"] if config["tied"] else w["lm_head.weight"]
    return norm(config, w, "norm", x) @ head.T, kept


def logits(config, w, ids, prompt=None, prefix=None):
    """(T, V) of one row of token ids, behind a prompt (P, C) or a prefix (L, 2, nkv, P, hs)."""
    x = w["wte.weight"][ids]
    if prompt is not None:
        return forward(config, w, torch.cat([prompt, x]))[0][len(prompt):]
    start, past = (0, None) if prefix is None else (prefix.shape[3], [tuple(layer) for layer in prefix])
    return forward(config, w, x, start, past)[0]


def greedy(config, w, ids, more, stop=None):
    """ids and `more` tokens behind them, each the likeliest."""
    ids, ended = list(ids), False
    for _ in range(more):
        ids.append(stop if ended else int(logits(config, w, ids)[-1].argmax()))
        ended = ended or ids[-1] == stop
    return ids


# ---- IDP: prompts (P_i, C)

def behind(config, w, prompts, m, ids):
    """Logits (T, V) of the ids behind prompt m alone, at the place that the pool gives it."""
    longest = max(map(len, prompts))
    x = torch.cat([prompts[m], w["wte.weight"][ids]])
    return forward(config, w, x, longest - len(prompts[m]))[0][len(prompts[m]):]


def scores(config, w, prompts, ids):
    """[M]: the mean attention probability of the ids' tokens to each prompt's, in the first block."""
    longest = max(map(len, prompts))

    def first(x, start):
        positions = list(range(start, start + len(x)))
        if config["position"] == "learned":
            x = x + w["wpe.weight"][[p + config["position_offset"] for p in positions]]
        return heads(config, w, 0, norm(config, w, "blocks.0.norm1", x), positions)
    of_prompts = [first(p, longest - len(p))[1].detach().numpy() for p in prompts]
    q, k, _ = (t.detach().numpy() for t in first(w["wte.weight"][ids], longest))
    found = np.zeros(len(prompts))
    for h in range(config["n_head"]):
        shared = h // (config["n_head"] // config["n_kv_head"])
        keys = np.concatenate([p[shared] for p in of_prompts])  # all prompts side by side
        owner = np.repeat(np.arange(len(prompts)), [len(p) for p in prompts])
        for t in range(len(ids)):
            score = np.concatenate([keys, k[shared, :t + 1]]) @ q[h, t] / math.sqrt(q.shape[-1])
            p = np.exp(score - score.max())
            p /= p.sum()
            found += [p[:len(owner)][owner == m].mean() for m in range(len(prompts))]
    return found / (config["n_head"] * len(ids))


def chosen(row):
    """The lowest index among scores within 1e-5 (relative) of the highest."""
    most = max(row)
    return next(i for i, score in enumerate(row) if score >= most - 1e-5 * abs(most))


# ---- the packed layout: what kernels.json holds, read back into codes

def stored(bits):
    """(bits that a code is stored in, codes in a cell, words in a cell)."""
    return {2: (2, 16, 1), 3: (3, 32, 3), 4: (4, 8, 1)}.get(bits, (8, 4, 1))


def cell_codes(words, bits):
    """The codes of one cell, from its words (whole numbers, signed or not)."""
    words = [int(word) & 0xFFFFFFFF for word in words]
    bits, n, _ = stored(bits)
    if bits == 3:
        codes = [words[i // 10] >> 3 * (i % 10) & 7 for i in range(30)]
        a, b, c = (word >> 30 for word in words)
        return [*codes, a | (b & 1) << 2, b >> 1 | c << 1]
    return [words[0] >> bits * i & 2**bits - 1 for i in range(n)]


def unsigned_top(codes, bits):
    """Half the range off the code that fills the top bits of its word, modulo the range."""
    bits, n, words = stored(bits)
    return codes if words == 3 else [*codes[:-1], (codes[-1] + 2**(bits - 1)) % 2**bits]


def read_packed(packed):
    """(codes or values (N, positions), scale (N, G) or None, places (N, positions) or None), lists row by row, of what
    kernels.json holds of a Packed.
    """
    words, (N, _), bits = np.array(packed["words"]), packed["shape"], packed["bits"]  # (T, NB, groups, 1 + words, 16)
    whole = bits == 32
    size = 1 if whole else stored(bits)[2]
    codes, scales, places = [], [], []
    for row in range(N):
        block, lane, mine, of_row = row // 16, row % 16, [], []
        for tile in words[:, block, ..., lane]:
            for group in tile:
                if not whole:
                    of_row.append(float(np.array([group[0]], dtype=np.int32).view(np.float32)[0]))
                body = list(group if whole else group[1:])
                for i in range(0, len(body), size):
                    mine += body[i:i + 1] if whole else unsigned_top(cell_codes(body[i:i + size], bits), bits)
        codes.append(mine)
        scales.append(of_row)
        if packed["place"] is not None:
            kept = math.ceil(math.log2(packed["n_m"][1]))
            at = np.array(packed["place"])[:, block, :, lane].flatten()  # its tiles one after another
            step = stored(max(2, kept))[2]
            places.append([p for i in range(0, len(at), step) for p in cell_codes(at[i:i + step], max(2, kept))])
    groups = None if whole else len(packed["zero"][0])
    return codes, None if whole else [row[:1] if groups == 1 else row for row in scales], places or None


def unpacked(packed):
    """(N, K) the weight that kernels.json's Packed stands for, in float64."""
    codes, scale, places = read_packed(packed)
    (N, K), (n, m) = packed["shape"], packed["n_m"] or (1, 1)
    W = np.zeros((N, K))
    for i in range(N):
        for p, code in enumerate(codes[i]):
            position = p // n * m + (places[i][p] if places else 0)
            column = packed["order"][position] if packed["order"] is not None else position
            if column >= K:
                continue
            if scale is None:
                W[i, column] = code
            else:
                g = p // packed["span"]
                W[i, column] = scale[i][g] * (code - packed["zero"][i // 16][g][i % 16])
    return W


# ---- the optimizers: matrices and vectors as numpy arrays

def rate(steps, step, warmup=0.05):
    """The factor on the learning rate."""
    warm = max(1, round(warmup * steps))
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def clipped(gradients, most):
    """All gradients, scaled so that their whole norm is at most `most`."""
    whole = math.sqrt(sum((g * g).sum() for g in gradients))
    return [g * min(1.0, most / (whole + 1e-6)) for g in gradients]


def adamw(start, gradients, lr, decay, betas=(0.9, 0.99), eps=1e-8):
    """[the parameter after each step]: start an array, gradients and lr one a step."""
    p, m, v, out = start.copy(), 0 * start, 0 * start, []
    for t, (g, rate_now) in enumerate(zip(gradients, lr), 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p = p * (1 - rate_now * decay)
        p = p - rate_now * (m / (1 - betas[0]**t)) / (np.sqrt(v / (1 - betas[1]**t)) + eps)
        out.append(p)
    return out


def orthogonal(G):
    """Five Newton-Schulz steps."""
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / (np.sqrt((X * X).sum()) + 1e-7)
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
    return X.T if G.shape[0] > G.shape[1] else X


def muon(start, gradients, lr, decay, momentum=0.95):
    """[the matrix after each step]: start (out, in), gradients and lr one a step."""
    p, average, out = start.copy(), 0 * start, []
    for g, rate_now in zip(gradients, lr):
        average = momentum * average + g
        step = orthogonal(g + momentum * average) * math.sqrt(max(1, p.shape[0] / p.shape[1]))
        p = p * (1 - rate_now * decay) - rate_now * step
        out.append(p)
    return out
