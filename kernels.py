"""
Packed weights, and the matmul that reads them without ever unpacking them to memory.

What it does: codes of 2, 3, 4 and 8 bits become 32-bit words and back, exactly; N:M sparse weights become the values
that are left and where each one stood; both together too. `PackedLinear` computes with them in place of `nn.Linear`.
The packed tensors are all there is, in memory and on disk: no float copy.

What it leaves out: code of our own in C++ or CUDA, integer activations, a fast kernel for unstructured sparsity.

    python kernels.py              # runs tests/bench_kernels.py: every competitor, several shapes, whole models
    python kernels.py --quick      # only what a claim is made about

Sources: Frantar et al. 2022 (GPTQ, arXiv 2210.17323, section 4: why a low-bit kernel is fast when it generates one
token at a time); Mishra et al. 2021 (2:4 sparsity, arXiv 2104.08378).
"""
import copy
import math
import pathlib
import runpy
import warnings
import weakref
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.grids import Quantized

LAYOUT = 3  # of words, in every file: whoever changes it counts on
LANES = 16  # output rows side by side in memory: as many 32-bit words as the widest register of a CPU holds

# ---- codes in 32-bit words

# bits: (words, codes) of a cell. At 3 bits, ten codes a word leave two bits in each of three words: room for two codes
# more, each split over two words. So every width costs exactly its bits; 5 to 7 are stored as 8. 32 is a float, left
# as it is.
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


def flipped(codes, bits, dim):
    """Codes with half their range added, modulo it, where they will fill the top bits of a word; its own inverse.

    The top bit of an int32 counts negative. So stored, such a code reads, in place, as itself less half the range.
    """
    per = 32 // bits if bits != 3 else codes.shape[dim] + 1  # at 3 bits no whole code ends a word
    last = torch.arange(codes.shape[dim], device=codes.device) % per == per - 1
    half = (last.int() << bits - 1).to(codes.dtype).view(-1, *[1] * (codes.dim() - 1 - dim))
    return codes ^ half


def from_words(tiles, bits):
    """The way back: tiles of int32 words (T, NB, ..., 16) -> int32 codes (NB, K, 16)."""
    words = tiles.transpose(0, 1).flatten(1, -2)  # (NB, n, 16)
    NB = words.shape[0]
    n_words, per = CELL[bits]
    cells = words.reshape(NB, -1, n_words, 1, LANES)
    shifts = torch.arange(0, 32 - bits + 1, bits, dtype=torch.int32, device=words.device)  # of codes whole in a word
    codes = (cells >> shifts[:, None]) & ((1 << bits) - 1)  # (NB, cells, words, codes a word, 16)
    codes = codes.flatten(2, 3)  # (NB, cells, codes, 16)
    split = [sum(((cells[:, :, word] >> at) & ((1 << n) - 1)) << low for word, at, low, n in code)
             for code in pieces(bits) if len(code) > 1]  # each (NB, cells, 1, 16)
    return torch.cat([codes, *split], dim=2).reshape(NB, -1, LANES) if split else codes.reshape(NB, -1, LANES)


# ---- packed weights

