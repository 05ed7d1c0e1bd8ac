"""
Byte-level BPE vocabularies of real models, as tiktoken encodings.

What it does: reads a vocabulary (tokenizer.json, or vocab.json with merges.txt, or the metadata of a GGUF file)
into a `tiktoken.Encoding` that gives the model's own token ids (encoding.py).

What it leaves out: sentencepiece (refused, with a line that says what to do), normalization other than Unicode's NFC,
and split patterns other than GPT-2's, Llama 3's, Qwen2's and SmolLM's. Run it:

    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf --text "The capital of France is"
"""
import base64
import json
import os
import re
import unicodedata

import tiktoken

from checkpoints.encoding import EOT, Vocabulary, byte_pairs
from engine.files import read_json, whole_file

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
                r"""\s*[\r\n]+|\s+(?!\S)|\s+""")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# SmolLM cuts out every digit first and splits what is between as GPT-2 does: no space joins a digit, and a space in
# front of a digit is the last of its piece, so all spaces there stay together
DIGITS_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""

# the names that GGUF files give these patterns, as llama.cpp reads them, where nothing else about the tokenizer differs
GGUF_SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat"), GPT2_SPLIT),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3", "falcon-h1", "pixtral",
                     "midm-2.0", "lfm2"), LLAMA3_SPLIT),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b"), DIGITS_SPLIT), "qwen2": QWEN2_SPLIT}
# those of them for which llama.cpp puts a token in front of every text unless told not to, and ignores merges
LIKE_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")

NO_SENTENCEPIECE = ("the vocabulary is a sentencepiece one, which tiktoken cannot express: load the weights alone "
                    "with load_pretrained(path, tokenizer=False) and bring token ids")


# ---- files

def from_folder(path, config, size):
    """The encoding of a folder: tokenizer.json, or vocab.json and merges.txt; None where it has neither.

    config  the folder's config.json as a dict, for the token that ends a text
    size    how many ids the model knows
    """
    def there(name):
        return os.path.exists(os.path.join(path, name))
    extra = read_json(os.path.join(path, "tokenizer_config.json")) if there("tokenizer_config.json") else {}
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in extra.items()}
    bos = named.get("bos_token") if extra.get("add_bos_token") is True else None
    if there("tokenizer.json"):
        file = os.path.join(path, "tokenizer.json")
        vocab, merges, more, first = parse_tokenizer(file, read_json(file))
        bos = bos or first
    elif there("vocab.json") and there("merges.txt"):
        file = os.path.join(path, "vocab.json")
        vocab, merges, more = read_json(file), read_merges(os.path.join(path, "merges.txt")), {"split": GPT2_SPLIT}
    elif there("tokenizer.model"):
        raise ValueError(f"{os.path.join(path, 'tokenizer.model')}: {NO_SENTENCEPIECE}")
    else:
        return None
    if not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{file}: the vocabulary has ids that are not integers")
    eos = config.get("eos_token_id")
    eos = (eos or [None])[0] if isinstance(eos, list) else eos
    if extra.get("add_bos_token") is True and (not isinstance(bos, str) or bos not in vocab):
        raise ValueError(f"{os.path.join(path, 'tokenizer_config.json')}: add_bos_token asks for a token in front of "
                         f"every text, but bos_token {bos!r} is not in the vocabulary"[:300])
    bos, end = (vocab.get(token) if isinstance(token, str) else None for token in (bos, named.get("eos_token")))
    eos = end if eos is None else eos
    if eos is not None and not (type(eos) is int and 0 <= eos < size):
        raise ValueError(f"{os.path.join(path, 'config.json')}: eos_token_id {eos!r} is not one of the model's tokens, "
                         f"0 to {size - 1}"[:300])
    return byte_pairs(file, vocab, merges, size=size, bos=bos, eos=eos, **more)


