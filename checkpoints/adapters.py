"""
Adapters on disk: a repair in two small files beside its base, in the layout that PEFT reads and writes.

    adapter_config.json         what kind of repair, and its few numbers
    adapter_model.safetensors   its tensors; in the metadata, the fingerprint of the base they were made for

    kind    peft_type      tensors
    lora    LORA           base_model.model.NAME.lora_A.weight (r, in), .lora_B.weight (out, r); NAME as in transformers
    prompt  PROMPT_TUNING  prompt_embeddings (P, C)
    prefix  PREFIX_TUNING  prompt_embeddings (P, L * 2 * nkv * hs): a position a row, key before value, by layers
    idp     IDP            prompt_embeddings.0 (P_0, C), prompt_embeddings.1, ...: ours alone, PEFT has no pools

The first three load with `peft.PeftModel.from_pretrained` beside the same base in transformers, and what PEFT saved
loads here. A repair is worth nothing on another base, so fingerprints are compared; PEFT writes none, then names and
shapes must do.

What it leaves out: LoRA for GPT-2 (its one layer c_attn is three here), what makes LoRA another method (DoRA, biases,
trained embeddings, a rank or alpha of its own for a layer), pickles (.bin).

Sources: the methods as in recover.py and idp.py; the layout is PEFT 0.21's, see tests/golden/make_adapters.py.

    python -m checkpoints.adapters FOLDER --base out/gptq-3-bits.safetensors      # what is it, and does it belong to this base?
"""
import argparse
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict

import torch

from checkpoints.native import load
from checkpoints.vocabulary import read_json
from checkpoints.weights import FAMILIES, Settings, load_pretrained
from engine.safetensors import read_safetensors, write_safetensors
from idp import PromptPool
from recover import LoRALinear, Prefix, SoftPrompt, lora_layers, shape_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPES = {"lora": "LORA", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "idp": "IDP"}
BLOCKS = {"llama": "model.layers", "opt": "model.decoder.layers"}  # where transformers keeps the blocks
SAMPLE = 2 ** 14  # elements of a tensor, about, that a fingerprint reads
# settings that change what LoRA computes from the same tensors, each with the value that changes nothing
PLAIN = {"use_dora": False, "use_bdlora": False, "use_qalora": False, "alpha_pattern": {}, "rank_pattern": {},
         "layer_replication": [], "alora_invocation_tokens": [], "modules_to_save": []}


# ---- the base

