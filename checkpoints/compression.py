"""
The job of `python compress.py --in MODEL --text FILE ...`: a checkpoint and a text in, a compressed checkpoint out.

MODEL is any checkpoint that we can read: one of ours (.safetensors, its tokenizer in it or in tokens.tiktoken beside
it), a Hugging Face folder, a .gguf file; the result holds the tokenizer too. The text is tokenized with the
checkpoint's own tokenizer and cut into rows. The walk computes in float32 unless --dtype says otherwise; the result is
written in the dtype of the checkpoint.
"""
import argparse
import os
from dataclasses import fields

import torch

from checkpoints.native import save
from checkpoints.weights import read_model
from engine.device import add_device, device_of
from engine.settings import METHODS, CompressConfig
from kernels import PackedLinear

LENGTH = 128  # tokens a row, where the context has room


HEADER = (f"{'layer':24s} {'shape':>12s} {'bits':>4s} {'zeros':>6s} {'damp':>8s} "
          f"{'error before':>12s} {'after':>9s} {'of output':>9s} {'s':>4s}")


def layer_line(row):
    """A report row as a line under HEADER."""
    shape = "x".join(map(str, row["shape"]))
    return (f"{row['name']:24s} {shape:>12s} {row['bits']:4d} {row['zeros']:6.3f} {row['damp']:8.2g} "
            f"{row['error_before']:12.4g} {row['error_after']:9.3g} {row['relative_output_error']:9.4f} "
            f"{row['seconds']:4.1f}")


def last_line(report):
    """The line below the table."""
    retried = sum(row["retries"] > 0 for row in report)
    return (f"calibrated on {report[0]['tokens']:,} tokens; "
            f"{retried} of {len(report)} layers needed more damping than asked for")


def print_layers(report):
    """The report rows as a table."""
    print("\n".join([HEADER, *map(layer_line, report), last_line(report)]))


def option_parser():
    """Every field of CompressConfig as an option, with its default; and what to read and write."""
    parser = argparse.ArgumentParser(prog="compress.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Compress a checkpoint, calibrated on a text, and write it packed. "
                                                 "Without options: a lesson on one weight.")
    add = parser.add_argument
    add("--in", dest="source", metavar="MODEL", help="our .safetensors, a Hugging Face folder or a .gguf file")
    add("--text", metavar="FILE", help="what to calibrate on, UTF-8")
    add("--rows", type=int, default=128, help=f"rows of text to read, {LENGTH} tokens each or the model's context")
    add("--out", metavar="FILE", help="checkpoint to write; none: beside MODEL, named after it and the settings")
    add("--method", choices=list(METHODS), help="how")
    add("--bits", type=int, help="2 to 8; for a pruning method: of what stays")
    add("--group-size", type=int, help="columns that share a grid; none: one grid a row")
    add("--symmetric", action="store_true", help="zero-points in the middle of the grid (rtn, gptq)")
    add("--act-order", action="store_true", help="most active columns first (gptq)")
    add("--search", action="store_true", help="narrower grids where they lose less; not in the paper (gptq)")
    add("--refit", action="store_true", help="fit scales and codes, or the weights that stay, once more in the end; "
                                             "not in the papers (gptq, sparsegpt)")
    add("--sparsity", type=float, help="share of zeros (pruning methods)")
    add("--n-m", type=int, nargs=2, metavar=("N", "M"), help="or keep N of every M")
    add("--damp", type=float, help="share of the mean diagonal of H added to it (gptq, sparsegpt)")
    add("--block-size", type=int, help="columns in a batch; of sparsegpt's mask, too (gptq, sparsegpt)")
    add("--keep-zeros", action="store_true", help="every zero of the model stays, not only those of layers that were "
                                                  "pruned here (gptq, sparsegpt)")
    add("--targets", nargs="+", metavar="LAYER", help='"mlp.down", "blocks.0.attn.q"; none: all')
    add_device(parser, "of the model while it is compressed; the file is in that of MODEL")
    parser.set_defaults(**{field.name: field.default for field in fields(CompressConfig)})
    return parser


def default_name(path, config):
    """The file beside `path` that is named after it and every setting that is not a default."""
    path = os.path.normpath(path)
    path = os.path.abspath(path) if os.path.basename(path) in (".", "..") else path
    words = [path.removesuffix(".safetensors"), config.method]
    for field in fields(CompressConfig)[1:]:
        value = getattr(config, field.name)
        if value != field.default:
            value = "" if value is True else "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"{field.name.replace('_', '')}{value}")
    return "-".join(words) + ".safetensors"


def read_rows(path, encoding, rows, length):
    """(N, T) token ids of a UTF-8 text file: its first `rows` rows of `length` tokens; a shorter text is one row."""
    with open(path, encoding="utf-8") as f:
        try:
            text = f.read(min(16 * rows * length, os.path.getsize(path)))  # a token is rarely longer than 16 letters
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    ids = encoding.encode_ordinary(text)
    if not ids:
        raise ValueError(f"{path}: no text in it")
    N = min(rows, len(ids) // length)
    return torch.tensor(ids[:N * length] if N else ids).view(max(N, 1), -1)


def parameters(model):
    """Parameters of a model, those in packed layers included."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    return model.n_parameters() + sum(m.in_features * m.out_features + (0 if m.bias is None else m.bias.numel())
                                      for m in packed)


def compress_files(arguments, compress):
    """`python compress.py` with arguments; `compress` is its function. Raises ValueError or OSError for bad input."""
    args = option_parser().parse_args(arguments)
    given = {field.name: getattr(args, field.name) for field in fields(CompressConfig)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if not args.source or not args.text:
        raise ValueError("to compress a checkpoint give --in MODEL and --text FILE; --help shows all options")
    config, out, (device, dtype) = CompressConfig(**given), args.out, device_of(args)
    if args.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {args.rows}")
    if out is None:
        out = default_name(args.source, config)
        if os.path.exists(out):
            raise ValueError(f"{out} is there already: name another file with --out, or the same to replace it")
    if os.path.exists(out) and os.path.samefile(out, args.source):
        raise ValueError(f"--out is the checkpoint to compress, {args.source}: name another file")
    if os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or "."):
        raise ValueError(f"--out {out}: not a file in a folder that exists")
    with open(args.text, "rb"):
        pass  # missing: say so before the checkpoint is read
    model, encoding = read_model(args.source, dtype=None)
    if encoding is None:
        raise ValueError(f"{args.source}: no tokenizer beside it (tokens.tiktoken, or tokenizer.json in a folder)")
    stored, before = model.wte.weight.dtype, parameters(model)
    ids = read_rows(args.text, encoding, args.rows, min(LENGTH, model.config.context))
    print(f"{args.source}: {before:,} parameters; calibrating on {ids.shape[0]:,} rows of {ids.shape[1]} tokens")
    print(HEADER)
    new, report = compress(model.to(device, dtype), ids, **given,
                           progress=lambda row: print(layer_line(row), flush=True))
    print(last_line(report))
    save(new.to(stored), out, encoding)
    size = os.path.getsize(out)
    print(f"{out}: {size:,} bytes with everything; {before:,} parameters take {4 * before / size:.2f} times as much in "
          f"float32, {2 * before / size:.2f} times in 16 bits")
