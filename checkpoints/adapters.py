"""
Adapters on disk: a repair in two small files beside its base, in the layout that PEFT reads and writes.

    adapter_config.json         what kind of repair, and its few numbers
    adapter_model.safetensors   its tensors; in the metadata, the fingerprint of the base they were made for

    kind    peft_type      tensors
    lora    LORA           base_model.model.NAME.lora_A.weight (r, in), .lora_B.weight (out, r); NAME as in transformers
    prompt  PROMPT_TUNING  prompt_embeddings (P, C)
    prefix  PREFIX_TUNING  prompt_embeddings (P, L * 2 * nkv * hs): a position a row, key before value, by layers
    gains   LN_TUNING      base_model.model.NAME.ln_tuning_layers.weight (C,), in place of the norm's own
    bias    BIAS           base_model.model.NAME.bias (out,), added to what the layer gives
    idp     IDP            prompt_embeddings.0 (P_0, C), prompt_embeddings.1, ...; probe (M, C) where one was trained

The first four load with `peft.PeftModel.from_pretrained` beside the same base in transformers, and what PEFT saved
loads here, but gains of a LayerNorm, whose biases PEFT trains, too. PEFT has neither biases alone nor pools: those two
layouts are ours. LoRA beside GPT-2, whose one layer c_attn is three here, is saved under our own names
(blocks.0.attn.q), and PEFT's is not read. A repair is worth nothing on another base, so fingerprints are compared; PEFT
writes none, then names and shapes must do.

The study keeps its repairs in this layout, as lists of tensors in the order of training (`save_tensors`).

What it leaves out: what makes LoRA another method (DoRA, biases, trained embeddings, a rank or alpha of its own for a
layer), pickles (.bin).

Sources: the methods as in recover.py and idp.py; the layout is PEFT 0.21's, see tests/golden/make_adapters.py.

    python -m checkpoints FOLDER --base out/gptq-3-bits.safetensors    # what it is, and whether it fits
"""
import hashlib
import json
import math
import os
from dataclasses import asdict

import torch

from checkpoints.weights import FAMILIES, Settings
from engine.safetensors import dump, read_safetensors
from engine.files import read_json, whole_file
from engine.wrapping import Wrapper, check_bare, shape_of, wrapped
from idp import PromptPool
from recover import BiasLinear, LoRALinear, Prefix, SoftPrompt

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPES = {"lora": "LORA", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "gains": "LN_TUNING",
              "bias": "BIAS", "idp": "IDP"}
HOME = {"gpt2": "transformer", "llama": "model", "opt": "model.decoder"}  # where transformers keeps blocks and norms
SAMPLE = 2 ** 14  # elements of a tensor, about, that a fingerprint reads
VECTORS = {"gains": "ln_tuning_layers.weight", "bias": "bias"}  # how the names of their tensors end
# settings of an adapter_config.json that do not change what is computed from the tensors: training, names, memory
HARMLESS = (r"auto_mapping|base_model_name_or_path|inference_mode|revision|peft_version|target_modules|exclude_modules|"
            r"lora_dropout|layers_to_transform|layers_pattern|fan_in_fan_out|megatron_core|qalora_group_size|"
            r"ensure_weight_tying|token_dim|num_attention_heads|num_layers|encoder_hidden_size|prefix_projection|"
            r"init_weights|prompt_tuning_init(_text)?|tokenizer_name_or_path|tokenizer_kwargs|eva_config")
# settings that would change what LoRA computes, each with the values that change nothing. Of the ways to start LoRA
# those are refused that move the base's own weights (pissa, olora, loftq, corda, lora_ga): of the move the file has no
# trace
PLAIN = {"use_dora": [False], "use_bdlora": [False], "use_qalora": [False], "lora_bias": [False], "bias": ["none"],
         "alpha_pattern": [{}], "rank_pattern": [{}], "layer_replication": [[]], "alora_invocation_tokens": [[]],
         "modules_to_save": [[]], "trainable_token_indices": [[], {}], "target_parameters": [[]], "loftq_config": [{}],
         "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal", "mica"]}


# ---- the base

