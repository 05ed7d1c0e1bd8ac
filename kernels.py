"""
The product with a packed weight; for few rows of x its floats are never written to memory.

What it does: `matmul` multiplies with a packed low-bit or N:M sparse weight, in two forms that give
the same numbers. The eager form dequantizes and calls F.linear, which is easy to check. The fused
form is one loop that unpacks in registers, which is fast. `PackedLinear` stands in the place of
nn.Linear and holds packed tensors only.

What it leaves out: code of our own in C++ or CUDA, integer activations, a fast kernel for
unstructured sparsity. The words are made in engine/packing.py.

    python kernels.py                 # a lesson of seconds: codes in words, and back
    python kernels.py --model FILE --text "The capital of France is" --bits 4    # any checkpoint
    python -m tests.bench_kernels     # how fast, beside float32 and torch's int4: minutes

Source: Frantar et al. 2023 (GPTQ, arXiv 2210.17323, section 5, "Practical Speedups": why a low-bit
kernel is fast when it generates one token at a time).
"""
import math
import runpy
import sys

from engine.script import guard  # before torch: Ctrl-C is one line

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.compiling import (NARROW, compile_failure, compiled, loaded, or_eager, ready,
                              written_out)
from engine.grids import Quantized
from engine.packing import (CELL, LANES, LAYOUT, Packed, pack, pack_sparse, pieces, place_bits,
                            stored_bits, unpack)

__all__ = ["Packed", "PackedLinear", "compile_failure", "from_spec", "matmul", "pack",
           "pack_sparse", "unpack"]

# ---- the matmul, eager: short and obviously right

class _Dequantized(torch.autograd.Function):
    """x @ Wᵀ with the float weight rebuilt where it is needed: no copy of it is kept."""

    @staticmethod
    def forward(ctx, x, packed):
        ctx.packed = packed
        return F.linear(x, packed.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.packed.dequantize().to(g.dtype), None


# ---- the matmul, fused
#
# A model that writes one token after another reads every weight once a token, and uses it for one
# multiplication. A core does dozens of multiplications in the time one float takes to arrive from
# memory, so decoding is limited by memory bandwidth, and 4-bit weights can be nearly eight times as
# fast as 32-bit ones. Dequantizing first loses that again: it writes the floats to memory and reads
# them back. `_fused` unpacks in registers instead. For a register of words, one word of each output
# row, a code takes three instructions:
#
#     and   keeps one code of each word where it stands: bits 4i to 4i + 3, read as code * 16^i
#     cvt   converts that integer to a float, exactly: it has four significant bits
#     fma   multiplies by x[k], the same for all rows, and adds; x[k] was divided by 16^i before
#
# No shuffle, no sum across a register, and hardly a shift: only where the masks of all places of a
# word do not fit the registers (HALF), as loading a mask again for every code costs as much as
# the code. The code at the top of a word is stored less half its range
# (packing.signed_top); half its range times x[k] is added with the zero-point. Scale and zero-point
# are applied once for every loop body g, which is a group or a part of one: with W = s (q - z),
#
#     y_n = sum over g of s_ng * (sum over k in g of q_nk x_k  -  z_ng * sum over k in g of x_k)
#
# Inductor turns the Python below into that loop: the dimension of 16 becomes the vector, the loops
# a straight-line body, sums over the same words one loop nest. To read it (search for "_mm"):
#
#     TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) TORCH_LOGS=output_code python kernels.py --compile \
#         --model tests/golden/trained/dense.safetensors --tokens 3 2>&1 | less
#
# Several streams. A hardware prefetcher follows rising addresses to the end of a page of 4 KB; the
# first words of the next page are waited for. So the loop reads row blocks from several places side
# by side, and waits for their pages at once: 1.2 ms become 0.6 at 4096x4096 on an AVX512 machine.
# Fewer where the threads would else take unequal turns: 9 are 5 and 4, 18 are 9 and 9.
#
# With many rows of x, multiplications take longer than reading. Then W is dequantized, as many rows
# at a time as stay in the cache, and a plain matmul follows: each thread reads what it wrote.

FUSED_ROWS = 4  # most rows of x for the fused loop; 2 and 3 are padded to it: two compilations
STREAMS = 2 if NARROW else 4  # row blocks read side by side
SUMS = 8  # of products, in all streams together: an addition takes four cycles, two start in each
# codes from this bit up are shifted down, to use the masks of the lower ones
HALF = {2: 16, 3: 15, 4: 16 if NARROW else 32, 8: 32}
UNROLL = 32 if NARROW else 16  # positions written out in the loop body; 1 / M of that for N:M
LONG = {64: 64} if NARROW else {128: 32}  # {span: as many for one row of x}: what was found best
CHUNK = 1 << 20  # weights that a thread dequantizes at a time: 4 MB


def fused_rows(packed):
    """Up to how many rows of x the fused loop is the faster one; N:M selects anew for each row."""
    return 1 if packed.n_m else FUSED_ROWS


def _code(words, where, half):
    """One code of each cell as int32 (..., 16) from the cell's words -> (code, factor, offset).

    factor  the power of two by which it is too large
    offset  what must be added to it then: half its range, for a code at the top of a word
    """
    (word, at, _, n), *rest = where
    if rest:  # split over words
        parts = [((words[w] >> s) & ((1 << k) - 1)) << low for w, s, low, k in where]
        return sum(parts), 1.0, 0.0
    top = at + n == 32
    word, at = (words[word], at) if at < half else (words[word] >> half, at - half)
    mask = -(1 << at) if top else ((1 << n) - 1) << at
    return word & mask, 2.0 ** at, 2.0 ** (n - 1) if top else 0.0


def _chosen(x, place, first, last):
    """x[..., place], places first to last, blended: x (..., m), place (..., 16) -> (..., 16)."""
    out = x[..., first, None]
    for c in range(first + 1, last + 1):
        out = torch.where(place == c, x[..., c, None], out)
    return out


def _sum(products, n, start):
    """start plus all products, in n sums at a time, which are added in pairs at the end."""
    sums = [start] + [0.0] * (n - 1)
    for p, product in enumerate(products):
        sums[p % n] = sums[p % n] + product
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2])]
    return sums[0]


