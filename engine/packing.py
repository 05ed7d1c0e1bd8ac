"""
Packed weights: low-bit codes in 32-bit words, exactly, both ways.

What it does: codes of 2, 3, 4 and 8 bits become 32-bit words and codes again; N:M sparse weights become the values that
are kept and the place of each; both together too. The words and scales are all there is of a packed weight, in memory
and on disk.

What it leaves out: the product with a packed weight (kernels.py), the choice of codes (compress.py).

Sources: 32 codes of 3 bits in three words, the GPTQ reference code (there split codes stand between the others); N:M,
Mishra et al. 2021 (2:4 sparsity, arXiv 2104.08378).
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.grids import Quantized

LAYOUT = 3  # version of the packed layout, stored in every checkpoint; increase it when the layout changes
LANES = 16  # output rows side by side in memory: one AVX512 register of 32-bit words, two of AVX2, four of NEON

# ---- codes in 32-bit words

# bits: (words, codes) of a cell, the smallest unit that is stored whole. At 3 bits ten codes a word leave two bits in
# each of three words; the six bits hold two codes more, each split over two words. So every width takes exactly its
# bits. Codes of 5 to 7 bits are stored in 8. Width 32 is a float, stored as it is.
CELL = {2: (1, 16), 3: (3, 32), 4: (1, 8), 8: (1, 4), 32: (1, 1)}


def stored_bits(bits):
    """The width in which a code of `bits` is stored. Raises ValueError outside 2 to 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in [2, 8], got {bits}")
    return bits if bits <= 4 else 8


def place_bits(m):
    """The width in which a place among m is stored: 2 bits for 2:4, 3 for 4:8."""
    return stored_bits(max(2, (m - 1).bit_length()))


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


def signed_top(codes, bits, dim):
    """Add half the range, modulo the range, to each code that will fill the top bits of its word; its own inverse.

    The top bit of an int32 is its sign. Stored like this, a code at the top of a word, read in place as a signed
    number, is the code less half its range: the fused loop needs no extra instruction for the sign.
    """
    per = 32 // bits if bits != 3 else codes.shape[dim] + 1  # at 3 bits no whole code ends a word
    last = torch.arange(codes.shape[dim], device=codes.device) % per == per - 1
    half = (last.int() << bits - 1).to(codes.dtype).view(-1, *[1] * (codes.dim() - 1 - dim))
    return codes ^ half


# ---- packed weights

class Packed(NamedTuple):
    """A weight (N, K) in blocks of 16 output rows, NB = ceil(N / 16) of them.

    Positions  The columns, sorted by group, stand on P positions, `span` to a group; the end of a group is padded to
               whole cells. `order[p]` is the column at position p, K for padding; None where that is 0, 1, 2, ...
    N:M        An N:M sparse weight keeps n of every m positions: the words hold the P * n / m kept values only,
               `span` counts those, and `place` says which of its m positions each has.
    Tiles      Positions are cut into T tiles, the outermost dimension. The part of x that belongs to one tile stays in
               the L1 cache while all rows pass by.
    Scales     The 32 bits of a group's scale stand before the group's words. So the loop reads one stream with rising
               addresses, which the hardware prefetcher recognises; a separate tensor of scales, or scales behind the
               words, defeats it.
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

    def read_codes(self):
        """(NB, positions, 16) int32 codes, in the order of positions."""
        bits = stored_bits(self.bits)
        return signed_top(from_words(self.codes, bits), bits, 1)

    def dequantize(self):
        """The float weight (N, K), equal to the last bit to what was packed."""
        if self.bits == 32:
            return by_column(self, self.words.transpose(0, 1).flatten(1, -2), 0.0)
        scale, zero = (t.repeat_interleave(self.span, dim=1) for t in (self.scale, self.zero))  # (NB, positions, 16)
        return by_column(self, scale * (self.read_codes() - zero), 0.0)

    def rows(self, first, last):
        """Row blocks first .. last - 1, as a Packed that shares the memory."""
        N = min(self.shape[0], last * LANES) - first * LANES
        cut = {name: t[:, first:last] if name in ("words", "place") else t[first:last]
               for name in ("words", "place", "zero") if (t := getattr(self, name)) is not None}
        return self._replace(shape=(N, self.shape[1]), **cut)


def by_column(packed, values, filler):
    """Values by position (NB, positions, 16) -> by column (N, K).

    filler  a number or (N, P): what stands where N:M kept nothing
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


# ---- packing

def pack(quantized):
    """Quantized (N, K) -> Packed, losslessly: any shape, any groups, act_order or not.

    Raises ValueError for codes that do not fit their bits.
    """
    codes, scale, zero, group, bits = quantized
    stored, (N, K) = stored_bits(bits), codes.shape
    if int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit {bits} bits")
    order, span = arrange(group, scale.shape[1], CELL[stored][1])
    codes = F.pad(codes, (0, 1, 0, -N % LANES))[:, order]  # (N padded, P)
    words = to_words(signed_top(codes, stored, 1), stored)
    words = in_tiles(words, n_tiles(span, scale.shape[1], CELL[stored][1]), in_lanes(scale))
    return Packed(words, in_lanes(zero.to(torch.uint8)), order_or_none(order, K), None, (N, K), bits, span, None)