@torch.no_grad()
def fingerprint(model):
    """64 hex digits for a base: sha256 of its config and of elements spread over its tensors, packed ones as they are.

    LoRA and biases beside the base do not change it. Compression and training do; one weight changed in a large matrix
    may not.
    """
    wrappers = wrapped(model).keys()
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, t in model.state_dict().items():
        if name.rpartition(".")[0] in wrappers:  # A, B, shift: the base's own tensors are one level further down
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

    The small world's own GPT, rotary but without a gate, goes by Llama's names; GPT-2's layers go by ours.
    """
    gated, family = model.config.activation == "swiglu", family_of(model)
    names = {f"blocks.{i}.{ours}": f"{HOME[family]}.{FAMILIES[family][1]}.{i}.{theirs}"
             for i in range(model.config.n_layer) for theirs, joined in FAMILIES[family][2].items()
             if "norm" not in joined for ours in joined.split()}
    if family == "gpt2":  # its one layer c_attn is q, k and v here
        return {name: name for name in names}
    return {ours: theirs for ours, theirs in names.items() if gated or not ours.endswith("gate")}


def norm_names(model):
    """{our name of a norm: its name in transformers}, in the model's order."""
    family = family_of(model)
    top, blocks, block = FAMILIES[family]
    norms = [(theirs, ours) for theirs, ours in block.items() if "norm" in ours]
    return {**{f"blocks.{i}.{ours}": f"{HOME[family]}.{blocks}.{i}.{theirs}" for i in range(model.config.n_layer)
               for theirs, ours in norms},
            **{ours: f"{HOME[family]}.{theirs}" for theirs, ours in top.items() if ours == "norm"}}


def family_of(model):
    """Whose names the model goes by."""
    if model.config.position != "learned":
        return "llama"
    return "opt" if model.config.activation == "relu" else "gpt2"


def bare(model, name):
    """The linear layer of a name, without the LoRA or the bias that may stand beside it."""
    layer = model.get_submodule(name)
    return layer.base if isinstance(layer, Wrapper) else layer


# ---- saving

def save_adapter(folder, model, kind, repair=None, base_name=None):
    """Write a repair of `model` into `folder`: adapter_config.json and adapter_model.safetensors, whole or not at all.

    kind       "lora" or "bias", what stands beside the layers of `model`; or, given in `repair`, "prompt" (SoftPrompt
               or (P, C)), "prefix" (Prefix or (L, 2, nkv, P, hs)), "gains" ({our norm's name: (C,)}), "idp"
               (PromptPool or a list of (P_i, C))
    base_name  the base's folder or repository, for PEFT's users who load an adapter without naming its base
    Raises ValueError for a repair that does not fit the model or has no place in this layout.
    """
    if kind not in PEFT_TYPES:
        raise ValueError(f"kind must be one of {', '.join(PEFT_TYPES)}, got {kind!r}")
    if kind == "lora":
        config, tensors = lora_files(model, *lora_beside(model))
    elif kind in VECTORS:
        config, tensors = vector_files(model, kind, biases_beside(model) if kind == "bias" else repair)
    else:
        config, tensors = prompt_files(model, kind, repair)
    write_adapter(folder, model, kind, config, tensors, base_name)


def save_tensors(folder, model, kind, tensors, targets=None, probe=False):
    """Write a repair given as the list of its tensors in the order of training, which `load_tensors` gives back.

    lora    [A, B, A, B, ...], for a scale of 1, of the layers whose last names are in `targets`; None: of all
    bias    [(out,), ...] of those layers
    gains   [(C,), ...] of every norm
    prompt  [(P, C)]
    prefix  [(L, 2, nkv, P, hs)]
    idp     [(P_i, C), ...] and, with `probe`, the probe (M, C) as the last
    """
    names = list(norm_names(model)) if kind == "gains" else [
        name for name in layer_names(model) if targets is None or name.rpartition(".")[2] in targets]
    each = {"lora": 2, "bias": 1, "gains": 1}.get(kind)
    if each and len(tensors) != each * len(names):
        raise ValueError(f"{kind}: {len(tensors)} tensors for {len(names)} layers"
                         + (f" named {' or '.join(targets)}" if targets else ""))
    if kind == "lora":
        config, named = lora_files(model, list(zip(names, tensors[::2], tensors[1::2])), 1.0)
        write_adapter(folder, model, kind, config, named)
    elif kind in VECTORS:
        write_adapter(folder, model, kind, *vector_files(model, kind, dict(zip(names, tensors))))
    elif kind == "idp":
        save_adapter(folder, model, kind, PromptPool(tensors[:-1], tensors[-1]) if probe else tensors)
    else:
        save_adapter(folder, model, kind, *tensors)