def _fused(x, packed):
    """x (M, K) with few rows M -> (M, N), in one pass over the packed weight."""
    (M, K), dtype = x.shape, x.dtype
    bits = 32 if packed.bits == 32 else stored_bits(packed.bits)
    (n, m), (cell_words, per) = packed.n_m or (1, 1), CELL[bits]
    unit = math.lcm(per, CELL[place_bits(m)][1], n) if packed.n_m else per
    T, NB, groups, n_words, _ = packed.codes.shape
    tile = groups * n_words // cell_words * per  # positions
    # positions written out in the body, a divisor of a group's
    most = LONG.get(packed.span, UNROLL) if (M, m) == (1, 1) else UNROLL // m
    body = unit * math.gcd(max(1, most // unit), min(tile, packed.span) // unit)
    bodies = tile // groups // body
    S = math.gcd(NB, STREAMS) if M == 1 and not packed.n_m else 1  # streams
    while S > 1 and -(NB // S) % torch.get_num_threads() > NB // S // 16:
        S //= 2
    x = x.float()  # then by position
    if packed.order is not None:
        x = F.pad(x, (0, 1))[:, packed.order]
    elif T * tile // n * m > K:
        x = F.pad(x, (0, T * tile // n * m - K))
    x = x.view(M, T, 1, groups, bodies, body // n * m)
    # of each stream its words, as they stand in memory: tensors (T, NB / S, groups, bodies, 16)
    streams = [words.unflatten(3, (bodies, -1)).unbind(-2)
               for words in loaded(packed.codes).chunk(S, dim=1)]
    if bits < 32:
        scale = packed.words[..., :1, :].view(torch.float32).chunk(S, dim=1)
        zero = packed.zero.view(NB, -1, groups, 1, LANES).transpose(0, 1).float().chunk(S, dim=1)
        codes = [[_code(words[c:c + cell_words], where, HALF[bits])
                  for c in range(0, len(words), cell_words) for where in pieces(bits)]
                 for words in streams]
    # for each position the value (T, NB / S, groups, bodies, 16) and, for each row of x, its factor
    if packed.n_m:
        at, cell = pieces(place_bits(m)), CELL[place_bits(m)][0]
        places = loaded(packed.place).view(T, NB, groups, bodies, -1, LANES).unbind(-2)
        places = [sum(((places[c + w] >> s) & ((1 << k) - 1)) << low for w, s, low, k in where)
                  for c in range(0, len(places), cell) for where in at]
        x = written_out(x).unflatten(-1, (-1, m))  # (M, T, 1, groups, bodies, cells, m)
        values = streams if bits == 32 else [[code.float() * (1 / factor) - (zero[0] - offset)
                                              for code, factor, offset in codes[0]]]
        inputs = [[[_chosen(x[i, ..., p // n, :], places[p], p % n, m - n + p % n)
                    for p in range(body)] for i in range(M)]]
    else:
        values = [[code.float() for code, *_ in part] for part in codes]
        x_sum = x.sum(-1)[..., None]  # (M, T, 1, groups, bodies, 1)
        offsets = (x * x.new_tensor([offset for *_, offset in codes[0]])).sum(-1)[..., None]
        x = x * x.new_tensor([1 / factor for _, factor, _ in codes[0]])
        # one x shared by all streams is kept in registers from the first to the last; on AVX2 there
        # are not enough: each stream has its own (S, M, T, 1, groups, bodies, body)
        x = written_out(torch.stack([x] * S) if NARROW else x[None]).expand(S, *x.shape)
        inputs = [[[x[s, i, ..., p, None] for p in range(body)] for i in range(M)]
                  for s in range(S)]
    y = []
    for i in range(M):
        for s in range(S):
            # loading bytes takes registers, which are then free again: it comes first
            start = 0.0 if packed.n_m else offsets[i] - zero[s] * x_sum[i]
            products = (value * factor for value, factor in zip(values[s], inputs[s][i]))
            total = _sum(products, SUMS // S if body >= 16 else 4, start)
            y.append((total if bits == 32 else total * scale[s]).sum((2, 3)))  # (T, NB / S, 16)
    return torch.stack(y).sum(1).view(M, -1)[:, :packed.shape[0]].to(dtype)  # (M, N)


def _slabs(like, packed):
    """The float weight in slabs of rows, one for each thread: (S, P, rows), in the dtype of `like`.

    By position, so that no lane moves; N:M, whose places differ from row to row: one, by column.
    """
    if packed.n_m:
        return packed.dequantize().T[None].to(like.dtype)
    bits, (_, NB, groups, *_) = stored_bits(packed.bits), packed.codes.shape
    S = math.gcd(NB, torch.get_num_threads())
    # of a cell its words, and others (S, T, groups, cells, NB / S, 16): in the order of writing
    words = loaded(packed.codes).unflatten(3, (-1, CELL[bits][0])).unflatten(1, (S, -1))
    words = words.permute(5, 1, 0, 3, 4, 2, 6).unbind()
    scale, zero = (t.view(S, NB // S, -1, groups, 1, LANES).permute(0, 2, 3, 4, 1, 5).float()
                   for t in (packed.scale, packed.zero))
    codes = [_code(words, where, HALF[bits]) for where in pieces(bits)]
    values = [scale * (code.float() * (1 / by) - (zero - offset)) for code, by, offset in codes]
    return torch.stack(values, dim=4).view(S, -1, NB // S * LANES).to(like.dtype)


def _run(f, x, packed):
    """f(x, packed), compiled at the first call for such x, layout and number of threads."""
    names = [name for name in Packed.TENSORS if getattr(packed, name) is not None]
    tensors = [x, *(getattr(packed, name) for name in names)]
    key = (f.__name__, x.shape, x.dtype, x.device, packed.words.shape, packed.words.stride(),
           packed._replace(**dict.fromkeys(Packed.TENSORS)), len(tensors), torch.get_num_threads())
    code = ready.get(key)
    if code is None:
        def function(x, *given):
            return f(x, packed._replace(**dict(zip(names, given))))
        code = ready[key] = compiled(function, tensors, key)
    return code(tensors)[0]


def _fused_matmul(x, packed):
    """x (M, K), any M, without gradients."""
    (M, K), N, NB = x.shape, packed.shape[0], packed.words.shape[1]
    if M <= fused_rows(packed):
        if M in (1, FUSED_ROWS):
            return _run(_fused, x.contiguous(), packed)
        return _run(_fused, F.pad(x, (0, 0, 0, FUSED_ROWS - M)), packed)[:M]
    if not packed.n_m:  # x by position
        P = packed.zero.shape[1] * packed.span
        x = F.pad(x, (0, P - K)) if packed.order is None else F.pad(x, (0, 1))[:, packed.order]
    blocks, y = max(1, CHUNK * torch.get_num_threads() // (LANES * K)), []
    for first in range(0, NB, blocks):
        # (S, M, rows). The slabs get no name: the next get their memory, still in the cache
        y.extend(x @ _run(_slabs, x[:0], packed.rows(first, first + blocks)))
    return torch.cat(y, dim=1)[:, :N]


def matmul(x, packed, fused=True):
    """x (..., K) times the packed weight (N, K) transposed -> (..., N), in the dtype of x.

    fused=False is the eager twin. Gradients flow to x; while they are recorded, the eager twin
    computes. Without a C++ compiler the fused form warns once and computes as the eager one does:
    `compile_failure()` has the reason. Raises ValueError where K differs, or x holds no floats.
    """
    if x.shape[-1] != packed.shape[1] or not x.is_floating_point():
        raise ValueError(f"x must be floats (..., {packed.shape[1]}), got {x.dtype} {(*x.shape,)}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (M, K)
    if fused and len(rows) and not (x.requires_grad and torch.is_grad_enabled()):
        y = or_eager(_fused_matmul, _Dequantized.apply, rows, packed)
    else:
        y = _Dequantized.apply(rows, packed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], packed.shape[0])


# ---- the layer

class PackedLinear(nn.Module):
    """What replaces nn.Linear: buffers only, no float copy; its input gets gradients."""

    def __init__(self, packed, bias=None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.layout = packed._replace(**dict.fromkeys(Packed.TENSORS))  # numbers only
        for name in Packed.TENSORS:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def packed(self):
        return self.layout._replace(**{name: getattr(self, name) for name in Packed.TENSORS})

    def forward(self, x):
        """x (..., in) -> (..., out): x Wᵀ + bias."""
        if torch.compiler.is_compiling():  # part of a larger graph: engine/decode.py
            rows = x.reshape(-1, self.in_features)
            y = _fused(rows, self.packed) if len(rows) <= fused_rows(self.packed) else \
                F.linear(rows, self.packed.dequantize().to(x.dtype))
            y = y.view(*x.shape[:-1], self.out_features)
        else:
            y = matmul(x, self.packed, fused=False)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def spec(self):
        """What `from_spec` builds this module from: numbers, and each buffer's shape and dtype."""
        numbers = {name: getattr(self.layout, name) for name in ("shape", "bits", "span", "n_m")}
        buffers = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")]
                   for name, t in self.named_buffers()}
        return {"layout": LAYOUT, **numbers, "buffers": buffers}

    def extra_repr(self):
        sparse = ", {}:{} sparse".format(*self.layout.n_m) if self.layout.n_m else ""
        return (f"{self.in_features}, {self.out_features}, bits={self.layout.bits}{sparse}, "
                f"{self.packed.nbytes} bytes")


DTYPES = {name: getattr(torch, name)
          for name in ("int32", "uint8", "float64", "float32", "float16", "bfloat16")}


def from_spec(spec):
    """An empty PackedLinear for `load_state_dict`; ValueError for what `spec` never wrote."""
    if isinstance(spec, dict) and spec.get("layout") != LAYOUT:
        raise ValueError(f"packed in layout {spec.get('layout')}, this is layout {LAYOUT}: "
                         "compress the model again")
    try:
        buffers = {name: torch.zeros(shape, dtype=DTYPES[dtype])
                   for name, (shape, dtype) in spec["buffers"].items()}
        bias = buffers.pop("bias", None)
        n_m = tuple(spec["n_m"]) if spec["n_m"] else None
        packed = Packed(**dict.fromkeys(Packed.TENSORS) | buffers, shape=tuple(spec["shape"]),
                        bits=spec["bits"], span=spec["span"], n_m=n_m)
        if packed.words is None:
            raise ValueError("no words")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not the specification of a packed layer: {error}") from None
    return PackedLinear(packed, bias)


def main():
    """Alone a lesson of seconds: codes in words, and back; with arguments a job, see the top."""
    if len(sys.argv) > 1:
        return runpy.run_module("checkpoints.writing", run_name="__main__")  # it imports this file
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (16, 32), generator=generator, dtype=torch.uint8)  # 3 bits each
    scale, zero = torch.ones(16, 1), torch.full((16, 1), 4, dtype=torch.uint8)
    quantized = Quantized(codes, scale, zero, torch.zeros(32, dtype=torch.long), 3)
    packed = pack(quantized)
    print(f"a row of 32 codes of 3 bits: {codes[0].tolist()}")
    words = [f"{int(w) & 0xFFFFFFFF:08x}" for w in packed.codes[0, 0, 0, :, 0]]
    print(f"its three 32-bit words:      {words}")
    print(f"unpacked it is the same: {torch.equal(unpack(packed).codes, codes)}")
    x = torch.randn(1, 32, generator=generator)
    off = (matmul(x, packed, fused=False) - x @ quantized.dequantize().T).abs().max()
    print(f"the product with the packed weight is off by {float(off):.1g}")
    print("next: python kernels.py --model FILE --text ... (any checkpoint), or engine/packing.py")


if __name__ == "__main__":
    guard(main)