def read_merges(file):
    """The pairs of a merges.txt: two tokens a line, under a line with its version."""
    with open(file, "rb") as f:
        try:
            lines = f.read().decode().replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8") from None
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise ValueError(f"{file}: pair {number} {pair!r} is not two tokens"[:300])
    return pairs


def parse_tokenizer(file, t):
    """(vocab, merges, what else `byte_pairs` takes, the token in front of every text or None) of a tokenizer.json."""
    model, added = t.get("model"), t.get("added_tokens", [])
    if not (isinstance(model, dict) and isinstance(model.get("vocab"), dict)
            and isinstance(model.get("merges"), list)):
        raise ValueError(f"{file}: model is not a BPE with vocab and merges")
    if model.get("byte_fallback"):
        raise ValueError(f"{file}: {NO_SENTENCEPIECE}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"{file}: model.{name}={model[name]!r} is not supported"[:300])
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if not all(isinstance(m, list) and all(isinstance(part, str) for part in m) for m in merges):
        raise ValueError(f"{file}: merges are not pairs of tokens")
    vocab = dict(model["vocab"])
    if not (isinstance(added, list) and all(isinstance(a, dict) and isinstance(a.get("content"), str) for a in added)):
        raise ValueError(f"{file}: added_tokens is not a list of tokens")
    found = ({}, {})  # in the text as it is, in the normalized text
    for a in added:
        token, special = a["content"], a.get("special") is True
        if vocab.setdefault(token, a.get("id")) != a.get("id"):
            raise ValueError(f"{file}: token {token!r} has two ids, {a.get('id')!r} and {vocab[token]!r}"[:300])
        for flag in ("lstrip", "rstrip", "single_word"):
            if a.get(flag) and not special:
                raise ValueError(f"{file}: added token {token!r} with {flag} is not supported"[:300])
        if not special:
            found[a.get("normalized", True) is not False][token] = a.get("id")
    if "" in found[0] or "" in found[1]:
        raise ValueError(f"{file}: a special token is empty, or not Unicode")
    nfc = normalizes(file, t.get("normalizer"))
    if nfc:  # what is looked for in a normalized text is normalized itself
        found[1].update({unicodedata.normalize("NFC", token): found[1].pop(token) for token in list(found[1])})
    first = None
    match t.get("post_processor"):
        case {"processors": [*steps]} | steps:
            for step in steps if isinstance(steps, list) else [steps]:
                match step:
                    case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
                        first = token
    return vocab, merges, {"special": [a["content"] for a in added if a.get("special") is True], "added": found,
                           "whole": model.get("ignore_merges") is True, "nfc": nfc,
                           "split": split_of(file, t.get("pre_tokenizer"))}, first


def normalizes(file, n):
    """Whether a tokenizer.json's normalizer brings text into Unicode's form C; ValueError for one that does more."""
    match n:
        case None | {"type": "Sequence", "normalizers": []}:
            return False
        case {"type": "NFC"}:
            return True
        case {"type": "Sequence", "normalizers": [*steps]}:
            return any([normalizes(file, step) for step in steps])
        case {"type": "Prepend" | "Replace"}:
            raise ValueError(f"{file}: {NO_SENTENCEPIECE}")
    raise ValueError(f"{file}: normalizer {json.dumps(n)[:160]} is not supported, only NFC; load_pretrained(path, "
                     "tokenizer=False) loads the weights")


def split_of(file, p):
    """The pattern that splits as a tokenizer.json's pre_tokenizer does. Only known ones: a pattern is a program."""
    steps = p.get("pretokenizers") if isinstance(p, dict) and p.get("type") == "Sequence" else [p]
    match steps:
        case [*_, {"type": "ByteLevel", "add_prefix_space": False, **last}]:
            by_regex = last.get("use_regex", True) is True
            match steps[:-1]:
                case [] if by_regex:
                    return GPT2_SPLIT
                case [{"type": "Digits", "individual_digits": True}] if by_regex:
                    return DIGITS_SPLIT
                case [{"type": "Split", "pattern": {"Regex": str(pattern)}, **how}] if not by_regex:
                    kept = how.get("behavior"), how.get("invert", False)  # all text matches: nothing is left out
                    if one_spelling(pattern) in SPELLED and kept in (("Isolated", False), ("Removed", True)):
                        return pattern
    raise ValueError(f"{file}: pre_tokenizer {json.dumps(p)[:160]} is not GPT-2's, Llama 3's, Qwen2's or SmolLM's. If "
                     "the vocabulary is a sentencepiece one, load_pretrained(path, tokenizer=False) loads the weights")


def one_spelling(pattern):
    """A split pattern with what is written in several ways written in one."""
    for endings in ("'(?i:[sdmt]|ll|ve|re)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"):
        pattern = pattern.replace(endings, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
    pattern = pattern.replace("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d")
    for written, meant in (("?+", "?"), ("++", "+"), ("*+", "*")):  # possessive: nothing behind them needs to give back
        pattern = pattern.replace(written, meant)
    return pattern


SPELLED = [one_spelling(split) for split in (GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT)]


def from_gguf(path, metadata, size):
    """The encoding in a GGUF file's metadata, or None where there is none."""
    def get(name, kind):
        value = metadata.get("tokenizer.ggml." + name, kind())
        if type(value) is not kind:
            raise ValueError(f"{path}: tokenizer.ggml.{name} must be of type {kind.__name__}, got {value!r}"[:300])
        return value
    model, pre = get("model", str), get("pre", str)
    if not model:
        return None
    if model == "llama":
        raise ValueError(f"{path}: {NO_SENTENCEPIECE}")
    if model != "gpt2" or pre not in GGUF_SPLITS:
        raise ValueError(f"{path}: tokenizer {model!r} with the split {pre!r} is not one of {', '.join(GGUF_SPLITS)}")
    tokens, merges, types = get("tokens", list), get("merges", list), get("token_type", list)
    if not all(isinstance(x, str) for x in tokens + merges) or types and len(types) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml: {len(tokens)} tokens, {len(types)} types, or some are no text")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens: {len(tokens) - len(vocab)} tokens are there twice")
    special, added, unused = ([t for t, kind in zip(tokens, types) if kind in kinds] for kinds in ((2, 3), (4,), (5,)))
    special = special if types else None
    add = metadata.get("tokenizer.ggml.add_bos_token", pre in LIKE_LLAMA3)
    bos, eos = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    numbers = all(token is None or type(token) is int for token in (bos, eos))
    if type(add) is not bool or not numbers or add and bos is None:
        raise ValueError(f"{path}: tokenizer.ggml: add_bos_token is {add!r}, bos_token_id {bos!r}, eos_token_id {eos!r}"
                         ": not true or false, no numbers of tokens, or no token to add"[:300])
    return byte_pairs(path, vocab, [m.split(" ") for m in merges], GGUF_SPLITS[pre], size, special,
                      ({t: vocab[t] for t in added}, {}), unused, whole=pre in LIKE_LLAMA3,
                      nfc=GGUF_SPLITS[pre] == QWEN2_SPLIT, bos=bos if add else None, eos=eos)


# ---- the small world's own vocabulary, in tiktoken's file format

# Words with their leading space, numbers two digits at a time, the rest: merges never cross these borders. Written
# without \p{..} classes, which Python's `re` (for training) does not know and tiktoken's engine (for encoding) does.
SMALL_SPLIT = r" ?[^\W\d_]+| ?\d{1,2}| ?(?:[^\s\w]|_)+|\s+"


def make_encoding(ranks):
    """The small world's tokenizer as a tiktoken.Encoding; EOT is the id behind the last rank."""
    return tiktoken.Encoding("small-world", pat_str=SMALL_SPLIT, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def save_ranks(ranks, path):
    """Write tiktoken's own file format: a line a token, base64 of its bytes and its rank."""
    with whole_file(path, "wb") as f:
        for token, rank in ranks.items():
            f.write(base64.b64encode(token) + b" %d\n" % rank)


def load_ranks(path):
    """Read what save_ranks wrote; ValueError names the line that is not a token and its rank."""
    ranks = {}
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}: line {number} is not a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: {len(ranks)} tokens whose ranks are not 0 to {len(ranks) - 1}")
    if not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"{path}: {len(ranks)} tokens, and not every single byte among them")
    return ranks