def write_adapter(folder, model, kind, config, tensors, base_name=None):
    """Write both files: their config, completed, and {name: tensor} with the fingerprint of the base."""
    config = {**config, "peft_type": PEFT_TYPES[kind], "task_type": "CAUSAL_LM", "inference_mode": True,
              "base_model_name_or_path": base_name}
    os.makedirs(folder, exist_ok=True)
    weights, settings = (os.path.join(folder, name) for name in (WEIGHTS, CONFIG))
    with whole_file(settings) as f:
        json.dump(config, f, indent=2, sort_keys=True)
        f.flush()
        with whole_file(weights, "wb") as g:
            dump(g, tensors, {"format": "pt", "base_fingerprint": fingerprint(model), "base": describe(model)})
            g.flush()
            if os.path.exists(settings):  # from here to the end the folder holds no adapter, rather than half of two
                os.remove(settings)


def lora_beside(model):
    """([(our name, A, B)], scale) of the LoRA beside the layers of `model`."""
    layers = wrapped(model, LoRALinear)
    ranks, scales = {len(layer.A) for layer in layers.values()}, {layer.scale for layer in layers.values()}
    if len(ranks) != 1 or len(scales) != 1:
        raise ValueError(f"LoRA needs one rank and one scale to be saved, got {sorted(ranks)} and {sorted(scales)}")
    return [(name, layer.A, layer.B) for name, layer in layers.items()], scales.pop()


def lora_files(model, layers, scale):
    """(config, tensors) of LoRA [(our name, A, B)]."""
    theirs, rank = layer_names(model), len(layers[0][1])
    for ours, A, B in layers:
        n_in, n_out = shape_of(bare(model, ours))
        if A.shape != (rank, n_in) or B.shape != (n_out, rank):
            raise ValueError(f"{ours}: A {tuple(A.shape)} and B {tuple(B.shape)} must be {(rank, n_in)} and "
                             f"{(n_out, rank)}")
    alpha = round(scale * rank, 9)  # whole once more, where alpha / rank was rounded
    config = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": False,
              "target_modules": target_modules(theirs, [ours for ours, _, _ in layers]), "lora_dropout": 0.0,
              "bias": "none"}
    return config, {f"base_model.model.{theirs[ours]}.lora_{part}.weight": t
                    for ours, A, B in layers for part, t in (("A", A), ("B", B))}


def target_modules(theirs, ours):
    """The last names of the layers `ours`, as PEFT looks for them in every block; their full ones if not in every."""
    last = {theirs[name].rpartition(".")[2] for name in ours}
    everywhere = sum(name.rpartition(".")[2] in last for name in theirs.values()) == len(ours)
    return sorted(last if everywhere else (theirs[name] for name in ours))


def biases_beside(model):
    """{our name: (out,)} of the biases that stand beside the layers of `model`."""
    return {name: layer.shift for name, layer in wrapped(model, BiasLinear).items()}


def vector_files(model, kind, vectors):
    """(config, tensors) of one vector a layer or norm, {our name: vector}."""
    theirs, end = vector_names(model, kind), VECTORS[kind]
    if not vectors or not vectors.keys() <= theirs.keys():
        raise ValueError(f"{kind}: {sorted(vectors.keys() - theirs.keys())[:4] or 'none'} of this model's "
                         f"{', '.join(list(theirs)[:2])}, ...")
    for ours, vector in vectors.items():
        if vector.shape != vector_shape(model, ours):
            raise ValueError(f"{ours}: {kind} {tuple(vector.shape)} for {vector_shape(model, ours)[0]} outputs")
    return ({"target_modules": target_modules(theirs, vectors)},
            {f"base_model.model.{theirs[ours]}.{end}": vector for ours, vector in vectors.items()})


def vector_names(model, kind):
    """{our name: theirs} of what a kind of vectors belongs to."""
    return norm_names(model) if kind == "gains" else layer_names(model)


def vector_shape(model, name):
    """The shape of a layer's or a norm's outputs, (n,)."""
    layer = bare(model, name)
    return tuple(layer.weight.shape) if shape_of(layer) is None else shape_of(layer)[1:]