class Packed(NamedTuple):
    """A weight (N, K) in blocks of 16 output rows, NB = ceil(N / 16) of them.

    The columns stand sorted by group on P positions, `span` to a group, its end padded to whole cells. `order[p]` is
    the column at position p, K for padding; None where that is just 0, 1, 2, ... An N:M sparse weight keeps n of every
    m positions: then words hold the P * n / m kept ones only, `span` counts those, and `place` says which of its m
    positions each has. Positions are cut into T tiles, the outermost dimension, so short that a tile's part of x stays
    in the fastest cache while all rows pass by. Before the words of a group stand the 32 bits of its scale, so that the
    loop reads one stream, strictly upwards: that is what a core recognises and reads ahead of. Scales in a tensor of
    their own, or behind the words though needed first, make it lose the thread.
    """
    words: torch.Tensor          # (T, NB, groups of a tile, 1 + words of a group, 16) int32; bits 32: floats, no scale
    zero: torch.Tensor | None    # (NB, G, 16) uint8;   None for float values
    order: torch.Tensor | None   # (P,) int32
    place: torch.Tensor | None   # (T, NB, P * n / m * place bits / 32 / T, 16) int32, for N:M
    shape: tuple                 # (N, K)
    bits: int                    # of a code (5 to 7 are stored as 8); 32: float values
    span: int
    n_m: tuple | None            # (n, m)

    TENSORS = ("words", "zero", "order", "place")

    @property
    def nbytes(self):
        """Bytes in memory, everything included; on disk they are the same."""
        return sum(getattr(self, name).nbytes for name in self.TENSORS if getattr(self, name) is not None)

    @property
    def codes(self):
        """The words without the scales: (T, NB, groups of a tile, words of a group, 16)."""
        return self.words if self.bits == 32 else self.words[..., 1:, :]

    @property
    def scale(self):
        """(NB, G, 16) float32."""
        scale = self.words[..., 0, :].view(torch.float32)  # (T, NB, groups of a tile, 16)
        return scale.transpose(0, 1).flatten(1, 2) if self.zero.shape[1] > 1 else scale[0]

    def dequantize(self):
        """The float weight (N, K), equal to the last bit to what was packed."""
        if self.bits == 32:
            return _columns(self, self.words.transpose(0, 1).flatten(1, -2), 0.0)
        bits = stored_bits(self.bits)
        codes = flipped(from_words(self.codes, bits), bits, 1)  # (NB, P * n / m, 16)
        return _columns(self, _by_group(self.scale, self) * (codes - _by_group(self.zero, self)), 0.0)


def _by_group(values, packed):
    """(NB, G, 16) -> each position's own (NB, positions, 16)."""
    return values.repeat_interleave(packed.span, dim=1)


def place_bits(m):
    """Bits for a place among m, in a width we can store: 2:4 takes 2, 4:8 takes 3."""
    return stored_bits(max(2, (m - 1).bit_length()))