# ---- the vocabulary of one of our own checkpoints

def in_checkpoint(path, metadata, size):
    """The encoding of a checkpoint of ours: in its metadata, or tokens.tiktoken beside it; None without either."""
    if "vocabulary" in metadata:
        return from_json(path, metadata["vocabulary"], size)
    beside = os.path.join(os.path.dirname(path), "tokens.tiktoken")
    if not os.path.exists(beside):
        return None
    encoding = make_encoding(load_ranks(beside))
    if encoding.n_vocab != size:
        raise ValueError(f"{beside}: {encoding.n_vocab} tokens, {path} has {size}: not its vocabulary")
    return encoding


def to_json(encoding):
    """A tiktoken.Encoding, a Vocabulary too, as text for the metadata of a checkpoint."""
    def pairs(tokens):
        return [[base64.b64encode(token).decode(), number] for token, number in tokens]
    v = encoding if isinstance(encoding, Vocabulary) else Vocabulary(**encoding.__getstate__())
    return json.dumps({"pattern": v._pat_str, "ranks": pairs(v._mergeable_ranks.items()), "special": v._special_tokens,
                       "others": pairs((token, number) for number, token in v.others.items()), "added": v.added,
                       "words": pairs(v.words.items()), "ids": list(v.ids.items()), "nfc": v.nfc, "bos": v.bos,
                       "eos": v.eos}, separators=(",", ":"))