def prompt_files(model, kind, repair):
    """(config, tensors) of a prompt, a prefix or a pool."""
    c = model.config
    if kind == "idp":
        tensors = {f"prompt_embeddings.{i}": p for i, p in enumerate(getattr(repair, "prompts", repair))}
        if getattr(repair, "probe", None) is not None:
            tensors["probe"] = repair.probe
    else:
        weight = getattr(repair, "weight", repair)
        if kind == "prefix" and weight.dim() == 5:
            weight = weight.permute(3, 0, 1, 2, 4).flatten(1)  # (P, L * 2 * nkv * hs)
        tensors = {"prompt_embeddings": weight}
    names = check_prompts("the repair", model, kind, tensors)
    if kind == "idp":
        return {"num_virtual_tokens": [len(tensors[name]) for name in names]}, tensors
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


def open_adapter(folder, model):
    """(kind, path, Settings, {name: tensor on the model's device}) of an adapter that was made for this base."""
    kind, settings, tensors, metadata = read_adapter(folder)
    path, this, made_for = os.path.join(folder, WEIGHTS), fingerprint(model), metadata.get("base_fingerprint")
    if made_for not in (None, this):
        raise ValueError(f"{path}: made for the base {made_for[:12]} ({metadata.get('base', 'not described')}), "
                         f"not for this one, {this[:12]} ({describe(model)})")
    base = model.wte.weight
    # out of the mapped file, and no narrower than stored: LoRA's A and B are float32 beside a half-precision base too
    return kind, path, settings, {name: t.to(base.device, torch.promote_types(t.dtype, base.dtype), copy=True)
                                  for name, t in tensors.items()}


def load_adapter(folder, model):
    """(kind, repair) of what `save_adapter` or PEFT wrote: a SoftPrompt, a Prefix or a PromptPool; of LoRA, biases and
    gains, which then stand in `model`, the list of their parameters.

    Raises ValueError, with the model as it was, for a damaged adapter and for one made for another base.
    """
    kind, path, settings, tensors = open_adapter(folder, model)
    if kind == "lora":
        return kind, attach_lora(model, *read_lora(path, model, settings, tensors))
    if kind in VECTORS:
        return kind, attach_vectors(model, kind, read_vectors(path, model, kind, settings, tensors))
    return kind, make_prompt(path, model, kind, settings, tensors)


def load_tensors(folder, model, kind):
    """The list that `save_tensors` took; the model stays as it is. Raises what `load_adapter` raises, and ValueError
    for a repair of another kind.
    """
    found, path, settings, tensors = open_adapter(folder, model)
    if found != kind:
        raise ValueError(f"{path}: holds a repair of kind {found}, not {kind}")
    if kind == "lora":
        layers, alpha = read_lora(path, model, settings, tensors)
        return [t for _, A, B in layers for t in (A, B if alpha == len(A) else B * (alpha / len(A)))]
    if kind in VECTORS:
        return list(read_vectors(path, model, kind, settings, tensors).values())
    repair = make_prompt(path, model, kind, settings, tensors)
    if kind == "idp":
        return [p.detach() for p in (*repair.prompts, *([] if repair.probe is None else [repair.probe]))]
    return [repair.weight.detach()]


def read_lora(path, model, settings, tensors):
    """([(our name, A, B)], alpha) of LoRA's tensors, each of the right shape, in the model's order."""
    for name, plain in PLAIN.items():
        settings.only(name, *plain)
    rank, alpha = settings.get("r", int), settings.get("lora_alpha", float, None, 0, 1e6)
    if settings.get("use_rslora", bool, False):  # scaled by alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732
        alpha *= math.sqrt(rank)
    settings.finish(HARMLESS)
    layers, left = [], dict(tensors)
    for ours, theirs in layer_names(model).items():
        names = [f"base_model.model.{theirs}.lora_{part}.weight" for part in "AB"]
        if not left.keys() & set(names):
            continue
        (n_in, n_out), found = shape_of(bare(model, ours)), [left.pop(name, None) for name in names]
        for name, t, shape in zip(names, found, ((rank, n_in), (n_out, rank))):
            if t is None or t.shape != shape:
                raise ValueError(f"{path}: tensor {name} must have shape {shape}, "
                                 + ("and is missing" if t is None else f"has {tuple(t.shape)}"))
        layers.append((ours, *found))
    check_all_used(path, left, layers)
    return layers, alpha


def check_all_used(path, left, used):
    """ValueError unless every tensor of an adapter had its layer, and there were any."""
    if any(".c_attn." in name for name in left):
        raise ValueError(f"{path}: LoRA beside c_attn, GPT-2's one layer for what are q, k and v here, is not read")
    if left or not used:
        raise ValueError(f"{path}: tensors for no layer of this model: {sorted(left)[:4]}" if left else
                         f"{path}: no tensors")


