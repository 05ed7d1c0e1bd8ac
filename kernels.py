"""
Packed weights, and the matmul that reads them without ever unpacking them to memory.

What it does: codes of 2, 3, 4 and 8 bits become 32-bit words and back, exactly; N:M sparse weights become the values that are
left and where each one stood; both together too. `PackedLinear` computes with them in place of `nn.Linear`. The packed tensors
are all there is, in memory and on disk: no float copy.

What it leaves out: code of our own in C++ or CUDA, integer activations, a fast kernel for unstructured sparsity.

Sources: Frantar et al. 2022 (GPTQ, arXiv 2210.17323, section 4: why a low-bit kernel is fast when it generates one token at a
time); Mishra et al. 2021 (2:4 sparsity, arXiv 2104.08378).
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from compress import Quantized

LANES = 16  # output rows side by side in memory: as many 32-bit words as the widest register of a CPU holds

# ---- codes in 32-bit words

# bits: (words, codes) of a cell. At 3 bits, ten codes a word leave two bits in each of three words: room for two codes more,
# each split over two words. So every width costs exactly its bits; 5 to 7 are stored as 8. 32 is a float, left as it is.
CELL = {2: (1, 16), 3: (3, 32), 4: (1, 8), 8: (1, 4), 32: (1, 1)}


def stored_bits(bits):
    """The width a code is stored in."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in [2, 8], got {bits}")
    return bits if bits <= 4 else 8


