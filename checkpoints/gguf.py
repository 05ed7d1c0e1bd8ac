"""
The GGUF file format: one file with a model's settings, its vocabulary and its (mostly quantized) weights.

What it does: reads the header of a GGUF file, version 2 or 3, into a dict of metadata and a list of tensors; and
turns a tensor's bytes into floats: F32, F16, BF16, and the blocks Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K. It
knows nothing of models: `weights.py` gives the tensors their places. The same `read` also serves safetensors, whose
tensors are F32, F16 or BF16.

What it leaves out: writing, big-endian files, version 1, the other block types (refused by name), nested arrays.

A GGUF file, by example (all numbers little-endian):

    "GGUF"  3  272  33                                 magic, version, number of tensors, number of metadata entries
    "llama.block_count"  4  30                         key, type (4 = uint32), value; a string is length and bytes
    ...
    "blk.0.attn_q.weight"  2  (576, 576)  3  31918144  name, dimensions (fastest first), type (3 = Q4_1), offset
    ...
    padding to a multiple of general.alignment, then the tensors' bytes; offsets count from here

A quantized tensor is a row of blocks. A block of 32 weights has one float16 step (and, in the _1 kinds, one float16
minimum): x = step * code + minimum. A K block has 256 weights in eight or sixteen sub-blocks, whose own steps are
integers times one float16 step. Against `compress.py`: the same idea, with groups of 32 and codes chosen by plain
rounding.

Source: the format's specification and block layouts, github.com/ggml-org/ggml (docs/gguf.md, src/ggml-common.h).

    python -m checkpoints FILE.gguf --tensors                      # what is in it
"""
import math
import mmap
import os
import struct
from typing import NamedTuple

import numpy as np
import torch

KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
         12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
         20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
         29: "IQ1_M", 30: "BF16"}  # those without a decoder below are known by name only

NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
           12: "<f8"}
STRING, ARRAY = 8, 9  # the two metadata types that are not numbers

PIECE = 2 ** 16  # weights decoded at a time: what reading needs beside the tensor itself


class Stored(NamedTuple):
    """A tensor as it lies in a file: bytes start to stop, of one of the kinds in BLOCKS."""
    path: str
    name: str
    kind: str
    shape: tuple
    start: int
    stop: int


# ---- the header

class Cursor:
    """Reads numbers and strings one after the other; past the end of the file is a ValueError, never a crash."""

    def __init__(self, path, data):
        self.path, self.data, self.at = path, data, 0

    def take(self, n, what):
        """The next n bytes."""
        if n > len(self.data) - self.at:
            raise ValueError(f"{self.path}: {what} claims {n} bytes, {len(self.data) - self.at} are left: truncated?")
        self.at += n
        return self.data[self.at - n:self.at]

    def number(self, form, what):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0]

    def name(self, what):
        """A string that can stand in a one-line message."""
        name = self.string(what)
        if not name.isprintable():
            raise ValueError(f"{self.path}: {what} {name[:80]!r} is not printable")
        return name

    def string(self, what):
        try:
            return self.take(self.number("Q", what), what).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {what} is not UTF-8") from None

    def value(self, kind, what):
        """A metadata value: int, float, bool, str, or a list of these."""
        if kind == STRING:
            return self.string(what)
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind != ARRAY:
            raise ValueError(f"{self.path}: {what} has the unknown type {kind}")
        kind, n = self.number("I", what), self.number("Q", what)
        if kind == STRING:
            return [self.string(what) for _ in range(n)]  # a count that lies ends with the file
        if kind not in NUMBERS:
            raise ValueError(f"{self.path}: {what} is an array of the unknown type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(n * dtype.itemsize, what), dtype).tolist()


def read_header(path):
    """(metadata {key: value}, tensors {name: Stored}) of a GGUF file. Only the header is read.

    Raises ValueError, naming the file and the field, for anything but a whole and honest GGUF file.
    """
    if os.path.getsize(path) < 24:
        raise ValueError(f"{path}: {os.path.getsize(path)} bytes is too short for a GGUF file")
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        c = Cursor(path, data)
        if c.take(4, "magic") != b"GGUF":
            raise ValueError(f"{path}: does not begin with GGUF: not a GGUF file")
        version = c.number("I", "version")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version}: versions 2 and 3 are read, little-endian only")
        n_tensors, n_metadata = c.number("Q", "tensor count"), c.number("Q", "metadata count")
        metadata, infos = {}, {}
        for i in range(n_metadata):
            key = c.name(f"metadata key {i}")
            if key in metadata:
                raise ValueError(f"{path}: metadata {key} is there twice")
            metadata[key] = c.value(c.number("I", key), key)
        for i in range(n_tensors):
            name, dimensions = c.name(f"tensor name {i}"), c.number("I", f"tensor {i}")
            if name in infos:
                raise ValueError(f"{path}: tensor {name} is there twice")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"{path}: tensor {name} has {dimensions} dimensions, 1 to 4 are possible")
            shape = [c.number("Q", name) for _ in range(dimensions)][::-1]  # ours: slowest first
            infos[name] = (tuple(shape), c.number("I", name), c.number("Q", name))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 2 ** 16 or alignment % 8:
            raise ValueError(f"{path}: general.alignment must be a multiple of 8 up to 65536, got {alignment!r}")
        start = c.at + -c.at % alignment
    return metadata, place(path, infos, start, alignment)


