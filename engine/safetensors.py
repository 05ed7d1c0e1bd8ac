"""
Tensors in a file: the safetensors layout, read and written by hand.

A file is 8 bytes of header length, a JSON header {name: dtype, shape, two offsets}, and the tensors' bytes. Nothing in
it can run, which is why no pickle is read anywhere in this project.

What it leaves out: shards (checkpoints/weights.py puts them together).

Source: the format's description, github.com/huggingface/safetensors.
"""
import json
import math
import os
import struct

import numpy as np
import torch

from engine.files import whole_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} and {str: str} to `path`, whole or not at all. ValueError for a dtype without a name."""
    with whole_file(path, "wb") as f:
        dump(f, tensors, metadata)


def dump(f, tensors, metadata=None):
    """Write {name: tensor} and {str: str} to a file opened for bytes."""
    header, blobs, offset = {"__metadata__": dict(metadata or {})}, [], 0
    for name, t in tensors.items():
        if t.dtype not in NAMES:
            raise ValueError(f"tensor {name} is of {t.dtype}, which is not written; only {', '.join(DTYPES)} are")
        blob = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    f.write(struct.pack("<Q", len(text)))
    f.write(text)
    for blob in blobs:
        f.write(memoryview(blob))


def read_entries(path):
    """{name: (dtype's name, shape, first byte, byte behind the last)} and {str: str}: the header of `path`, checked.

    Raises ValueError, naming the file and the field, for anything that is not a whole and honest safetensors file.
    """
    size = os.path.getsize(path)
    if size < 8:
        raise ValueError(f"{path}: {size} bytes is too short for a safetensors file")
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if n > min(size - 8, 100_000_000):
            raise ValueError(f"{path}: the header claims {n} bytes, the file has {size}: truncated, or not safetensors")
        text = f.read(n)
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not JSON ({type(error).__name__})") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: the header is not an object of tensors")
    entries, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise ValueError(f"{path}: tensor {name!r}: unknown dtype {entry.get('dtype')!r}")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise ValueError(f"{path}: tensor {name!r}: shape {shape!r} is not a list of sizes")
        start, stop = entry["data_offsets"]
        if start != end:
            raise ValueError(f"{path}: tensor {name!r}: its bytes "
                             + ("overlap another tensor's" if start < end else "do not follow the last tensor's"))
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: tensor {name!r}: {stop - start} bytes for shape {shape} of {entry['dtype']}")
        if 8 + n + stop > size:
            raise ValueError(f"{path}: tensor {name!r} ends {8 + n + stop - size} bytes after the file does: truncated")
        entries[name], end = (entry["dtype"], tuple(shape), 8 + n + start, 8 + n + stop), stop
    if 8 + n + end != size:
        raise ValueError(f"{path}: {size - 8 - n - end} bytes follow the last tensor")
    return entries, metadata


def read_safetensors(path):
    """{name: tensor} and {str: str} from `path`. The tensors lie in the memory-mapped file, private to this process.

    Raises ValueError as `read_entries` does.
    """
    (entries, metadata), tensors = read_entries(path), {}
    data = np.memmap(path, dtype=np.uint8, mode="c")
    for name, (kind, shape, start, stop) in entries.items():
        raw, dtype = data[start:stop], DTYPES[kind]
        if start % dtype.itemsize:
            raw = raw.copy()  # a view needs aligned bytes
        flat = torch.from_numpy(raw).view(dtype) if len(raw) else torch.empty(0, dtype=dtype)
        try:
            tensors[name] = flat.reshape(shape)
        except RuntimeError:  # no bytes, but sizes whose product overflows
            raise ValueError(f"{path}: tensor {name!r}: shape {shape} is larger than any tensor") from None
    return tensors, metadata


def _offsets(path, name, entry):
    """The sort key of a header entry, once it is known to have one."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"{path}: tensor {name!r}: data_offsets {offsets!r} are not two positions")
    return offsets
