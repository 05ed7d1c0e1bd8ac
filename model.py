"""
The GPT of this study: one decoder-only transformer, small enough to read in one sitting.

The model (`embed`, `blocks`, `head`), soft prompts in front of the text, a cache of keys and values
whose rows may have different lengths, generation. One class covers three families by configuration
alone: GPT-2 (learned positions, LayerNorm, GELU), OPT (the same with ReLU and an offset) and Llama
(rotary positions, RMSNorm, SwiGLU, grouped queries). The default is the small world's own GPT, but
for its vocabulary.

What it leaves out: dropout, beam search, paged caches, padding on the left (on the right causal
attention never sees it; each row of a cache knows its length). Files: checkpoints/; training:
recover.py.

    python model.py                        # a GPT learns the lines above by heart, in seconds

Symbols, used in every file of this study:

    B  batch            T  time (tokens)       C  embedding width        V  vocabulary    L  layers
    nh heads            nkv key/value heads    hs head size              S  slots in a cache
    W  (out, in)  a weight as nn.Linear stores it    X  (n, in)  its inputs, one row a token
    H  (in, in)   mean over tokens of x xᵀ           U  (in, in)  upper Cholesky factor of H⁻¹
    P  prompt length    M  prompts in the pool

Sources: Radford et al. 2019 (GPT-2), Zhang et al. 2022 (OPT, arXiv 2205.01068), Touvron et al. 2023
(Llama, arXiv 2302.13971), Su et al. 2021 (rotary positions, arXiv 2104.09864), Ainslie et al. 2023
(grouped queries, arXiv 2305.13245), Zhang & Sennrich 2019 (RMSNorm, arXiv 1910.07467), Hendrycks &
Gimpel 2016 (GELU, arXiv 1606.08415), Shazeer 2020 (SwiGLU, arXiv 2002.05202).
"""
import argparse
import math
from dataclasses import dataclass