def unpack(packed):
    """The Quantized that was packed. Raises ValueError for float values."""
    if packed.bits == 32:
        raise ValueError("these are float values, not codes: use packed.dequantize()")
    (N, K), codes = packed.shape, packed.read_codes()  # (NB, positions, 16)
    scale, zero = (t.transpose(1, 2).flatten(0, 1)[:N].contiguous() for t in (packed.scale, packed.zero))  # (N, G)
    n, m = packed.n_m or (1, 1)
    group = torch.arange(codes.shape[1] // n * m, device=codes.device) // (packed.span // n * m)  # (P,)
    codes = by_column(packed, codes, zero[:, group].int()).byte()
    if packed.order is not None:
        group = group.new_zeros(K + 1).scatter(0, packed.order.long(), group)
    return Quantized(codes, scale, zero, group[:K], packed.bits)


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
    # the n places of each cell of m neighbours: those of the kept values, then others up to n
    zero = weight.zero.to(torch.uint8)[:, weight.group] if quantized else torch.zeros_like(values)  # (N, K)
    kept = F.pad(values != zero, pad).view(N, -1, m)  # (N, cells, m)
    if int(kept.sum(-1).max()) > n:
        raise ValueError(f"not {n}:{m} sparse: {int(kept.sum(-1).max())} of {m} neighbours are not zero")
    place = kept.byte().argsort(dim=-1, descending=True, stable=True)[..., :n].sort(dim=-1).values
    values = F.pad(values, pad).view(N, -1, m).gather(-1, place)  # (N, cells, n)
    # cells take the place of columns: sorted by group, padded to whole words
    group = F.pad(weight.group, pad, value=int(weight.group[-1])) if quantized else place.new_zeros(values.shape[1] * m)
    group = group.view(-1, m)
    if bool((group != group[:, :1]).any()):
        raise ValueError(f"{m} neighbours belong to different groups of the quantization: "
                         "act_order and N:M do not combine")
    bits = weight.bits if quantized else 32
    stored, stored_place = stored_bits(bits) if quantized else 32, place_bits(m)
    unit = math.lcm(CELL[stored][1], CELL[stored_place][1], n)  # positions that fill whole cells of values and places
    order, span = arrange(group[:, 0], weight.scale.shape[1] if quantized else 1, unit // n)
    values, place = (F.pad(t, (0, 0, 0, 1, 0, -N % LANES))[:, order].flatten(1) for t in (values, place))
    columns = torch.where(order[:, None] < group.shape[0], order[:, None] * m + torch.arange(m, device=order.device), K)
    # words
    scale, zero = (in_lanes(weight.scale), in_lanes(weight.zero.to(torch.uint8))) if quantized else (None, None)
    words = to_words(signed_top(values, stored, 1), stored) if quantized else in_lanes(values)
    T = n_tiles(span * n, scale.shape[1] if quantized else 1, unit)
    words = in_tiles(words, T, scale) if quantized else in_tiles(words, T)[:, :, None]
    return Packed(words, zero, order_or_none(columns.flatten().clamp_max(K), K),
                  in_tiles(to_words(place, stored_place), T), (N, K), bits, span * n, (n, m))


def arrange(group, groups, unit):
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


def order_or_none(order, K):
    """None where the positions are the columns in their own order, with padding behind them; else int32."""
    plain = torch.arange(order.numel(), device=order.device).clamp_max(K)
    return None if torch.equal(order, plain) else order.int()


def in_lanes(t):
    """Rows (N, ...) -> blocks (NB, ..., 16), N padded with zeros to whole lanes."""
    t = F.pad(t, (0, 0, 0, -t.shape[0] % LANES))
    return t.view(-1, LANES, t.shape[1]).transpose(1, 2).contiguous()


def n_tiles(span, groups, unit):
    """How many tiles to cut into: of at most 2,048 positions each, if that cuts no cell and no one of many groups."""
    atom, n = (span, groups) if groups > 1 else (unit, span // unit)  # n atoms, not to be cut
    fits = [T for T in range(1, n + 1) if n % T == 0 and n // T * atom <= 2048]
    return fits[0] if fits and n // fits[0] * atom >= 128 else 1 if groups == 1 or span <= 2048 else groups


def in_tiles(words, T, scale=None):
    """(NB, n, 16) -> (T, NB, n / T, 16); with scale (NB, G, 16) -> (T, NB, G / T, 1 + n / G, 16): the scale of a
    group, then the group. One group in several tiles has its scale in each.
    """
    NB = words.shape[0]
    tiles = words.view(NB, T, -1, LANES).transpose(0, 1)
    if scale is None:
        return tiles.contiguous()
    scale = scale.view(torch.int32).view(NB, -1, 1, LANES)
    scale = scale.view(NB, T, -1, 1, LANES).transpose(0, 1) if scale.shape[1] > 1 else scale.expand(T, NB, 1, 1, LANES)
    return torch.cat([scale, tiles.view(*scale.shape[:3], -1, LANES)], dim=3)
