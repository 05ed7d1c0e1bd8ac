"""
The job of `python kernels.py --model MODEL --text "..."`: any checkpoint goes on with a text, dense and packed.

The linear layers of the blocks are packed as they come, rounded to nearest; a head of more than a million weights at
8 bits. Layers of MODEL that are packed already stay as they are. Dense and packed write the same number of tokens in
turn, greedily, and a line for each says how fast.
"""
import argparse
import statistics
import sys
import time

import torch
import torch.nn as nn

from checkpoints.weights import read_model
from compress import rtn
from engine.decode import choose_decode
from engine.device import add_device, device_of
from engine.script import guard
from engine.wrapping import shared_copy
from kernels import PackedLinear, pack


def packed_model(model, bits, group_size=64):
    """A copy whose linear layers are packed; what stays dense is shared with `model`."""
    packed = shared_copy(model)

    def round_and_pack(layer, bits):
        size = next(size for size in (group_size, 32, layer.in_features) if layer.in_features % size == 0)
        return PackedLinear(pack(rtn(layer.weight.detach().float(), bits, size)), layer.bias)

    for name, layer in list(packed.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            packed.blocks.set_submodule(name, round_and_pack(layer, bits))
    if isinstance(packed.lm_head, nn.Linear) and packed.lm_head.weight.numel() > 1 << 20:
        packed.lm_head = round_and_pack(packed.lm_head, 8)
    return packed


@torch.no_grad()
def write(model, ids, tokens):
    """(ids (1, T) with new tokens behind them, chosen greedily; tokens a second, by the median step; seconds to the
    second token, which waits for the compiler).
    """
    cache, took = model.new_cache(1, ids.shape[1] + tokens), [time.perf_counter()]
    logits = model(ids, cache=cache)[:, -1]  # (1, V)
    for i in range(tokens):
        new = logits.argmax(-1, keepdim=True)  # (1, 1)
        ids = torch.cat([ids, new], dim=1)
        if i + 1 < tokens:
            logits = model.step(new, cache)
            took.append(time.perf_counter())
    steps = [b - a for a, b in zip(took[1:], took[2:])]
    return ids, 1 / statistics.median(steps), took[1] - took[0]


def writing_parser():
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="kernels.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Go on with a text, dense and packed. Without options: a lesson on "
                                                 "words and codes.")
    add = parser.add_argument
    add("--model", required=True, help="our .safetensors, a Hugging Face folder or a .gguf file")
    add("--text", default="The capital of France is", help="what the model goes on with")
    add("--tokens", type=int, default=64, help="to write")
    add("--bits", type=int, default=4, help="2 to 8, of the blocks' linear layers; a large head has 8")
    add("--group-size", type=int, default=64,
        help="columns that share a scale; 32 or all where it does not divide them")
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="the packed model; none: where it pays")
    add_device(parser, "of activations and of what stays dense")
    return parser


def encoded(text, encoding, device):
    """ids (1, T) of a text, behind the token that a text of this vocabulary begins with, if there is one."""
    bos = getattr(encoding, "bos", None)
    return torch.tensor([([] if bos is None else [bos]) + encoding.encode_ordinary(text)], device=device)


def go_on(arguments):
    """The command line of kernels.py. Raises ValueError or OSError, naming the file, for what cannot be read."""
    args = writing_parser().parse_args(arguments)
    if args.tokens < 3 or args.group_size < 1 or not 2 <= args.bits <= 8:
        raise ValueError(f"--tokens must be at least 3, --group-size at least 1, --bits in [2, 8], got {args.tokens}, "
                         f"{args.group_size}, {args.bits}")
    device, dtype = device_of(args)
    dense, encoding = read_model(args.model, dtype=dtype)
    if encoding is None:
        raise ValueError(f"{args.model} has no vocabulary to read the text with")
    ids = encoded(args.text, encoding, device)
    if ids.shape[1] == 0 or ids.shape[1] + args.tokens > dense.config.context:
        raise ValueError(f"{ids.shape[1]} tokens of text and {args.tokens} new ones must be at least 1 and fit the "
                         f"context of {dense.config.context}")
    dense = dense.to(device, dtype).requires_grad_(False)
    models = {f"packed, {args.bits} bits": packed_model(dense, args.bits, args.group_size)}
    if not any(isinstance(layer, PackedLinear) for layer in dense.modules()):
        models = {f"dense, {args.dtype}": dense, **models}
    for name, model in models.items():
        if name.startswith("packed"):
            print(choose_decode(model, args.tokens, args.compile))
        out, rate, first = write(model, ids, args.tokens)
        held = {t.data_ptr(): t.nbytes for t in (*model.blocks.parameters(), *model.blocks.buffers())}
        print(f"{name:16s} {rate:8.1f} tokens/s after {first:.1f} s, blocks of {sum(held.values()) / 1e6:.1f} MB\n"
              f"  {encoding.decode(out[0].tolist())!r}")


def main():
    """The script: see the top of this file, and --help."""
    go_on(sys.argv[1:])


if __name__ == "__main__":
    guard(main, "kernels.py")