def attach_lora(model, layers, alpha):
    """Put LoRA [(our name, A, B)] beside the layers of `model`, in place; its parameters."""
    check_bare(model)
    parameters = []
    for ours, A, B in layers:
        base = model.get_submodule(ours)
        layer = LoRALinear(base, len(A), alpha)
        layer.A, layer.B = map(torch.nn.Parameter, (A, B))
        model.set_submodule(ours, layer)
        parameters += [layer.A, layer.B]
    return parameters


def read_vectors(path, model, kind, settings, tensors):
    """{our name: vector} of a file's gains or biases, in the model's order."""
    settings.only("modules_to_save", [])
    settings.finish(HARMLESS)
    vectors, left = {}, dict(tensors)
    for ours, theirs in vector_names(model, kind).items():
        name = f"base_model.model.{theirs}.{VECTORS[kind]}"
        if name in left:
            vectors[ours] = left.pop(name)
            if vectors[ours].shape != vector_shape(model, ours):
                raise ValueError(f"{path}: tensor {name} must have shape {vector_shape(model, ours)}, has "
                                 f"{tuple(vectors[ours].shape)}")
    check_all_used(path, left, vectors)
    return vectors


def attach_vectors(model, kind, vectors):
    """Put biases beside the layers of `model`, or gains in place of its norms' own, in place; the parameters."""
    check_bare(model)
    parameters = {ours: torch.nn.Parameter(vector) for ours, vector in vectors.items()}
    for ours, parameter in parameters.items():
        base = model.get_submodule(ours)
        if kind == "gains":
            base.weight = parameter
        else:
            layer = BiasLinear(base)
            layer.shift = parameter
            model.set_submodule(ours, layer)
    return list(parameters.values())


def check_prompts(path, model, kind, tensors):
    """The names of the prompts of a prompt, a prefix or a pool, in order; ValueError unless all tensors fit the model.
    """
    c, probe = model.config, tensors.get("probe") if kind == "idp" else None
    several = range(max(len(tensors) - (probe is not None), 1))
    names = [f"prompt_embeddings.{i}" for i in several] if kind == "idp" else ["prompt_embeddings"]
    if {*names, *(["probe"] if probe is not None else [])} != tensors.keys():
        raise ValueError(f"{path}: the tensors must be {', '.join(names)}, got {', '.join(tensors) or 'none'}")
    width = 2 * c.n_layer * c.n_kv_head * c.head_size if kind == "prefix" else c.n_embd
    for name in names:
        t = tensors[name]
        if t.dim() != 2 or t.shape[1] != width or not 0 < len(t) < c.context:
            raise ValueError(f"{path}: {name} has shape {tuple(t.shape)}, this model takes (P, {width}) "
                             f"with P from 1 to {c.context - 1}")
    if probe is not None and probe.shape != (len(names), c.n_embd):
        raise ValueError(f"{path}: probe has shape {tuple(probe.shape)}, {len(names)} prompts of this model need "
                         f"{(len(names), c.n_embd)}")
    return names


def make_prompt(path, model, kind, settings, tensors):
    """The SoftPrompt, Prefix or PromptPool of a file."""
    prompts = [tensors[name] for name in check_prompts(path, model, kind, tensors)]
    claimed, lengths = settings.values.get("num_virtual_tokens"), [len(p) for p in prompts]
    if claimed != (lengths if kind == "idp" else lengths[0]):
        raise ValueError(f"{settings.path}: num_virtual_tokens is {claimed!r}, the tensors have {lengths}"[:300])
    settings.asked.add("num_virtual_tokens")
    settings.only("num_transformer_submodules", 1)
    settings.only("modules_to_save", [])
    settings.finish(HARMLESS)
    if kind == "idp":
        return PromptPool(prompts, tensors.get("probe"))
    if kind == "prompt":
        return SoftPrompt(prompts[0])
    c = model.config
    weight = prompts[0].view(-1, c.n_layer, 2, c.n_kv_head, c.head_size)  # (P, L, 2, nkv, hs)
    return Prefix(weight.permute(1, 2, 3, 0, 4).to(model.wte.weight.dtype))  # (L, 2, nkv, P, hs), as the cache's