def _columns(packed, values, filler):
    """Values by position (NB, positions, 16) -> by column (N, K); what N:M left out becomes `filler`, a number or (N,
    P).
    """
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
    span = -(-int(count.max()) // unit) * unit
    order = torch.full((groups * span,), K, device=group.device)
    element = group.argsort(stable=True)
    order[group[element] * span + torch.arange(K, device=group.device) - start[group[element]]] = element
    return order, span


def _lanes(t, filler=0):
    """Rows (N, ...) -> blocks (NB, ..., 16), N padded to whole lanes."""
    t = F.pad(t, (0, 0, 0, -t.shape[0] % LANES), value=filler)
    return t.view(-1, LANES, t.shape[1]).transpose(1, 2).contiguous()


def n_tiles(span, groups, unit):
    """How many tiles to cut the positions into: tiles of at most 2,048 positions if that cuts no cell and no one of
    many groups.
    """
    atom, n = (span, groups) if groups > 1 else (unit, span // unit)  # n atoms, not to be cut
    fits = [T for T in range(1, n + 1) if n % T == 0 and n // T * atom <= 2048]
    return fits[0] if fits and n // fits[0] * atom >= 128 else 1 if groups == 1 or span <= 2048 else groups


def _tiled(words, T, scale=None):
    """(NB, n, 16) -> (T, NB, n / T, 16); with scale (NB, G, 16) -> (T, NB, G / T, 1 + n / G, 16): the scale of a
    group, then the group. One group in several tiles has it in each.
    """
    NB = words.shape[0]
    tiles = words.view(NB, T, -1, LANES).transpose(0, 1)
    if scale is None:
        return tiles.contiguous()
    scale = scale.view(torch.int32).view(NB, -1, 1, LANES)
    scale = scale.view(NB, T, -1, 1, LANES).transpose(0, 1) if scale.shape[1] > 1 else scale.expand(T, NB, 1, 1, LANES)
    return torch.cat([scale, tiles.view(*scale.shape[:3], -1, LANES)], dim=3)


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
    words = to_words(flipped(codes, stored, 1), stored)
    words = _tiled(words, n_tiles(span, scale.shape[1], CELL[stored][1]), _lanes(scale))
    return Packed(words, _lanes(zero.to(torch.uint8)), _order(order, K), None, (N, K), bits, span, None)


def pack_sparse(weight, n_m):
    """An N:M sparse weight -> Packed: a float (N, K) with zeros, or a Quantized whose pruned codes are the zero-point.

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
    place = kept.byte().argsort(dim=-1, descending=True, stable=True)[..., :n]  # kept ones, then fillers
    place = place.sort(dim=-1).values
    values = F.pad(values, pad).view(N, -1, m).gather(-1, place)  # (N, cells, n)
    group = F.pad(weight.group, pad, value=int(weight.group[-1])) if quantized else place.new_zeros(values.shape[1] * m)
    group = group.view(-1, m)
    if bool((group != group[:, :1]).any()):
        raise ValueError(f"{m} neighbours belong to different groups of the quantization: "
                         "act_order and N:M do not combine")
    bits = weight.bits if quantized else 32
    stored, stored_place = stored_bits(bits) if quantized else 32, place_bits(m)
    unit = math.lcm(CELL[stored][1], CELL[stored_place][1], n)  # positions that fill whole cells of everything
    order, span = _arrange(group[:, 0], weight.scale.shape[1] if quantized else 1, unit // n)  # of cells
    values, place = (F.pad(t, (0, 0, 0, 1, 0, -N % LANES))[:, order].flatten(1) for t in (values, place))
    columns = torch.where(order[:, None] < group.shape[0], order[:, None] * m + torch.arange(m, device=order.device), K)
    scale, zero = (_lanes(weight.scale), _lanes(weight.zero.to(torch.uint8))) if quantized else (None, None)
    words = to_words(flipped(values, stored, 1), stored) if quantized else _lanes(values)
    T = n_tiles(span * n, scale.shape[1] if quantized else 1, unit)
    words = _tiled(words, T, scale) if quantized else _tiled(words, T)[:, :, None]
    return Packed(words, zero, _order(columns.flatten().clamp_max(K), K), _tiled(to_words(place, stored_place), T),
                  (N, K), bits, span * n, (n, m))


def unpack(packed):
    """The Quantized that was packed."""
    if packed.bits == 32:
        raise ValueError("these are float values, not codes: use packed.dequantize()")
    (N, K), G = packed.shape, packed.scale.shape[1]
    scale, zero = (t.transpose(1, 2).flatten(0, 1)[:N].contiguous() for t in (packed.scale, packed.zero))  # (N, G)
    bits = stored_bits(packed.bits)
    codes = flipped(from_words(packed.codes, bits), bits, 1)  # (NB, positions, 16)
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


# ---- the matmul, fused
#
# A model that writes one token after another reads every weight once a token, and uses it for one multiplication. A
# core does dozens of multiplications in the time one float takes to arrive from memory. So the time is the bytes, and
# 4-bit weights can be nearly eight times as fast as 32-bit ones - unless unpacking costs a trip to memory of its own:
# dequantizing first writes the floats and reads them back, which is slower than never having packed them. `_fused` is
# one loop that does it all in registers. For a register of 16 words (16 output rows; at 4 bits 8 codes of each), three
# instructions a code are left:
#
#     and   keeps one code of each word where it stands: bits 4i to 4i + 3 read as the integer code * 16^i
#     cvt   makes 16 floats of them, exactly: they have four significant bits
#     fma   multiplies by x[k], the same for all 16 rows, and adds up; x[k] was divided by 16^i beforehand, exactly too
#
# No shuffle, no sum across a register, and no shift, except one for the upper half of the codes of 2 and 3 bits: a mask
# for each of 16 places is more than the registers hold, and one reloaded for every code costs as much as the code. The
# code at the top of a word is stored less half its range (`flipped`), so that it stands there as a signed number; half
# its range times x[k] is added with the zero-point.
# Scale and zero-point come in once a group g: with W = s (q - z),
#
#     y_n = sum over g of s_ng * (sum over k in g of q_nk x_k  -  z_ng * sum over k in g of x_k)
#
# Inductor, torch.compile's compiler, turns the Python below into that loop: the dimension of 16 becomes the vector, the
# Python loops become a straight-line body, and sums over the same words become one loop nest. To read what it made
# (search for "_mm", "Vectorized"):
#
#     TORCH_LOGS=output_code python kernels.py --quick 2>&1 | less
#
# With many rows of x the multiplications cost more than the bytes. Then W is dequantized, so many rows at a time that
# they stay in the cache, and a plain matmul reads them there.

FEW = 4          # most rows of x the fused loop is written out for; 2 and 3 are padded to it: two compilations a shape
HALF = {2: 16, 3: 15}  # codes from here up are read in the word shifted down: so they share the masks of the lower ones
UNROLL = 32      # positions written out in the loop body; for N:M a fraction of 1 / M, as each takes M - 1 choices
CHUNK = 1 << 20  # weights dequantized at a time: 4 MB
# Inductor's own limits would store the long expression half-way, and write it out again for each of a few groups, which
# takes minutes to compile; "fast" lets it multiply and add in one go. It would also look at the sizes of all that is
# given, at every call.
OPTIONS = {"realize_opcount_threshold": 1 << 20, "realize_reads_threshold": 1 << 20,
           "realize_acc_reads_threshold": 1 << 20, "unroll_reductions_threshold": 1,
           "size_asserts": False, "alignment_asserts": False, "cpp.enable_floating_point_contract_flag": "fast"}


def _code(words, where, half=32):
    """One code of each cell as int32 (..., 16) from the cell's words, the power of two it comes out too large by, and
    what it then lacks: half its range at the top of a word.
    """
    (word, at, _, n), *rest = where
    if not rest:
        top = at + n == 32
        word, at = (words[word], at) if at < half else (words[word] >> half, at - half)
        return word & (-(1 << at) if top else ((1 << n) - 1) << at), 2.0 ** at, 2.0 ** (n - 1) if top else 0.0
    return sum(((words[w] >> s) & ((1 << k) - 1)) << low for w, s, low, k in where), 1.0, 0.0  # split over words


def _chosen(x, place, first, last):
    """x[..., place] for places from first to last: x (..., m), place (..., 16) -> (..., 16); a compare and a blend
    each.
    """
    out = x[..., first, None]
    for c in range(first + 1, last + 1):
        out = torch.where(place == c, x[..., c, None], out)
    return out


def _stored(x):
    """x itself, but computed once: as_strided needs memory to stride over. Else each row block would compute x anew."""
    return x.as_strided(x.shape, x.stride())


def _fused(x, packed):
    """x (M, K) with few rows M -> (M, N), in one pass over the packed weight."""
    (M, K), dtype = x.shape, x.dtype
    bits = 32 if packed.bits == 32 else stored_bits(packed.bits)
    (n, m), (cell_words, per) = packed.n_m or (1, 1), CELL[bits]
    unit = math.lcm(per, CELL[place_bits(m)][1], n) if packed.n_m else per
    T, NB, groups, n_words, _ = packed.codes.shape
    tile = groups * n_words // cell_words * per  # positions
    body = unit * math.gcd(max(1, UNROLL // m // unit), min(tile, packed.span) // unit)  # positions written out
    nest = (T, NB, groups, tile // groups // body)  # over tiles, row blocks; sums over groups and the bodies of a group
    x = x.float()
    if packed.order is not None:
        x = F.pad(x, (0, 1))[:, packed.order]
    elif T * tile // n * m > K:
        x = F.pad(x, (0, T * tile // n * m - K))
    x = x.view(M, T, 1, *nest[2:], body // n * m)
    words = packed.codes.unflatten(3, (nest[3], -1)).unbind(-2)  # each (T, NB, groups, bodies, 16)
    if bits < 32:
        scale = packed.words[..., :1, :].view(torch.float32)  # (T, NB, groups, 1, 16)
        zero = packed.zero.view(NB, -1, groups, 1, LANES).transpose(0, 1)  # the same, or 1 for T
        codes = [_code(words[c:c + cell_words], where, HALF.get(bits, 32))
                 for c in range(0, len(words), cell_words) for where in pieces(bits)]
    if packed.n_m:
        at = pieces(place_bits(m))
        places = packed.place.view(*nest, -1, LANES).unbind(-2)
        cell = CELL[place_bits(m)][0]
        places = [sum(((places[c + w] >> s) & ((1 << k) - 1)) << low for w, s, low, k in where)
                  for c in range(0, len(places), cell) for where in at]
        x = _stored(x).unflatten(-1, (-1, m))  # (M, T, 1, groups, bodies, cells, m)
        values = words if bits == 32 else [code.float() * (1 / factor) - (zero.float() - lack)
                                           for code, factor, lack in codes]
        inputs = [[_chosen(x[i, ..., p // n, :], places[p], p % n, m - n + p % n) for p in range(body)]
                  for i in range(M)]
    else:
        values = [code.float() for code, *_ in codes]
        x_sum = x.sum(-1)[..., None]  # (M, T, 1, groups, bodies, 1)
        lacks = (x * torch.tensor([lack for *_, lack in codes], device=x.device)).sum(-1)[..., None]
        x = _stored(x * torch.tensor([1 / factor for _, factor, _ in codes], device=x.device))
        inputs = [[x[i, ..., p, None] for p in range(body)] for i in range(M)]
    y = []
    for i in range(M):
        sums = [0.0] * (8 if body >= 16 else 4)  # side by side: an addition takes four cycles, two can start in each
        for p in range(body):
            sums[p % len(sums)] = sums[p % len(sums)] + values[p] * inputs[i][p]
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[::2], sums[1::2])]
        total, = sums
        if not packed.n_m:
            total = total + (lacks[i] - zero.float() * x_sum[i])
        y.append((total if bits == 32 else total * scale).sum((2, 3)))  # (T, NB, 16)
    return torch.stack(y).sum(1).view(M, -1)[:, :packed.shape[0]].to(dtype)  # (M, N)


def few(packed):
    """Up to how many rows of x the fused loop is the faster one. N:M selects anew for each: more takes long to compile.
    """
    return 1 if packed.n_m else FEW


def _rows(packed, first, last):
    """Row blocks first .. last of a packed weight, as a packed weight."""
    N = min(packed.shape[0], last * LANES) - first * LANES
    cut = {name: t[:, first:last] if name in ("words", "place") else t[first:last]
           for name in ("words", "place", "zero") if (t := getattr(packed, name)) is not None}
    return packed._replace(shape=(N, packed.shape[1]), **cut)


def _dequantized(like, packed):
    """The float weight (N, K), in the dtype of `like`."""
    return packed.dequantize().to(like.dtype)


def _by_position(like, packed):
    """The float weight as (P, N padded): 16 rows lie side by side in memory as in the words, so no lane has to move."""
    bits = stored_bits(packed.bits)
    codes = flipped(from_words(packed.codes, bits), bits, 1).unflatten(1, (-1, packed.span))  # (NB, G, span, 16)
    values = packed.scale[:, :, None] * (codes - packed.zero[:, :, None])
    return values.flatten(1, 2).transpose(0, 1).flatten(1).to(like.dtype)  # (P, NB * 16)


_ready = {}  # {all that it takes for granted: compiled code}


def _compiled(f, tensors, dynamic=()):
    """f(*tensors) compiled for tensors such as these: called with a list of them, it returns a tuple of one.

    dynamic  {number of a tensor: its dimension that may have any size}

    This is torch.compile(f) by hand: record the operations, hand them to Inductor, its compiler. What is left out
    stands between a caller and the code: a dozen Python calls that find out, every time, whether the code fits. Where
    weights stream through the cache, even Python has to come from memory, and a small product takes no longer than
    that. So whoever calls the code has to know that it fits: see what `_run` and `Decoder` take for a key.
    """
    from torch._inductor.compile_fx import compile_fx_inner  # here, as these imports take a second
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
    mode, dynamic = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), dict(dynamic)
    sizes = [[DimDynamic.DYNAMIC if dynamic.get(i) == d else DimDynamic.STATIC for d in range(t.dim())]
             for i, t in enumerate(tensors)]
    fakes = [mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(size)) for t, size in zip(tensors, sizes)]
    # f runs once, on shapes without numbers, and each operation it comes to is recorded: also the one that writes into
    # a cache, in place. Made functional, as is usual, it would copy the whole cache twice a token.
    _State.tracing = True
    try:
        graph = make_fx(lambda *given: (f(*given),), select_decomp_table())(*fakes)
    finally:
        _State.tracing = False
    # the last two let the code be kept on the disk
    with torch._inductor.config.patch(OPTIONS), torch._functorch.config.patch(bundled_autograd_cache=False), \
            torch._guards.tracing(torch._guards.TracingContext(mode)):
        return compile_fx_inner(graph, fakes).current_callable


def _run(f, x, packed):
    """f(x, packed), compiled at the first call for such an x, a layout and a number of threads."""
    tensors = [x, *(t for t in packed[:len(Packed.TENSORS)] if t is not None)]
    key = (f, x.shape, x.dtype, x.device, packed.words.shape, packed.words.stride(), packed[len(Packed.TENSORS):],
           len(tensors), torch.get_num_threads())
    if key not in _ready:
        names = [name for name in Packed.TENSORS if getattr(packed, name) is not None]
        _ready[key] = _compiled(lambda x, *given: f(x, packed._replace(**dict(zip(names, given)))), tensors)
    return _ready[key](tensors)[0]


def _fused_matmul(x, packed):
    """x (M, K), any M, without gradients."""
    (M, K), N, NB = x.shape, packed.shape[0], packed.words.shape[1]
    if M <= few(packed):
        y = _run(_fused, x.contiguous() if M in (1, FEW) else F.pad(x, (0, 0, 0, FEW - M)), packed)
        return y if M == len(y) else y[:M]
    y = x.new_empty(M, NB * LANES)
    if not packed.n_m:  # else where each value stands differs from row to row
        P = packed.zero.shape[1] * packed.span
        x = F.pad(x, (0, P - K)) if packed.order is None else F.pad(x, (0, 1))[:, packed.order]  # (M, P)
    blocks = max(1, CHUNK // (LANES * K))
    for first in range(0, NB, blocks):
        part = _rows(packed, first, min(NB, first + blocks))
        W = _run(_dequantized, x[:0], part).T if packed.n_m else _run(_by_position, x[:0], part)  # (P or K, rows)
        torch.mm(x, W, out=y[:, first * LANES:][:, :W.shape[1]])
    return y[:, :N]


class _State:
    """The one switch, and why compilation was given up, if it was."""
    enabled = False
    failure = None
    tracing = False  # a larger graph, such as a block's, is being written down


def use_compile(enabled):
    """Whether PackedLinear calls the fused matmul. Off at first: compiling takes seconds, a small model never earns
    them back.
    """
    _State.enabled = bool(enabled)


def compile_failure():
    """Why the fused matmul fell back to the eager one on this machine; None if it did not."""
    return _State.failure


def matmul(x, packed, fused=True):
    """x (..., K) times the packed weight (N, K) transposed -> (..., N), in the dtype of x.

    fused=False is the eager twin. Gradients flow to x; while they are recorded the eager twin computes. Without a C++
    compiler the fused one warns once and does the same: `compile_failure()` has the reason.
    """
    if x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the packed weight takes {packed.shape[1]}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (M, K)
    if fused and len(rows) and not (x.requires_grad and torch.is_grad_enabled()):
        y = _or_eager(_fused_matmul, _Dequantized.apply, rows, packed)
    else:
        y = _Dequantized.apply(rows, packed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], packed.shape[0])


def _or_eager(compiled, eager, *arguments):
    """compiled(*arguments); on a machine that cannot compile, eager(*arguments), saying so once."""
    if _State.failure is None:
        try:
            return compiled(*arguments)
        except (RuntimeError, OSError) as error:  # OSError: the folder of the compiled code cannot be written
            if isinstance(error, RuntimeError) and type(error).__name__ != "InductorError":  # imports take a second
                raise
            _State.failure = str(error).strip().splitlines()[0]
            warnings.warn(f"no fused matmul, the eager one instead: {_State.failure}", RuntimeWarning, stacklevel=3)
    return eager(*arguments)


# ---- the layer

class PackedLinear(nn.Module):
    """What replaces nn.Linear: buffers only, nothing to train, no float copy. Gradients flow through it to its input.
    """

    def __init__(self, packed, bias=None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.layout = packed._replace(**dict.fromkeys(Packed.TENSORS))  # the numbers; the tensors live in the buffers
        for name in Packed.TENSORS:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def packed(self):
        at = self.layout
        return Packed(self.words, self.zero, self.order, self.place, at.shape, at.bits, at.span, at.n_m)

    def forward(self, x):
        """x (..., in) -> (..., out): x Wᵀ + bias."""
        if _State.tracing:  # part of a larger graph, such as a block's
            rows = x.reshape(-1, self.in_features)
            y = _fused(rows, self.packed) if len(rows) <= few(self.packed) else \
                F.linear(rows, _dequantized(x, self.packed))
            y = y.view(*x.shape[:-1], self.out_features)
        else:
            y = matmul(x, self.packed, _State.enabled)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def spec(self):
        """What `from_spec` needs to build this module again, empty: the layout's numbers, shape and dtype of each
        buffer.
        """
        numbers = {name: getattr(self.layout, name) for name in ("shape", "bits", "span", "n_m")}
        return {"layout": LAYOUT, **numbers, "buffers": {name: [list(t.shape), str(t.dtype).removeprefix("torch.")]
                                       for name, t in self.named_buffers()}}

    def extra_repr(self):
        sparse = ", {}:{} sparse".format(*self.layout.n_m) if self.layout.n_m else ""
        return f"{self.in_features}, {self.out_features}, bits={self.layout.bits}{sparse}, {self.packed.nbytes} bytes"


DTYPES = {name: getattr(torch, name) for name in ("int32", "uint8", "float64", "float32", "float16", "bfloat16")}


def from_spec(spec):
    """An empty PackedLinear for `load_state_dict` to fill. Raises ValueError for a specification that is none of ours.
    """
    if isinstance(spec, dict) and spec.get("layout") != LAYOUT:
        raise ValueError(f"packed in layout {spec.get('layout')}, this is layout {LAYOUT}: compress the model again")
    try:
        buffers = {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (shape, dtype) in spec["buffers"].items()}
        bias = buffers.pop("bias", None)
        packed = Packed(**dict.fromkeys(Packed.TENSORS) | buffers, shape=tuple(spec["shape"]), bits=spec["bits"],
                        span=spec["span"], n_m=tuple(spec["n_m"]) if spec["n_m"] else None)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not the specification of a packed layer: {error}") from None
    return PackedLinear(packed, bias)


# ---- one token through a whole model
#
# Each linear layer compiled alone loses time to calls and to activations written out between them; the whole model as
# one graph takes very long to compile. So: one block, compiled once, with its weights as arguments, called for every
# layer. Keys, values and the token's position stay in tensors, so the loop of GPT.generate never
# waits for the device.

class _Step(nn.ModuleList):
    """A block, or the final norm and the head: modules as one function of tensors."""

    def forward(self, x, positions=None, mask=None, *past):
        if past:
            return self[0](x, positions, mask, *past)
        norm, lm_head = self
        return lm_head(norm(x))


class Decoder:
    """What stands in the place of `GPT.step`: one token of a few rows through compiled blocks and a compiled head.

    While it goes on with one cache the model is taken to stay as it is. Many rows take the ordinary way.
    """

    def __init__(self, model):
        self.model, self.cache = model, None
        self.known = {}  # {a module's id: its tensors, its compiled code}

    def __deepcopy__(self, memo):
        return Decoder(copy.deepcopy(self.model, memo))

    def __call__(self, ids, cache):
        """Logits (B, V) behind one more token a row, ids (B, 1)."""
        if self.cache is None or self.cache() is not cache:
            self.known, self.cache = {}, weakref.ref(cache)
        model, positions = self.model, cache.positions(1)
        mask, x = cache.mask(positions), model.place(model.wte(ids), positions)
        for block, kv in zip(model.blocks, cache.kv):
            x = self.run((block,), x, positions, mask, kv)
        cache.advance(1)
        return self.run((model.norm, model.lm_head), x)[:, -1]

    def run(self, modules, *given):
        if len(given[0]) > FEW:
            return self.eager(modules, *given)
        return _or_eager(self.compiled, self.eager, modules, *given)

    def eager(self, modules, *given):
        """What a block, or the final norm and the head, make of the given tensors."""
        return _Step(modules)(*given)

    def compiled(self, modules, *given):
        """The same, by code compiled at the first call for modules and tensors of this kind."""
        name = id(modules[0])
        if name not in self.known:
            step = _Step(modules)
            held = {name: t for named in (step.named_parameters, step.named_buffers)
                    for name, t in named(remove_duplicate=False)}
            key = (kind(step), torch.get_num_threads(), *map(_layout, given))
            if key not in _ready:
                def function(*tensors):
                    return torch.func.functional_call(step, dict(zip(held, tensors)), tensors[len(held):])
                dynamic = {len(held) + i: dim for i, dim in ((2, 3), (3, 3))}  # mask and cache: of any length
                _ready[key] = _compiled(function, [*held.values(), *given], dynamic)
            self.known[name] = list(held.values()), _ready[key]
        tensors, code = self.known[name]
        return code([*tensors, *given])[0]


def _layout(t):
    """What compiled code takes for granted of a tensor given to it: all but how long a mask and a cache are."""
    return t.dtype, t.device, len(t), None if t.is_contiguous() else t.stride()


def kind(module):
    """All that compiled code takes for granted of a module: its parts, their plain attributes, their tensors' layout.
    """
    plain = (int, float, str, tuple, type(None))
    parts = [(name, type(m), *((k, v) for k, v in vars(m).items() if isinstance(v, plain)))
             for name, m in module.named_modules()]
    tensors = [(name, t.shape, t.stride(), t.dtype, t.device)
               for named in (module.named_parameters, module.named_buffers)
               for name, t in named(remove_duplicate=False)]
    return hash((tuple(parts), tuple(tensors)))


def compile_decode(model, enabled=True):
    """Let `model.generate` run its tokens through one compiled block: dense, compressed or adapted models alike.

    Returns the model.

    The first token waits for the compiler, once a process and kind of block, whatever the size of the cache;
    much less where a process before left its code on the disk (python kernels.py prints both). The numbers are those of
    the eager path up to the order of additions.
    """
    vars(model).pop("step", None)
    if enabled:
        model.step = Decoder(model)
    return model


def main():
    """The benchmark is a script of its own: run it."""
    runpy.run_path(str(pathlib.Path(__file__).resolve().parent / "tests" / "bench_kernels.py"), run_name="__main__")


if __name__ == "__main__":
    main()