from engine.script import guard  # before torch: Ctrl-C is one line

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import rotary
from engine.cache import Cache
from engine.norm import RMSNorm
from engine.products import Linear  # nn.Linear; its large products are faster on a CPU
from engine.rotary import rope_table


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
    activation: str = "gelu"      # or "gelu_tanh" (GPT-2's approximation), "relu", "swiglu"
    bias: bool = False            # in every linear layer and LayerNorm
    tied: bool = True             # the head reads the embedding's own matrix
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's four numbers, see rope_table

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 4 * self.n_embd
        sizes = "vocab_size", "context", "n_layer", "n_head", "n_embd", "n_kv_head", "n_hidden"
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd={self.n_embd} must divide by n_head={self.n_head}, "
                             f"and that by n_kv_head={self.n_kv_head}")
        choices = {"position": ("rotary", "learned"), "norm": ("rmsnorm", "layernorm"),
                   "activation": ("gelu", "gelu_tanh", "relu", "swiglu")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError("rotary positions turn pairs: the head size must be even, "
                             f"got {self.head_size}")

    @property
    def head_size(self):
        return self.n_embd // self.n_head


def rotate(x, cos, sin):
    """Turn the pairs (i, i + hs/2) of x (B, heads, T, hs); cos, sin (B or 1, 1, T, hs / 2)."""
    a, b = x.chunk(2, dim=-1)  # each (B, heads, T, hs / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)  # (B, heads, T, hs)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, hs, nkv = config.n_embd, config.head_size, config.n_kv_head
        self.n_head, self.n_kv_head, self.head_size = config.n_head, nkv, hs
        self.q = Linear(C, C, bias=config.bias)
        self.k = Linear(C, nkv * hs, bias=config.bias)
        self.v = Linear(C, nkv * hs, bias=config.bias)
        self.o = Linear(C, C, bias=config.bias)
        self.register_buffer("rope", None, persistent=False)  # GPT.tie: one table for all layers

    def qkv(self, x, positions):
        """x (B, T, C), positions (B or 1, T) -> q (B, nh, T, hs), k and v (B, nkv, T, hs).

        With rotary positions q and k are turned.
        """
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_size).transpose(1, 2)     # (B, nh, T, hs)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)  # (B, nkv, T, hs)
        if self.rope is not None:
            turn = self.rope[positions].to(x.dtype).unsqueeze(1)  # (B or 1, 1, T, 2, hs / 2)
            cos, sin = turn.unbind(dim=3)  # each (B or 1, 1, T, hs / 2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def forward(self, x, positions, mask=None, past=None, qkv=None):
        """x (B, T, C) attends to itself and to the slots of `past` -> (B, T, C)."""
        B, T, C = x.shape
        if qkv is None:
            # faster: each head's dimensions in another order, in q and k alike
            fast = past is None and rotary.trains(self, x)
            qkv = rotary.qkv(self, x, positions) if fast else self.qkv(x, positions)
        q, k, v = qkv
        if past is not None:
            row = torch.arange(B, device=x.device)[:, None]  # (B, 1)
            new = torch.stack([k, v]).permute(1, 3, 0, 2, 4)  # (B, T, 2, nkv, hs)
            past[:, row, :, positions] = new.to(past.dtype)  # in place
            k, v = past  # each (B, nkv, S, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.n_kv_head != self.n_head)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, C)
        return self.o(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        if config.activation == "swiglu":
            self.gate = Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.up = Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.down = Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.activation == "relu":
            return self.down(F.relu(self.up(x)))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down(F.gelu(self.up(x), approximate=approximate))


def draw(p, generator=None):
    """(B, 1) token ids drawn from probabilities p (B, V), one uniform number a row.

    `generator` is one of the CPU: the same seed draws the same tokens on any device.
    """
    below = p.double().cumsum(-1) if p.device.type != "mps" else p.cumsum(-1)  # (B, V)
    u = torch.rand(len(p), 1, generator=generator, dtype=torch.float64)
    u = u.to(below.device, below.dtype) * below[:, -1:]  # (B, 1)
    return torch.searchsorted(below, u, right=True).clamp(max=p.shape[-1] - 1)


def make_norm(config):
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
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

        positions (B or 1, T)  where each token stands, and its slot in `past`
        mask      (B or 1, 1, T, S) bool, True = may be attended to; None: causal
        past      this layer's kv of a Cache, (2, B, nkv, S, hs); the new ones are written into it
        qkv       what `attn.qkv(norm1(x), positions)` gives, where it is known already
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        normed = x if qkv else self.norm1(x)  # with qkv given, attention takes only its shape
        x = x + self.attn(normed, positions, mask, past, qkv)
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
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.pruned = frozenset()  # names of the layers that `compress` pruned: their zeros stay
        self.tie()

    def tie(self):
        """Share what is one tensor: embedding and tied head, the rotary table of all layers."""
        if self.config.tied and isinstance(self.lm_head, nn.Linear):
            self.lm_head.weight = self.wte.weight
        self.share_table()

    def share_table(self):
        """Give all layers one table of rotary angles, in float32."""
        if self.config.position == "rotary":
            table = rope_table(self.config).to(self.wte.weight.device)
            for block in self.blocks:
                block.attn.rope = table

    def _apply(self, fn, recurse=True):
        """A cast or a move (`to`, `half`): the table is made anew, as a cast would round it."""
        super()._apply(fn, recurse)
        self.share_table()
        return self

    @torch.no_grad()
    def init_weights(self, generator):
        """GPT-2's initialisation: N(0, 0.02²) at its width of 768, so a variance of 0.55² / C.

        The two projections back into the residual stream are smaller by (2L)^-½.
        """
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
        """x (B, T, C) plus the learned embeddings of positions (B or 1, T), if there are any."""
        if self.config.position == "learned":
            return x + self.wpe(positions + self.config.position_offset)
        return x

    def embed(self, ids, start=0):
        """Token embeddings (B, T, C) of ids (B, T), the first token standing at `start`."""
        if start + ids.shape[1] > self.config.context:
            raise ValueError(f"{ids.shape[1]} tokens from position {start} do not fit the context "
                             f"of {self.config.context}")
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]  # (1, T)
        return self.place(self.wte(ids), positions)

    def head(self, x):
        """Logits (B, T, V) of the last block's output x (B, T, C)."""
        return self.lm_head(self.norm(x))

    def hidden(self, ids, prompt=None, cache=None, lengths=None, first=None):
        """What `forward` computes before the head: (B, T, C) for the T text tokens.

        first  (x, qkv) of ids in the first layer, where they are known already (`idp.choose`)
        """
        x, qkv = first or (self.wte(ids), None)  # (B, T, C)
        B, T = ids.shape
        P = 0
        if prompt is not None:
            prompt = prompt.expand(B, -1, -1)  # (P, C) or (B, P, C) -> (B, P, C)
            P = prompt.shape[1]
            x = torch.cat([prompt.to(x.dtype), x], dim=1)  # (B, P + T, C)
        used, room = (cache.used, cache.slots) if cache else (0, self.config.context)
        if used + P + T > room:
            raise ValueError(f"{used} cached + {P} prompt + {T} text tokens do not fit "
                             f"{'a cache' if cache else 'the context'} of {room}")
        if cache:
            positions = cache.positions(P + T)  # (B, P + T)
            mask = cache.mask(positions)  # (B, 1, P + T, S)
        else:
            positions = torch.arange(P + T, device=ids.device)[None]  # (1, P + T)
            mask = None  # plain causal attention
        x = x if first else self.place(x, positions)
        for i, block in enumerate(self.blocks):
            x = block(x, positions, mask, cache.kv[i] if cache else None, qkv if i == 0 else None)
        if cache:
            cache.advance(P + T, None if lengths is None else P + lengths)
        return x[:, P:]  # (B, T, C)

    def forward(self, ids, prompt=None, cache=None, lengths=None):
        """Logits (B, T, V) of the T text tokens.

        ids      (B, T) token ids
        prompt   (P, C) or (B, P, C) embeddings in front of the text; they get no logits
        cache    a Cache to read and extend: the text stands behind what each row of it holds
        lengths  (B,) real tokens a row, with a cache only; what is behind them is padding
        Raises ValueError when cached + prompt + text tokens exceed the context.
        """
        return self.head(self.hidden(ids, prompt, cache, lengths))

    def new_cache(self, batch, slots):
        """An empty Cache of `batch` rows for this model."""
        return Cache(self.config, batch, slots, self.wte.weight.device, self.wte.weight.dtype)

    def step(self, ids, cache):
        """Logits (B, V) behind one more token a row, ids (B, 1). `generate` calls it for every
        token but the first: faster code of the same numbers replaces this method and no other.
        """
        return self(ids, cache=cache)[:, -1]  # (B, V)

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, lengths=None, prompt=None, cache=None, stop=None,
                 temperature=0.0, generator=None, first=None):
        """ids (B, T) -> (B, T + max_new_tokens): new tokens right behind each row's own.

        lengths      (B,) real tokens a row (right padding); default all T
        prompt       as in `forward`
        cache        a Cache to start from (a prompt's, a prefix's); None: a new one
        stop         a token id: a row that produced it repeats it; ends when all rows have
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
        used, room = (cache.used, cache.slots) if cache else (0, self.config.context)
        if used + P + T + max_new_tokens > room:
            raise ValueError(f"{used} cached + {P} prompt + {T} text + {max_new_tokens} new tokens "
                             f"do not fit {'a cache' if cache else 'the context'} of {room}")
        cache = cache or self.new_cache(B, P + T + max_new_tokens)
        out = torch.cat([ids, ids.new_zeros(B, max_new_tokens)], dim=1)  # (B, T + max_new_tokens)
        done = torch.zeros(B, dtype=torch.bool, device=ids.device)
        # read the text; each row goes on behind its last real token
        x = self.hidden(ids, prompt, cache, lengths, first)  # (B, T, C)
        x = x[torch.arange(B, device=ids.device), lengths - 1]  # (B, C)
        logits = self.head(x[:, None])[:, -1]  # (B, V)
        for i in range(max_new_tokens):
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
            logits = self.step(new, cache)
        if stop is not None:  # rows that stopped early repeat the stop token to the end
            slot = torch.arange(T + max_new_tokens, device=ids.device)
            written, end = lengths + i, lengths + max_new_tokens
            out[(slot > written[:, None]) & (slot < end[:, None])] = stop
        return out

    # ---- what it costs

    def n_parameters(self):
        """Parameters, each counted once (a tied head is the embedding)."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Floating-point operations of a token's forward pass that attends to T tokens.

        2 a weight, and 4TC a layer for attention.
        """
        c, T = self.config, T or self.config.context
        linear = sum(m.in_features * m.out_features for m in self.blocks.modules()
                     if hasattr(m, "in_features"))
        return 2 * (linear + c.vocab_size * c.n_embd) + 4 * T * c.n_embd * c.n_layer


def main():
    """The lesson: a GPT over characters learns the first lines of this file by heart."""
    parser = argparse.ArgumentParser(description="A small GPT learns the first lines of model.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    args = parser.parse_args()
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    # the data: a token is a character, a row is 32 of them, each with the one that follows
    text = __doc__.split("What it leaves out")[0].strip()
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(c) for c in text])
    rows = ids.unfold(0, 33, 1)  # (rows, 33)
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(vocab_size=len(letters), n_layer=2, n_embd=64)).init_weights(generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    print(f"{model.n_parameters():,} parameters read {len(text)} characters; guessing among "
          f"{len(letters)} letters has a loss of {math.log(len(letters)):.2f} nats")
    for step in range(args.steps):
        batch = rows[torch.randint(len(rows), (16,), generator=generator)]  # (16, 33)
        logits = model(batch[:, :-1])  # (16, 32, V)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step + 1 == args.steps:
            print(f"step {step:4d}: loss {loss.item():.3f}")
    answer = model.generate(ids[None, :13], 76)[0].tolist()
    print(f"\n{text[:13]!r} goes on: {''.join(letters[i] for i in answer[13:])!r}")
    print("\nnext: python -m study train --size quick    # a GPT learns facts, and is asked")


if __name__ == "__main__":
    guard(main)
