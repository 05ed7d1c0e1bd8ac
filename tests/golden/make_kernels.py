"""
Writes kernels.json: quantized and N:M sparse weights, the words they are packed into, and a product with each.
README.md beside this file says how to check a port against it.

    python tests/golden/make_kernels.py
"""
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from golden.files import draw, floats, numbers, short, whole, write  # noqa: E402


# ---- the inputs

def quantized(seed, rows, group, bits, keep=None):
    """A Quantized as lists: codes (rows, in), scale and zero (rows, groups), group (in,); what is not kept is zero."""
    groups, n = max(group) + 1, len(group)
    zero = whole(seed + 1, 2**bits, rows, groups)
    codes = whole(seed, 2**bits, rows, n)
    codes = codes if keep is None else torch.where(keep, codes, zero[:, group])
    scale = short((draw(seed + 2, rows, groups).abs() + 0.1).float().double(), 3).float()  # exact in float32
    return {"codes": codes.tolist(), "scale": numbers(scale, 9), "zero": zero.tolist(), "group": list(group),
            "bits": bits}


def grouped(n, size):
    """The group of each of n columns."""
    return [i // size for i in range(n)]


def pattern(seed, rows, n, N, M):
    """A random N:M mask (rows, n); some cells keep fewer, as zeros were there before."""
    rank = draw(seed, rows, -(-n // M), M).argsort(-1).argsort(-1)
    keep = (rank < N) & (draw(seed + 1, rows, -(-n // M), M) > -1.2)
    return keep.flatten(1)[:, :n]


def cases():
    """Every case without its result."""
    order = whole(5, 1000, 36).argsort(stable=True)  # act_order: columns of a group stand anywhere
    scattered = torch.tensor(grouped(36, 10))[order].tolist()
    two_four, four_eight = pattern(50, 3, 22, 2, 4), pattern(60, 2, 64, 4, 8)
    sparse = torch.where(two_four, short(draw(52, 3, 22), 3), 0.0)
    plain = {f"{bits} bits": quantized(seed, 3, grouped(cell, cell), bits)  # one cell each
             for bits, cell, seed in ((2, 16, 3), (3, 32, 3), (4, 8, 4), (8, 4, 10))}
    made = {
        **plain,
        "5 bits are stored in 8": quantized(10, 2, grouped(7, 7), 5),
        "17 rows are two blocks": quantized(20, 17, grouped(16, 8), 4),
        "groups of 20, padded to 32": quantized(30, 2, grouped(45, 20), 3),
        "act_order, groups of 10": quantized(40, 2, scattered, 2),
        "two tiles": quantized(45, 1, grouped(2100, 2100), 2),
        "2:4, 4 bits, groups of 12": {**quantized(50, 3, grouped(22, 12), 4, two_four), "n_m": [2, 4]},
        "4:8, 3 bits": {**quantized(60, 2, grouped(64, 64), 3, four_eight), "n_m": [4, 8]},
        "2:4, floats": {"weight": numbers(sparse), "n_m": [2, 4]},
    }
    out = []
    for i, (name, given) in enumerate(made.items()):
        n = len(given.get("group") or given["weight"][0])
        x = numbers(short(draw(100 + i, 2, n), 3)) if n < 100 else None
        out.append({"name": name, "given": {**given, "x": x}})
    return out


# ---- the results

class Code:
    """The code under test, imported when this is made."""

    def __init__(self):
        import kernels
        from engine.grids import Quantized
        self.kernels, self.quantized = kernels, Quantized

    def pack(self, given):
        """The Packed of a case."""
        n_m = tuple(given["n_m"]) if "n_m" in given else None
        if "weight" in given:
            weight = floats(given["weight"]).float()
        else:
            weight = self.quantized(*(torch.tensor(given[name], dtype=kind) for name, kind in (
                ("codes", torch.uint8), ("scale", torch.float32), ("zero", torch.uint8), ("group", torch.long))),
                given["bits"])
        return self.kernels.pack_sparse(weight, n_m) if n_m else self.kernels.pack(weight)


def result(code, case):
    """The Packed as lists, and y (rows of x, out) of its product in float64. Of a wide weight, no product, and of its
    16 lanes the first alone.
    """
    packed = code.pack(case["given"])
    x = case["given"]["x"]
    y = None if x is None else code.kernels.matmul(floats(x), packed, fused=False)
    lanes = slice(1) if x is None else slice(None)
    words = packed.words[..., lanes]
    out = {"words": words.tolist() if packed.bits < 32 else numbers(words),
           "zero": None if packed.zero is None else packed.zero[..., lanes].tolist(),
           "order": None if packed.order is None else packed.order.tolist(),
           "place": None if packed.place is None else packed.place.tolist(),
           "shape": list(packed.shape), "bits": packed.bits, "span": packed.span, "n_m": case["given"].get("n_m")}
    return {"packed": out, "y": numbers(y)}


def main():
    """Make the file again."""
    code = Code()
    write("kernels.json", cases(), lambda case: result(code, case))


if __name__ == "__main__":
    main()