def from_json(path, text, size):
    """The Vocabulary that `to_json` wrote, for a model of `size` tokens; ValueError, naming the file, for another text.
    """
    def pairs(stored):
        return [(base64.b64decode(token, validate=True), number) for token, number in stored]
    try:
        f = json.loads(text)
        ranks, words, others = dict(pairs(f["ranks"])), dict(pairs(f["words"])), pairs(f["others"])
        ids, special, (raw, normalized), ends = dict(f["ids"]), f["special"], f["added"], (f["bos"], f["eos"])
        plain = re.sub(r"(\\x\{[0-9A-F]+\}-\\x\{[0-9A-F]+\})+\]", "]", f["pattern"])  # as before `without`
        if plain not in (SMALL_SPLIT, DIGITS_SPLIT) and one_spelling(plain) not in SPELLED:
            raise ValueError(f"the split pattern {plain!r} is not known")
        own = [*ranks.values(), *special.values(), *(n for _, n in others)]  # each number once: tiktoken relies on it
        numbers = [*own, *ids, *ids.values(), *raw.values(), *normalized.values(), *words.values(),
                   *(end for end in ends if end is not None)]
        if not all(type(n) is int and 0 <= n < size for n in numbers) or len(set(own)) < len(own):
            raise ValueError("its tokens are numbered twice, or beyond the model's")
        if not ids.keys() == set(ids.values()) <= set(ranks.values()) or not ranks or b"" in ranks or not all(
                [*special, *raw, *normalized, "."]):
            raise ValueError("its tokens contradict each other")
        return Vocabulary(os.path.basename(path), pat_str=f["pattern"], mergeable_ranks=ranks, special_tokens=special,
                          ids=ids, others={number: token for token, number in others}, words=words,
                          added=(raw, normalized), nfc=f["nfc"] is True, size=size, bos=ends[0], eos=ends[1])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no usable vocabulary in the file ({error})"[:300]) from None
