"""
The GPT of this study: one decoder-only transformer, small enough to read in one sitting.

What it does: the model itself (`embed / blocks / head`), soft prompts in front of the text, a static key-value cache
with rows of different lengths, greedy or sampled generation, and checkpoints in the safetensors layout, read and
written by hand. One class covers three families by configuration alone: GPT-2 (learned positions, LayerNorm, GELU),
OPT (the same with ReLU and an offset) and Llama (rotary positions, RMSNorm, SwiGLU, grouped-query attention). The
default is the small world's own GPT.

What it leaves out: dropout, beam search, paged caches, padding on the left. Padding stands on the right, where causal
attention never sees it; every row of a cache knows its own length instead.

    python model.py                        # train the small GPT on the small world: out/dense.safetensors
    python model.py --size quick           # the same in seconds

Symbols, used in every file of this study:

    B  batch            T  time (tokens)       C  embedding width        V  vocabulary        L  layers
    nh heads            nkv key/value heads    hs head size              S  slots in a cache
    W  (out, in)  a weight as nn.Linear stores it        X  (n, in)  its calibration inputs, one row a token
    H  (in, in)   mean over tokens of x xᵀ               U  (in, in) upper Cholesky factor of H⁻¹: UᵀU = H⁻¹
    P  prompt length    M  prompts in the pool

Sources: Radford et al. 2019 (GPT-2), Zhang et al. 2022 (OPT, arXiv 2205.01068), Touvron et al. 2023 (Llama, arXiv
2302.13971), Su et al. 2021 (rotary positions, arXiv 2104.09864), Ainslie et al. 2023 (grouped queries, arXiv
2305.13245).
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 512
    context: int = 96             # positions there are: prompt + text + answer must fit
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 96
    n_kv_head: int | None = None  # fewer than n_head: grouped queries; None: as many as n_head
    n_hidden: int | None = None   # width of the MLP; None: 4 * n_embd
    position: str = "rotary"      # or "learned"
    position_offset: int = 0      # OPT keeps its first two learned positions for padding: 2
    norm: str = "rmsnorm"         # or "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"      # GPT-2's tanh approximation; or "relu", "swiglu"
    bias: bool = False            # in every linear layer and LayerNorm
    tied: bool = True             # the head reads the embedding's own matrix
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3: factor, low_freq_factor, high_freq_factor, original_context

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        for name in ("vocab_size", "context", "n_layer", "n_head", "n_embd", "n_kv_head", "n_hidden"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd={self.n_embd} must divide by n_head={self.n_head}, and that by "
                             f"n_kv_head={self.n_kv_head}")
        for name in ("norm_eps", "rope_theta"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        if not isinstance(self.position_offset, int) or self.position_offset < 0 or self.context > 2**24:
            raise ValueError(f"position_offset must be at least 0 and context at most {2**24}, "
                             f"got {self.position_offset!r} and {self.context}")
        if self.rope_scaling is not None:
            s, keys = self.rope_scaling, ("factor", "low_freq_factor", "high_freq_factor", "original_context")
            if not isinstance(s, dict) or not all(isinstance(s.get(k), (int, float)) and s[k] > 0 for k in keys):
                raise ValueError(f"rope_scaling must hold positive numbers for {', '.join(keys)}, got {s!r}")
        for name, known in (("position", ("rotary", "learned")), ("norm", ("rmsnorm", "layernorm")),
                            ("activation", ("gelu", "relu", "swiglu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions turn pairs: the head size must be even, got {self.head_size}")

    @property
    def head_size(self):
        return self.n_embd // self.n_head


class Cache:
    """Keys and values of everything read so far, in slots made once: slot number = position.

    k, v    one tensor a layer, each (B, nkv, S, hs)
    length  (B,) the next free slot of each row: rows may differ
    first   (B,) the first slot that counts; those before it are never attended to (prompts aligned at their end)
    slots   S, how many there are
    context the positions the model has: S can grow to it
    used    the largest `length` as a plain int, so that checking for room never waits for the device
    stacked (2 L, B, nkv, S, hs), of which k and v are the parts, or None: where rows of all layers are taken at once
    """

    def __init__(self, config, batch, slots, device=None, dtype=None):
        if slots > config.context:
            raise ValueError(f"a cache of {slots} slots does not fit the context of {config.context}")
        shape = (batch, config.n_kv_head, slots, config.head_size)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = torch.zeros(batch, dtype=torch.long, device=device)
        self.first = torch.zeros(batch, dtype=torch.long, device=device)
        self.slots, self.used, self.context, self.stacked = slots, 0, config.context, None


def take(filled, chosen, room):
    """A Cache with, in row b, the keys and values of row chosen[b] of `filled`, and `room` free slots behind them."""
    if filled.slots + room > filled.context:
        raise ValueError(f"{filled.slots} cached and {room} new tokens do not fit the context of {filled.context}")
    cache, k = copy.copy(filled), filled.k[0]
    if filled.stacked is not None and not torch.is_grad_enabled():  # all layers at once: a short text waits for calls
        both = F.pad(filled.stacked.index_select(1, chosen), (0, 0, 0, room))  # (2 L, B, nkv, S + room, hs)
        cache.k, cache.v = both[:len(filled.k)].unbind(), both[len(filled.k):].unbind()
    else:
        free = k.new_zeros(len(chosen), k.shape[1], room, k.shape[3])
        cache.k = [torch.cat([k.index_select(0, chosen), free], dim=2) for k in filled.k]  # each (B, nkv, S + room, hs)
        cache.v = [torch.cat([v.index_select(0, chosen), free], dim=2) for v in filled.v]
    cache.stacked = None
    cache.length, cache.first = filled.length[chosen], filled.first[chosen]
    cache.slots = filled.slots + room
    return cache


def rope_table(config):
    """cos and sin of every angle, (context, 2, hs / 2): position t turns pair i by t * theta^(-2i / hs)."""
    hs = config.head_size
    frequency = config.rope_theta ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)  # (hs / 2,)
    s = config.rope_scaling
    if s:  # Llama 3: slow rotations are slowed further by `factor`, fast ones kept, those between blended
        turns = s["original_context"] * frequency / (2 * math.pi)  # full turns within the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / s["factor"]
    angle = torch.arange(config.context, dtype=torch.float64)[:, None] * frequency  # (context, hs / 2)
    return torch.stack([angle.cos(), angle.sin()], dim=1).float()  # (context, 2, hs / 2)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + hs/2) of x (B, heads, T, hs) by the angles in cos, sin (B or 1, 1, T, hs / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, hs, nkv = config.n_embd, config.head_size, config.n_kv_head
        self.n_head, self.n_kv_head, self.head_size = config.n_head, nkv, hs
        self.q = nn.Linear(C, C, bias=config.bias)
        self.k = nn.Linear(C, nkv * hs, bias=config.bias)
        self.v = nn.Linear(C, nkv * hs, bias=config.bias)
        self.o = nn.Linear(C, C, bias=config.bias)
        self.register_buffer("rope", None, persistent=False)  # GPT shares one table among all layers

    def qkv(self, x, positions):
        """x (B, T, C), positions (B or 1, T) -> q (B, nh, T, hs), k and v (B, nkv, T, hs); q and k turned if rotary."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_size).transpose(1, 2)     # (B, nh, T, hs)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        if self.rope is not None:
            cos, sin = self.rope[positions].to(x.dtype).unsqueeze(1).unbind(dim=3)  # each (B or 1, 1, T, hs / 2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def forward(self, x, positions, mask=None, past=None, qkv=None):
        """x (B, T, C) attends to itself and to past (keys, values) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = qkv or self.qkv(x, positions)
        if past is not None:
            slots = positions[:, None, :, None].expand_as(k)  # (B, nkv, T, hs)
            k = past[0].scatter_(2, slots, k.to(past[0].dtype))  # (B, nkv, S, hs), in place
            v = past[1].scatter_(2, slots, v.to(past[1].dtype))  # (B, nkv, S, hs); under autocast new ones are bfloat16
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.n_kv_head != self.n_head)  # (B, nh, T, hs)
        return self.o(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.activation == "relu":
            return self.down(F.relu(self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def draw(p, generator=None):
    """(B, 1) token ids drawn from probabilities p (B, V) by one uniform number a row, from a generator on the CPU: the same
    seed draws the same tokens on any device."""
    below = p.double().cumsum(-1) if p.device.type != "mps" else p.cumsum(-1)  # (B, V)
    u = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(below.device, below.dtype)
    return torch.searchsorted(below, u * below[:, -1:], right=True).clamp(max=p.shape[-1] - 1)


def make_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, positions=None, mask=None, past=None, qkv=None):
        """x (B, T, C) -> (B, T, C). Alone, `block(x)` is causal attention from position 0.

        positions (B or 1, T)  where each token stands (and its slot in `past`)
        mask      (B or 1, 1, T, S) bool, True = may be attended to; None: causal
        past      this layer's (K, V), each (B, nkv, S, hs); the new keys and values are written into it
        qkv       what `attn.qkv` makes of x, when it is at hand: then it is not computed again
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        x = x + self.attn(x if qkv else self.norm1(x), positions, mask, past, qkv)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.context + config.position_offset, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.pruned = frozenset()  # names of the layers that `compress` pruned: their zeros stay
        self.decoder = None  # kernels.compile_decode sets it: the compiled way of one token through a block and head
        self.tie()

    def tie(self):
        """Share what is one tensor: the embedding with a tied head, the rotary table among the layers."""
        if self.config.tied and isinstance(self.lm_head, nn.Linear):
            self.lm_head.weight = self.wte.weight
        if self.config.position == "rotary":
            table = rope_table(self.config).to(self.wte.weight.device)
            for block in self.blocks:
                block.attn.rope = table

    @torch.no_grad()
    def init_weights(self, generator):
        """GPT-2's initialisation: N(0, 0.02²) at its width of 768, so 0.55² / C; the two projections back into the
        residual
        stream smaller by (2L)^-½."""
        std = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                back = name.endswith(("attn.o.weight", "mlp.down.weight"))
                scale = std / math.sqrt(2 * self.config.n_layer) if back else std
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
        return self

    # ---- the forward pass

    def place(self, x, positions):
        """Add the learned position embeddings, where the model has them; x (B, T, C), positions (B or 1, T)."""
        return x + self.wpe(positions + self.config.position_offset) if self.config.position == "learned" else x

    def embed(self, ids, start=0):
        """Token embeddings (B, T, C) of ids (B, T), the first token standing at position `start`."""
        if start + ids.shape[1] > self.config.context:
            raise ValueError(f"{ids.shape[1]} tokens from position {start} do not fit the context of "
                             f"{self.config.context}")
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]  # (1, T)
        return self.place(self.wte(ids), positions)

    def head(self, x):
        """Logits (B, T, V) of the last block's output x (B, T, C): final norm, then the output matrix."""
        if self.decoder and x.shape[1] == 1 and not torch.is_grad_enabled():
            return self.decoder.head(self.norm, self.lm_head, x)
        return self.lm_head(self.norm(x))

    def hidden(self, ids, prompt=None, cache=None, lengths=None, first=None):
        """What `forward` computes, before the head: (B, T, C) for the T text tokens.

        first  x, q, k and v of ids in the first layer, when something (`idp.start`) had to compute them before
        """
        x, *first = first if first else (self.wte(ids),)  # (B, T, C)
        B, T = ids.shape
        P = 0
        if prompt is not None:
            prompt = prompt.expand(B, -1, -1)  # (P, C) or (B, P, C) -> (B, P, C)
            P = prompt.shape[1]
            x = torch.cat([prompt.to(x.dtype), x], dim=1)  # (B, P + T, C)
        used = cache.used if cache is not None else 0
        room = cache.slots if cache is not None else self.config.context
        if used + P + T > room:
            raise ValueError(f"{used} cached + {P} prompt + {T} text tokens do not fit the context of {room}")
        positions = torch.arange(P + T, device=ids.device)[None]  # (1, P + T)
        mask = None  # plain causal attention
        if cache is not None:
            positions = cache.length[:, None] + positions  # (B, P + T): each row goes on where it stopped
            slot = torch.arange(room, device=ids.device)
            mask = (slot <= positions[:, :, None]) & (slot >= cache.first[:, None, None])  # (B, P + T, S)
            mask = mask[:, None]  # (B, 1, P + T, S)
        x = x if first else self.place(x, positions)
        step = self.decoder if cache is not None and P + T == 1 and not torch.is_grad_enabled() else None
        for i, block in enumerate(self.blocks):
            past = (cache.k[i], cache.v[i]) if cache is not None else None
            x = step.block(block, x, positions, mask, past) if step else block(x, positions, mask, past, first)
            first = None  # of the first layer only
        if cache is not None:
            cache.length = cache.length + P + (T if lengths is None else lengths)
            cache.used += P + T
        return x[:, P:]  # (B, T, C)

    def forward(self, ids, prompt=None, cache=None, lengths=None):
        """Logits (B, T, V) of the T text tokens.

        ids      (B, T) token ids
        prompt   (P, C) or (B, P, C) embeddings put in front of the text, without positions; they get no logits
        cache    a Cache to read and extend; the text then stands behind what is cached, each row at its own length
        lengths  (B,) real tokens in each row, with a cache only: what stands behind them is padding, and overwritten
        Raises ValueError when cached + prompt + text tokens exceed the context.
        """
        return self.head(self.hidden(ids, prompt, cache, lengths))

    def new_cache(self, batch, slots):
        return Cache(self.config, batch, slots, self.wte.weight.device, self.wte.weight.dtype)

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, lengths=None, prompt=None, cache=None, stop=None, temperature=0.0,
                 generator=None, first=None):
        """Continue each row of ids (B, T) by max_new_tokens: (B, T + max_new_tokens), new tokens right behind the
        row's own.

        lengths      (B,) real tokens a row (right padding); default all T
        prompt       soft prompt(s) as in forward;  cache  a filled Cache to start from (a prompt's, a prefix's)
        stop         a token id: a row that produced it repeats it, and generation ends once all rows have
        temperature  0 is greedy; above, tokens are drawn with `generator`
        first        as in `hidden`
        """
        B, T = ids.shape
        P = 0 if prompt is None else prompt.shape[-2]
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        lengths = torch.full((B,), T, device=ids.device) if lengths is None else lengths
        if not 1 <= int(lengths.min()) <= int(lengths.max()) <= T:
            raise ValueError(f"lengths must be in [1, {T}], got {lengths.tolist()}")
        cache = cache or self.new_cache(B, P + T + max_new_tokens)
        if cache.used + P + T + max_new_tokens > cache.slots:
            raise ValueError(f"{cache.used} cached + {P} prompt + {T} text + {max_new_tokens} new tokens do not fit "
                             f"a cache of {cache.slots}")
        rows = torch.arange(B, device=ids.device)
        out = torch.cat([ids, ids.new_zeros(B, max_new_tokens)], dim=1)
        done = torch.zeros(B, dtype=torch.bool, device=ids.device)
        if self.decoder:
            self.decoder.known = {}  # nothing changes while this runs
        try:
            x = self.hidden(ids, prompt, cache, lengths, first)[rows, lengths - 1][:, None]  # (B, 1, C) each row's last
            for i in range(max_new_tokens):
                logits = self.head(x)[:, -1]  # (B, V)
                if temperature > 0:
                    new = draw((logits / temperature).softmax(-1), generator)  # (B, 1)
                else:
                    new = logits.argmax(-1, keepdim=True)  # (B, 1)
                if stop is not None:
                    new = torch.where(done[:, None], stop, new)
                    done |= new[:, 0] == stop
                out.scatter_(1, (lengths + i)[:, None], new)
                if i + 1 == max_new_tokens or (stop is not None and bool(done.all())):
                    break
                x = self.hidden(new, cache=cache)  # (B, 1, C)
        finally:
            if self.decoder:
                self.decoder.known = None
        if stop is not None:  # rows that stopped early repeat the stop token to the end
            end = torch.arange(T + max_new_tokens, device=ids.device) > (lengths + i)[:, None]
            behind = end & (torch.arange(T + max_new_tokens, device=ids.device) < (lengths + max_new_tokens)[:, None])
            out[behind] = stop
        return out

    # ---- what it costs

    def n_parameters(self):
        """Parameters, each counted once (a tied head is the embedding)."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Floating-point operations of one token's forward pass with T tokens attended to: 2 a weight, 4TC a layer."""
        c, T = self.config, T or self.config.context
        linear = sum(m.in_features * m.out_features for m in self.blocks.modules() if hasattr(m, "in_features"))
        return 2 * (linear + c.vocab_size * c.n_embd) + 4 * T * c.n_embd * c.n_layer