def place(path, infos, start, alignment):
    """{name: Stored} in file order: every tensor's bytes inside the file, aligned, overlapping no other's."""
    size, end, tensors = os.path.getsize(path), start, {}
    for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        kind = KINDS.get(kind, f"type {kind}")
        if kind not in BLOCKS:
            raise ValueError(f"{path}: tensor {name} is {kind}; readable are {', '.join(BLOCKS)}")
        weights, width = BLOCKS[kind][:2]
        if math.prod(shape) == 0 or shape[-1] % weights:
            raise ValueError(f"{path}: tensor {name}: shape {shape} is not made of {kind} blocks of {weights} weights")
        begin, stop = start + offset, start + offset + math.prod(shape) // weights * width
        if offset % alignment or stop > size:
            raise ValueError(f"{path}: tensor {name}: bytes {begin} to {stop} of {size} are misaligned, "
                             "or beyond the end")
        if begin < end:
            raise ValueError(f"{path}: tensor {name}: its bytes overlap another tensor's")
        tensors[name], end = Stored(path, name, kind, shape, begin, stop), stop
    return tensors


# ---- blocks: each decoder takes n blocks, uint8 (n, bytes), and gives their weights, float32 (n, weights)

def halves(raw, at):
    """The float16 number of each block at byte `at`: (blocks, 1) float32."""
    return raw[:, at:at + 2].copy().view("<f2").astype(np.float32)


def nibbles(raw):
    """(blocks, b) bytes -> (blocks, 2b) codes: all low halves first, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def fifth_bits(raw):
    """(blocks, 4) bytes -> (blocks, 32) the 16s of five-bit codes."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def f32(raw):
    return np.ascontiguousarray(raw).view("<f4")


def f16(raw):
    return halves(raw, 0)


def bf16(raw):  # the upper half of a float32
    return (np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16).view(np.float32)


def q8_0(raw):
    return halves(raw, 0) * raw[:, 2:].view(np.int8).astype(np.float32)


def q4_0(raw):
    return halves(raw, 0) * (nibbles(raw[:, 2:]).astype(np.float32) - 8)


def q4_1(raw):
    return halves(raw, 0) * nibbles(raw[:, 4:]).astype(np.float32) + halves(raw, 2)


def q5_0(raw):
    return halves(raw, 0) * ((nibbles(raw[:, 6:]) | fifth_bits(raw[:, 2:6])).astype(np.float32) - 16)


def q5_1(raw):
    return halves(raw, 0) * (nibbles(raw[:, 8:]) | fifth_bits(raw[:, 4:8])).astype(np.float32) + halves(raw, 2)


