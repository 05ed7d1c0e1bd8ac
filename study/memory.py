"""
What each step of the study needs in memory, by formula, for a model that need not be here.

    python -m study memory --shape llama-7b --dtype bfloat16     # or opt-6.7b, smollm2-135m

The formulas, with P parameters of which Pb are in the blocks, n an input width, V the vocabulary:

    hold       itemsize P                                  the dense model, as teacher and as base
    compress   itemsize (P - Pb)                           embedding, head and norms of the new model
               + Pb (bits + 40 / group) / 8                packed weights, one scale and one zero-point a group
               + 4 N T C                                   the calibration tokens between two blocks
               + 4 R T (8 C + 4 hidden)                    what one block makes of R = 32 rows of them
               + 8 (sum of n² over one block's inputs)     H, in doubles
               + 28 max n²                                 the widest layer's sweep: H, its factor, their copies
    a step     itemsize Pb                                 the blocks, unpacked once for training; the rest is shared
               + what autograd keeps                       counted on two small stacks of this very code, without memory
               + 12 B T V                                  logits, their softmax and its gradient
               + 16 (trained parameters)                   weights, gradients, two moments

A layer-by-layer walk never holds the activations of more than one block. The compressed model has an embedding of its
own, so that nothing done to it can change the dense one. What is large is H of a wide layer: 16,384 inputs take 10 GB.

What it leaves out: the file cache, and memory that the allocator holds back.
"""
import argparse

import torch

import recover
from model import GPT, GPTConfig
from study.tables import markdown

SHAPES = {
    "smollm2-135m": GPTConfig(vocab_size=49152, context=8192, n_layer=30, n_head=9, n_kv_head=3, n_embd=576,
                              n_hidden=1536, norm="rmsnorm", activation="swiglu"),
    "opt-6.7b": GPTConfig(vocab_size=50272, context=2048, n_layer=32, n_head=32, n_embd=4096, n_hidden=16384,
                          position="learned", position_offset=2, norm="layernorm", activation="relu", bias=True),
    "llama-7b": GPTConfig(vocab_size=32000, context=2048, n_layer=32, n_head=32, n_embd=4096, n_hidden=11008,
                          norm="rmsnorm", activation="swiglu", tied=False),
}


def on_meta(config, n_layer=None):
    """The model without memory: shapes only."""
    with torch.device("meta"):
        return GPT(GPTConfig(**{**vars(config), "n_layer": n_layer or config.n_layer}))


def kept_by_autograd(config, B, T, P=0, rank=0):
    """Bytes that one forward pass keeps for the backward pass, float32: of a prompt (P) or LoRA (rank) on ids (B, T).

    Counted, not derived: the code runs on tensors without memory, for one and for two layers; each more adds the same.
    """
    counts = []
    for n_layer in (1, 2):
        model, kept = on_meta(config, n_layer), {}
        for p in model.parameters():
            p.requires_grad_(False)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        with torch.device("meta"):
            prompt = None if rank else torch.zeros(P, config.n_embd).requires_grad_()
            if rank:
                recover.add_lora(model, rank)
            ids = torch.zeros(B, T, dtype=torch.long)

        def keep(t):
            storage = t.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes(), t  # t too: it must live, or another takes its number
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = model.hidden(ids, prompt)
        counts.append(sum(n for n, _ in kept.values()))
        del hidden
    return counts[0] + (config.n_layer - 1) * (counts[1] - counts[0])


def bytes_by_step(config, itemsize=4, bits=3, group=64, calibration=(64, 64), batch=(4, 64), prompt=16, rank=8):
    """{step: bytes} by the formulas of the module docstring; `itemsize` bytes a weight, calibration and batch in (rows,
    tokens)."""
    model = on_meta(config)
    block = [layer for layer in model.blocks[0].modules() if isinstance(layer, torch.nn.Linear)]
    P, V, C = model.n_parameters(), config.vocab_size, config.n_embd
    Pb = config.n_layer * sum(layer.weight.numel() for layer in block)
    inputs = [C, C, C, model.blocks[0].mlp.down.in_features]  # of q k v; o; gate up; down
    N, T = calibration
    lora = config.n_layer * rank * sum(layer.in_features + layer.out_features for layer in block)
    B, Tr = batch
    steps = {"hold the dense model": itemsize * P}
    steps["compress it, beside the dense model"] = int(
        itemsize * (P - Pb) + Pb * (bits + 40 / group) / 8
        + 4 * N * T * C + 4 * min(N, 32) * T * (8 * C + 4 * inputs[-1])
        + 8 * sum(n * n for n in inputs) + 28 * max(inputs) ** 2)
    for name, trained, P_, r in ((f"a step of a prompt of {prompt}", prompt * C, prompt, 0),
                                 (f"a step of LoRA rank {rank}", lora, 0, rank)):
        scale = itemsize / 4  # activations come in the weights' type
        steps[name + ", beside the compressed model"] = int(
            itemsize * Pb + scale * kept_by_autograd(config, B, Tr, P_, r) + 12 * B * Tr * V + 16 * trained)
    return steps


def main(arguments):
    """python -m study memory: see the top of this file."""
    parser = argparse.ArgumentParser(prog="study memory", description="What each step of the study needs in memory.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m", help="the model's shape")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of its weights")
    args = parser.parse_args(arguments)
    needs = bytes_by_step(SHAPES[args.shape], getattr(torch, args.dtype).itemsize)
    print(markdown(["step", "GB"], [[name, f"{size / 1e9:.2f}"] for name, size in needs.items()]))