def pieces(bits):
    """Where each code of a cell lies: a list of ((word, shift in the word, shift in the code, how many bits), ...)."""
    if bits != 3:
        return [((0, i * bits, 0, bits),) for i in range(32 // bits)]
    whole = [((i // 10, i % 10 * 3, 0, 3),) for i in range(30)]
    return whole + [((0, 30, 0, 2), (1, 30, 2, 1)), ((1, 31, 0, 1), (2, 30, 1, 2))]


def to_words(codes, bits):
    """Codes (N, K) -> int32 words (N / 16, K * bits / 32, 16); N must fill whole lanes and K whole cells."""
    N, K = codes.shape
    words, per = CELL[bits]
    c = codes.long().view(N // LANES, LANES, K // per, per).permute(0, 2, 3, 1)  # (NB, cells, codes, 16)
    out = c.new_zeros(N // LANES, K // per, words, LANES)
    for i, code in enumerate(pieces(bits)):
        for word, at, low, n in code:
            out[:, :, word] |= ((c[:, :, i] >> low) & ((1 << n) - 1)) << at
    out = out - ((out >> 31) << 32)  # the top bit of an int32 is its sign
    return out.int().view(N // LANES, K // per * words, LANES)


def from_words(words, bits):
    """The way back: int32 words (NB, n, 16) -> int32 codes (NB, K, 16)."""
    NB = words.shape[0]
    n_words, per = CELL[bits]
    cells = words.view(NB, -1, n_words, 1, LANES)
    shifts = torch.arange(0, 32 - bits + 1, bits, dtype=torch.int32, device=words.device)  # of the codes whole in a word
    codes = (cells >> shifts[:, None]) & ((1 << bits) - 1)  # (NB, cells, words, codes a word, 16)
    codes = codes.flatten(2, 3)  # (NB, cells, codes, 16)
    split = [sum(((cells[:, :, word] >> at) & ((1 << n) - 1)) << low for word, at, low, n in code)
             for code in pieces(bits) if len(code) > 1]  # each (NB, cells, 1, 16)
    return torch.cat([codes, *split], dim=2).reshape(NB, -1, LANES) if split else codes.reshape(NB, -1, LANES)


# ---- packed weights

class Packed(NamedTuple):
    """A weight (N, K) in blocks of 16 output rows, NB = ceil(N / 16) of them, each block contiguous.

    The columns stand sorted by group on P positions: `span` to a group (the last may have fewer), a group's end padded to
    whole cells. `order[p]` is the column at position p, K for padding; None where that is just 0, 1, 2, ...
    An N:M sparse weight keeps n of every m positions: then words hold the P * n / m kept ones only, `span` counts those, and
    `place` says which of its m positions each of them has.
    """
    words: torch.Tensor          # (NB, P * n / m * bits / 32, 16) int32; or (NB, P * n / m, 16) float32 values, bits = 32
    scale: torch.Tensor | None   # (NB, G, 16) float32; None for float values
    zero: torch.Tensor | None    # (NB, G, 16) uint8;   None for float values
    order: torch.Tensor | None   # (P,) int32
    place: torch.Tensor | None   # (NB, P * n / m * place bits / 32, 16) int32, for N:M
    shape: tuple                 # (N, K)
    bits: int                    # of a code (5 to 7 are stored as 8); 32: float values
    span: int
    n_m: tuple | None            # (n, m)

    TENSORS = ("words", "scale", "zero", "order", "place")

    @property
    def nbytes(self):
        """Bytes in memory, everything included; on disk they are the same."""
        return sum(getattr(self, name).nbytes for name in self.TENSORS if getattr(self, name) is not None)

    def dequantize(self):
        """The float weight (N, K), equal to the last bit to what was packed."""
        if self.bits == 32:
            return _columns(self, self.words, 0.0)
        codes = from_words(self.words, stored_bits(self.bits))  # (NB, P * n / m, 16)
        return _columns(self, _by_group(self.scale, self, codes) * (codes - _by_group(self.zero, self, codes)), 0.0)


def _by_group(values, packed, like):
    """(NB, G, 16) -> each position's own (NB, positions, 16)."""
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(packed.span, dim=1)[:, :like.shape[1]]


def place_bits(m):
    """Bits for a place among m, in a width we can store: 2:4 takes 2, 4:8 takes 3."""
    return max(2, (m - 1).bit_length())


def _columns(packed, values, filler):
    """Values by position (NB, positions, 16) -> by column (N, K); what N:M left out becomes `filler`, a number or (N, P)."""
    N, K = packed.shape
    values = values.transpose(1, 2).flatten(0, 1)[:N]  # (N, positions)
    if packed.n_m:
        n, m = packed.n_m
        place = from_words(packed.place, place_bits(m)).transpose(1, 2).flatten(0, 1)[:N]  # (N, positions)
        cell = torch.arange(values.shape[1], device=values.device) // n * m
        dense = values.new_zeros(N, values.shape[1] // n * m) + filler
        values = dense.scatter(1, cell + place.long(), values)  # (N, P)
    if packed.order is None:
        return values[:, :K].contiguous()
    out = values.new_zeros(N, K + 1)
    out[:, packed.order.long()] = values
    return out[:, :K].contiguous()


def _arrange(group, groups, unit):
    """Give each element its position: sorted by group, every group padded to a multiple of `unit`.

    group (K,) -> order (P,): the element at each position, K for padding; and span, the positions of one group.
    """
    K = group.numel()
    count = torch.bincount(group, minlength=groups)
    start = count.cumsum(0) - count
    span, last = (-(-int(c) // unit) * unit for c in (count.max(), count[-1]))
    order = torch.full(((groups - 1) * span + last,), K, device=group.device)
    element = group.argsort(stable=True)
    order[group[element] * span + torch.arange(K, device=group.device) - start[group[element]]] = element
    return order, span


def _lanes(t, filler=0):
    """Rows (N, ...) -> blocks (NB, ..., 16), N padded to whole lanes."""
    t = F.pad(t, (0, 0, 0, -t.shape[0] % LANES), value=filler)
    return t.view(-1, LANES, t.shape[1]).transpose(1, 2).contiguous()


def _order(order, K):
    """None where positions are simply columns, padding behind them; else int32."""
    plain = torch.arange(order.numel(), device=order.device).clamp_max(K)
    return None if torch.equal(order, plain) else order.int()


def pack(quantized):
    """Quantized (N, K) -> Packed, losslessly: any shape, any groups, act_order or not.

    Raises ValueError for codes that do not fit their bits.
    """
    codes, scale, zero, group, bits = quantized
    stored, (N, K) = stored_bits(bits), codes.shape
    if int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit {bits} bits")
    order, span = _arrange(group, scale.shape[1], CELL[stored][1])
    codes = F.pad(codes, (0, 1, 0, -N % LANES))[:, order]  # (N padded, P)
    return Packed(to_words(codes, stored), _lanes(scale), _lanes(zero.to(torch.uint8)), _order(order, K), None,
                  (N, K), bits, span, None)


def pack_sparse(weight, n_m):
    """An N:M sparse weight -> Packed: a float (N, K) with zeros, or a Quantized whose pruned codes equal their zero-point.

    Raises ValueError where more than n of m neighbours are not zero, or where neighbours belong to different groups
    (act_order scatters them: such a weight is packed as a plain quantized one).
    """
    n, m = n_m
    if not 0 < n < m <= 256:
        raise ValueError(f"N:M needs 0 < n < m <= 256, got {n}:{m}")
    quantized = isinstance(weight, Quantized)
    values = weight.codes if quantized else weight.float()
    N, K = values.shape
    pad = (0, -K % m)
    zero = weight.zero.to(torch.uint8)[:, weight.group] if quantized else torch.zeros_like(values)  # (N, K)
    kept = F.pad(values != zero, pad).view(N, -1, m)  # (N, cells, m)
    if int(kept.sum(-1).max()) > n:
        raise ValueError(f"not {n}:{m} sparse: {int(kept.sum(-1).max())} of {m} neighbours are not zero")
    place = kept.byte().argsort(dim=-1, descending=True, stable=True)[..., :n].sort(dim=-1).values  # kept ones, then fillers
    values = F.pad(values, pad).view(N, -1, m).gather(-1, place)  # (N, cells, n)
    group = F.pad(weight.group, pad, value=int(weight.group[-1])) if quantized else place.new_zeros(values.shape[1] * m)
    group = group.view(-1, m)
    if bool((group != group[:, :1]).any()):
        raise ValueError(f"{m} neighbours belong to different groups of the quantization: act_order and N:M do not combine")
    bits = weight.bits if quantized else 32
    stored, stored_place = stored_bits(bits) if quantized else 32, place_bits(m)
    unit = math.lcm(CELL[stored][1], CELL[stored_place][1], n) // n  # in cells
    order, span = _arrange(group[:, 0], weight.scale.shape[1] if quantized else 1, unit)  # of cells
    values, place = (F.pad(t, (0, 0, 0, 1, 0, -N % LANES))[:, order].flatten(1) for t in (values, place))
    columns = torch.where(order[:, None] < group.shape[0], order[:, None] * m + torch.arange(m, device=order.device), K)
    scale, zero = (_lanes(weight.scale), _lanes(weight.zero.to(torch.uint8))) if quantized else (None, None)
    words = to_words(values, stored) if quantized else _lanes(values)
    return Packed(words, scale, zero, _order(columns.flatten().clamp_max(K), K), to_words(place, stored_place),
                  (N, K), bits, span * n, (n, m))


def unpack(packed):
    """The Quantized that was packed."""
    if packed.bits == 32:
        raise ValueError("these are float values, not codes: use packed.dequantize()")
    (N, K), G = packed.shape, packed.scale.shape[1]
    scale, zero = (t.transpose(1, 2).flatten(0, 1)[:N].contiguous() for t in (packed.scale, packed.zero))  # (N, G)
    codes = from_words(packed.words, stored_bits(packed.bits))  # (NB, positions, 16)
    n, m = packed.n_m or (1, 1)
    group = torch.arange(codes.shape[1] // n * m, device=codes.device) // (packed.span // n * m)  # (P,)
    codes = _columns(packed, codes, zero[:, group].int()).byte()
    if packed.order is not None:
        group = group.new_zeros(K + 1).scatter(0, packed.order.long(), group)
    return Quantized(codes, scale, zero, group[:K], packed.bits)


# ---- the matmul, eager: short and obviously right

class _Dequantized(torch.autograd.Function):
    """x @ Wᵀ with the float weight rebuilt where it is needed: neither forward nor backward keeps a copy of it."""

    @staticmethod
    def forward(ctx, x, packed):
        ctx.packed = packed
        return F.linear(x, packed.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.packed.dequantize().to(g.dtype), None


def matmul(x, packed):
    """x (..., K) times the packed weight (N, K) transposed -> (..., N), in the dtype of x; gradients flow to x."""
    if x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the packed weight takes {packed.shape[1]}")
    return _Dequantized.apply(x, packed)


# ---- the layer

class PackedLinear(nn.Module):
    """What replaces nn.Linear: buffers only, nothing to train, no float copy. Gradients flow through it to its input."""

    def __init__(self, packed, bias=None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.layout = packed._replace(**dict.fromkeys(Packed.TENSORS))  # the numbers; the tensors live in the buffers
        for name in Packed.TENSORS:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def packed(self):
        return self.layout._replace(**{name: getattr(self, name) for name in Packed.TENSORS})

    def forward(self, x):
        y = matmul(x, self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def spec(self):
        """What `from_spec` needs to build this module again, empty: the layout's numbers, shape and dtype of each buffer."""
        numbers = {name: getattr(self.layout, name) for name in ("shape", "bits", "span", "n_m")}
        return {**numbers, "buffers": {name: [list(t.shape), str(t.dtype).removeprefix("torch.")]
                                       for name, t in self.named_buffers()}}

    def extra_repr(self):
        sparse = ", {}:{} sparse".format(*self.layout.n_m) if self.layout.n_m else ""
        return f"{self.in_features}, {self.out_features}, bits={self.layout.bits}{sparse}, {self.packed.nbytes} bytes"


DTYPES = {"int32": torch.int32, "uint8": torch.uint8, "float32": torch.float32, "bfloat16": torch.bfloat16}


def from_spec(spec):
    """An empty PackedLinear for `load_state_dict` to fill. Raises ValueError for a specification that is none of ours."""
    try:
        buffers = {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (shape, dtype) in spec["buffers"].items()}
        bias = buffers.pop("bias", None)
        packed = Packed(**dict.fromkeys(Packed.TENSORS) | buffers, shape=tuple(spec["shape"]), bits=spec["bits"],
                        span=spec["span"], n_m=tuple(spec["n_m"]) if spec["n_m"] else None)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not the specification of a packed layer: {error}") from None
    return PackedLinear(packed, bias)