@torch.no_grad()
def fingerprint(model):
    """64 hex digits for a base: sha256 of its config and of elements spread over its tensors, packed ones as they are.

    LoRA beside the base does not change it. Compression and training do; one weight changed in a large matrix may not.
    """
    wrapped = {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, t in model.state_dict().items():
        if name.rpartition(".")[0] in wrapped:  # A or B: the base's own tensors are one level further down
            continue
        digest.update(f"{name.replace('.base.', '.')} {t.dtype} {tuple(t.shape)}".encode())
        step = max(1, t.numel() // SAMPLE)
        while math.gcd(step, *t.shape[-1:]) > 1:  # else it would meet the same few columns in every row
            step += 1
        sample = t.flatten()[::step] + 0  # -0 becomes 0, as it does in the checkpoint of a pruned model
        digest.update(sample.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(model):
    """A base in words, for messages."""
    c = model.config
    packed = sum(shape_of(m) is not None and not isinstance(m, torch.nn.Linear) for m in model.blocks.modules())
    return f"{c.n_layer} layers of width {c.n_embd}, vocabulary {c.vocab_size}, {packed} packed linear layers"


def layer_names(model):
    """{our name of a linear layer: its name in transformers}, as "blocks.0.attn.q": "model.layers.0.self_attn.q_proj".

    The small world's own GPT, rotary but without a gate, goes by Llama's names.
    """
    learned, modules = model.config.position == "learned", dict(model.named_modules())
    if learned and model.config.activation != "relu":
        raise ValueError("GPT-2 has one layer c_attn, and one LoRA beside it, where this GPT has q, k and v: "
                         "its LoRA is neither saved nor loaded")
    family = "opt" if learned else "llama"
    names = {f"blocks.{i}.{ours}": f"{BLOCKS[family]}.{i}.{theirs}" for i in range(model.config.n_layer)
             for theirs, ours in FAMILIES[family][2].items() if "norm" not in ours}
    return {ours: theirs for ours, theirs in names.items() if ours in modules}


# ---- saving

def save_adapter(folder, model, kind, repair=None, base_name=None):
    """Write a repair of `model` into `folder`: adapter_config.json and adapter_model.safetensors, whole or not at all.

    kind       "lora", the one that stands beside the layers of `model`; or, given in `repair`, "prompt" (SoftPrompt or
               (P, C)), "prefix" (Prefix or (L, 2, nkv, P, hs)), "idp" (PromptPool or a list of (P_i, C))
    base_name  the base's folder or repository, for PEFT's users who load an adapter without naming its base
    Raises ValueError for a repair that does not fit the model or has no place in this layout.
    """
    if kind not in PEFT_TYPES:
        raise ValueError(f"kind must be one of {', '.join(PEFT_TYPES)}, got {kind!r}")
    config, tensors = lora_files(model) if kind == "lora" else prompt_files(model, kind, repair)
    config |= {"peft_type": PEFT_TYPES[kind], "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
               "inference_mode": True}
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in (WEIGHTS, CONFIG)]
    temporary = [f"{path}.{os.getpid()}.tmp" for path in paths]
    try:
        write_safetensors(temporary[0], tensors, {"format": "pt", "base_fingerprint": fingerprint(model),
                                                  "base": describe(model)})
        with open(temporary[1], "w", encoding="utf-8") as f:
            json.dump(config, f, indent=2, sort_keys=True)
        if os.path.exists(paths[1]):  # from here to the last line the folder holds no adapter, rather than half of two
            os.remove(paths[1])
        for written, path in zip(temporary, paths):
            os.replace(written, path)
    finally:
        for path in filter(os.path.exists, temporary):
            os.remove(path)


def lora_files(model):
    """(config, tensors) of the LoRA beside the layers of `model`."""
    ours, theirs = {id(m): name for name, m in model.named_modules()}, layer_names(model)
    layers = {theirs[ours[id(layer)]]: layer for _, _, layer in lora_layers(model)}
    ranks, scales = {len(layer.A) for layer in layers.values()}, {layer.scale for layer in layers.values()}
    if len(ranks) != 1 or len(scales) != 1:
        raise ValueError(f"LoRA needs one rank and one scale to be saved, got {sorted(ranks)} and {sorted(scales)}")
    rank = ranks.pop()
    alpha = round(scales.pop() * rank, 9)  # whole once more, where alpha / rank was rounded
    last = {name.rpartition(".")[2] for name in layers}  # q_proj, ...: PEFT looks for them in every block
    everywhere = sum(name.rpartition(".")[2] in last for name in theirs.values()) == len(layers)
    config = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": False,
              "target_modules": sorted(last if everywhere else layers), "lora_dropout": 0.0, "bias": "none"}
    return config, {f"base_model.model.{name}.lora_{part}.weight": getattr(layer, part)
                    for name, layer in layers.items() for part in "AB"}


def prompt_files(model, kind, repair):
    """(config, tensors) of a prompt, a prefix or a pool."""
    c = model.config
    if getattr(repair, "probe", None) is not None:
        raise ValueError("a pool's probe has no place in this layout: save its prompts, PromptPool(pool.prompts)")
    if kind == "idp":
        tensors = {f"prompt_embeddings.{i}": p for i, p in enumerate(getattr(repair, "prompts", repair))}
    else:
        weight = getattr(repair, "weight", repair)
        if kind == "prefix" and weight.dim() == 5:
            weight = weight.permute(3, 0, 1, 2, 4).flatten(1)  # (P, L * 2 * nkv * hs)
        tensors = {"prompt_embeddings": weight}
    check_prompts("the repair", model, kind, tensors)
    if kind == "idp":
        return {"num_virtual_tokens": [len(t) for t in tensors.values()]}, tensors
    heads = c.n_kv_head if kind == "prefix" else c.n_head  # PEFT counts the keys' and values' heads of a prefix
    config = {"num_virtual_tokens": len(weight), "num_transformer_submodules": 1, "num_layers": c.n_layer,
              "num_attention_heads": heads, "token_dim": heads * c.head_size}
    if kind == "prefix":
        config |= {"prefix_projection": False, "encoder_hidden_size": heads * c.head_size}
    return config, tensors


# ---- loading

def read_adapter(folder):
    """(kind, Settings, {name: tensor}, metadata); ValueError, naming file and field, or OSError for a missing file."""
    paths = [os.path.join(folder, name) for name in (WEIGHTS, CONFIG)]
    settings = Settings(paths[1], read_json(paths[1]))
    peft_type, kinds = settings.get("peft_type", str), {name: kind for kind, name in PEFT_TYPES.items()}
    if peft_type not in kinds:
        raise ValueError(f"{paths[1]}: peft_type {peft_type!r} is not one of {', '.join(kinds)}")
    settings.only("task_type", "CAUSAL_LM")
    if not os.path.exists(paths[0]) and os.path.exists(os.path.join(folder, "adapter_model.bin")):
        raise ValueError(f"{folder}: weights only as a pickle (adapter_model.bin), which is not read")
    tensors, metadata = read_safetensors(paths[0])
    for name, t in tensors.items():
        if not t.is_floating_point() or not t.isfinite().all():
            raise ValueError(f"{paths[0]}: tensor {name} is not made of finite floats")
    return kinds[peft_type], settings, tensors, metadata


def load_adapter(folder, model):
    """(kind, repair) of what `save_adapter` or PEFT wrote: a SoftPrompt, a Prefix or a PromptPool; of LoRA, which then
    stands beside the layers of `model`, the list of its parameters.

    Raises ValueError, with the model as it was, for a damaged adapter and for one made for another base.
    """
    kind, settings, tensors, metadata = read_adapter(folder)
    path, this, made_for = os.path.join(folder, WEIGHTS), fingerprint(model), metadata.get("base_fingerprint")
    if made_for not in (None, this):
        raise ValueError(f"{path}: made for the base {made_for[:12]} ({metadata.get('base', 'not described')}), "
                         f"not for this one, {this[:12]} ({describe(model)})")
    tensors = {name: t.to(model.wte.weight, copy=True) for name, t in tensors.items()}  # out of the mapped file
    return kind, (attach_lora if kind == "lora" else make_prompt)(path, model, kind, settings, tensors)


def attach_lora(path, model, kind, settings, tensors):
    """Put the LoRA of a file beside the layers of `model`, in place: all of it or, with a ValueError, nothing."""
    for name, plain in PLAIN.items():
        settings.only(name, plain)
    rank, alpha = settings.get("r", int), settings.get("lora_alpha", float, None, 0, 1e6)
    if settings.get("use_rslora", bool, False):  # scaled by alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732
        alpha *= math.sqrt(rank)
    if lora_layers(model):
        raise ValueError("the model has LoRA already: merge_lora or remove_lora first")
    layers = []
    for ours, theirs in layer_names(model).items():
        names = [f"base_model.model.{theirs}.lora_{part}.weight" for part in "AB"]
        if not tensors.keys() & set(names):
            continue
        base = model.get_submodule(ours)
        (n_in, n_out), found = shape_of(base), [tensors.pop(name, None) for name in names]
        for name, t, shape in zip(names, found, ((rank, n_in), (n_out, rank))):
            if t is None or t.shape != shape:
                raise ValueError(f"{path}: tensor {name} must have shape {shape}, "
                                 + ("and is missing" if t is None else f"has {tuple(t.shape)}"))
        layer = LoRALinear(base, n_in, n_out, rank, alpha)
        layer.A, layer.B = map(torch.nn.Parameter, found)
        layers.append((*ours.rpartition(".")[::2], layer))
    if tensors or not layers:
        raise ValueError(f"{path}: tensors for no layer of this model: {sorted(tensors)[:4]}" if tensors else
                         f"{path}: no tensors")
    for parent, child, layer in layers:
        setattr(model.get_submodule(parent), child, layer)
    return [p for _, _, layer in layers for p in (layer.A, layer.B)]


def check_prompts(path, model, kind, tensors):
    """The names of the tensors of a prompt, a prefix or a pool, in order; ValueError unless they fit the model."""
    c, several = model.config, range(max(len(tensors), 1))
    names = [f"prompt_embeddings.{i}" for i in several] if kind == "idp" else ["prompt_embeddings"]
    if set(names) != tensors.keys():
        raise ValueError(f"{path}: the tensors must be {', '.join(names)}, got {', '.join(tensors) or 'none'}")
    width = 2 * c.n_layer * c.n_kv_head * c.head_size if kind == "prefix" else c.n_embd
    for name, t in tensors.items():
        if t.dim() != 2 or t.shape[1] != width or not 0 < len(t) < c.context:
            raise ValueError(f"{path}: {name} has shape {tuple(t.shape)}, this model takes (P, {width}) "
                             f"with P from 1 to {c.context - 1}")
    return names


def make_prompt(path, model, kind, settings, tensors):
    """The SoftPrompt, Prefix or PromptPool of a file."""
    prompts = [tensors[name] for name in check_prompts(path, model, kind, tensors)]
    claimed, lengths = settings.values.get("num_virtual_tokens"), [len(p) for p in prompts]
    if claimed != (lengths if kind == "idp" else lengths[0]):
        raise ValueError(f"{settings.path}: num_virtual_tokens is {claimed!r}, the tensors have {lengths}"[:300])
    settings.only("num_transformer_submodules", 1)
    if kind == "idp":
        return PromptPool(prompts)
    if kind == "prompt":
        return SoftPrompt(prompts[0])
    c = model.config
    weight = prompts[0].view(-1, c.n_layer, 2, c.n_kv_head, c.head_size)  # (P, L, 2, nkv, hs)
    return Prefix(weight.permute(1, 2, 3, 0, 4))  # (L, 2, nkv, P, hs)


# ---- a look at an adapter

def main():
    """The script: see the top of this file, and --help."""
    parser = argparse.ArgumentParser(description="Say what an adapter is, and whether it belongs to a base.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", help="with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--base", help="a checkpoint of this study, a Hugging Face folder or a .gguf file")
    args = parser.parse_args()
    try:
        kind, _, tensors, metadata = read_adapter(args.folder)
        print(f"{kind}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters, made for "
              f"{metadata.get('base', 'a base it does not describe')}")
        if args.base:
            ours = args.base.endswith(".safetensors")
            load_adapter(args.folder, load(args.base) if ours else load_pretrained(args.base, tokenizer=False)[0])
            print("it fits this base" + ("" if "base_fingerprint" in metadata else ", by names and shapes alone"))
    except (ValueError, OSError) as error:
        print(f"adapters.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