def k_scales(raw):
    """Steps and minima of 8 sub-blocks, (blocks, 8) float32 each: two float16 numbers, then 12 bytes of the six-bit
    integers that they are multiplied by."""
    s = raw[:, 4:16].reshape(-1, 3, 4)  # (blocks, 3, 4)
    # bytes 0-3 and 4-7: scale and minimum of sub-blocks 0-3 in their low six bits; bytes 8-11: the low four bits of
    # scale and minimum of sub-blocks 4-7, whose high two bits are the high two of bytes 0-3 and 4-7
    scale = np.concatenate([s[:, 0] & 63, (s[:, 2] & 15) | (s[:, 0] >> 6 << 4)], axis=1)  # (blocks, 8)
    minimum = np.concatenate([s[:, 1] & 63, (s[:, 2] >> 4) | (s[:, 1] >> 6 << 4)], axis=1)  # (blocks, 8)
    return halves(raw, 0) * scale, halves(raw, 2) * minimum


def q4_k(raw):
    """256 weights: 16 bytes of steps and minima, 128 bytes of codes."""
    scale, minimum = k_scales(raw)
    code = nibbles(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)  # each 32 bytes hold two sub-blocks
    return (scale[:, :, None] * code - minimum[:, :, None]).reshape(-1, 256)  # (blocks, 256)


def q5_k(raw):
    """256 weights: as Q4_K, with 32 bytes between, whose bit i is the fifth bit of the codes of sub-block i."""
    scale, minimum = k_scales(raw)
    fifth = raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # (blocks, 8, 32)
    code = nibbles(raw[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << 4
    return (scale[:, :, None] * code - minimum[:, :, None]).reshape(-1, 256)  # (blocks, 256)


def q6_k(raw):
    """256 weights: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales of 16 weights, a float16 step."""
    low = nibbles(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)  # (blocks, halves, quarters, 32)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3  # (blocks, 2, 4, 32)
    code = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32  # (blocks, 16, 16)
    scale = halves(raw, 208) * raw[:, 192:208].view(np.int8)  # (blocks, 16)
    return (scale[:, :, None] * code).reshape(-1, 256)  # (blocks, 256)


BLOCKS = {"F32": (1, 4, f32), "F16": (1, 2, f16), "BF16": (1, 2, bf16), "Q4_0": (32, 18, q4_0), "Q4_1": (32, 20, q4_1),
          "Q5_0": (32, 22, q5_0), "Q5_1": (32, 24, q5_1), "Q8_0": (32, 34, q8_0), "Q4_K": (256, 144, q4_k),
          "Q5_K": (256, 176, q5_k), "Q6_K": (256, 210, q6_k)}  # weights a block, bytes a block, decoder


def decoded_pieces(stored):
    """(first weight's number, weights float32 (n,)) of a tensor, piece by piece: a piece of the file is mapped, decoded
    and unmapped at a time, so that nothing of the file stays behind in memory."""
    weights, width, decode = BLOCKS[stored.kind]
    step = PIECE // weights * width
    for a in range(stored.start, stored.stop, step):
        raw = np.memmap(stored.path, np.uint8, "r", a, (min(step, stored.stop - a),))
        raw = raw.reshape(-1, width)  # (blocks, bytes)
        with np.errstate(over="ignore", invalid="ignore"):  # hostile steps; what comes of them is refused in `read`
            values = decode(np.asarray(raw)).reshape(-1)  # (blocks * weights,)
        yield (a - stored.start) // width * weights, np.require(values, requirements=["ALIGNED", "WRITEABLE"])


def read(stored, dtype=torch.float32):
    """The tensor, in `dtype`. Raises ValueError for NaN and infinite weights."""
    out = torch.empty(math.prod(stored.shape), dtype=dtype)
    for begin, values in decoded_pieces(stored):
        piece = out[begin:begin + values.size]
        piece.copy_(torch.from_numpy(values))
        if not piece.isfinite().all():
            raise ValueError(f"{stored.path}: tensor {stored.name} has weights that are not finite numbers in {dtype}")
    return out.view(stored.shape)


def same(a, b):
    """Whether two tensors of a file have one shape and the same values."""
    if a.shape != b.shape or a.kind not in BLOCKS or b.kind not in BLOCKS:
        return False
    return all(np.array_equal(x, y) for (_, x), (_, y) in zip(decoded_pieces(a), decoded_pieces(b)))
