"""
Byte-level BPE vocabularies of real models, as tiktoken encodings.

What it does: reads a vocabulary (tokenizer.json, or vocab.json with merges.txt, or the metadata of a GGUF file)
into a `tiktoken.Encoding` that gives the model's own token ids. A text is first split into words by a pattern, then
the bytes of each word are merged pair by pair.

From merges to ranks: BPE merges the pair that was learned first; tiktoken takes the id of the merged token for that
order. In GPT-2, Llama 3 and SmolLM2 ids do grow along the list of merges (wherever single bytes and special tokens
stand). OPT renumbered its tokens by frequency: there the ids are mapped after the merging.

What it leaves out: training a vocabulary, normalization, sentencepiece (refused, with a line that says what to do),
and split patterns other than GPT-2's, Llama 3's and SmolLM's.

Source: Sennrich et al. 2016 (BPE, arXiv 1508.07909); Radford et al. 2019, section 2.2 (on bytes). Run it:

    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf --text "The capital of France is"
"""
import base64
import json
import os

import numpy as np
import tiktoken

from engine.script import read_json, whole_file

EOT = "<|endoftext|>"

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
                r"""\s*[\r\n]+|\s+(?!\S)|\s+""")
# SmolLM cuts out every digit first and splits what is between as GPT-2 does: no space joins a digit, and a space in
# front of a digit is the last of its piece, so all spaces there stay together
DIGITS_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""

GGUF_SPLITS = {"gpt-2": GPT2_SPLIT, "llama-bpe": LLAMA3_SPLIT, "smollm": DIGITS_SPLIT}

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that vocabularies write as themselves,
BYTES = {chr(b): b for b in PRINTABLE}                             # and the others as the characters from 256 on
BYTES.update({chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))})

NO_SENTENCEPIECE = ("the vocabulary is a sentencepiece one, which tiktoken cannot express: load the weights alone "
                    "with load_pretrained(path, tokenizer=False) and bring token ids")


class Vocabulary(tiktoken.Encoding):
    """A tiktoken.Encoding whose token ids need not be its ranks.

    ids  {rank: id} where they differ, a permutation; empty for most models
    bos  the token the model expects in front of every text, or None; `encode` does not add it
    eos  the token that ends a text, or None
    """

    def __init__(self, name, *, pat_str, mergeable_ranks, special_tokens, ids=None, bos=None, eos=None):
        super().__init__(name, pat_str=pat_str, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens)
        self.ids, self.bos, self.eos = ids or {}, bos, eos
        self.ranks = {id: rank for rank, id in self.ids.items()}

    def encode_ordinary(self, text):
        return [self.ids.get(rank, rank) for rank in super().encode_ordinary(text)]

    def encode(self, text, **special):
        return [self.ids.get(rank, rank) for rank in super().encode(text, **special)]

    def encode_to_numpy(self, text, **special):
        return np.array(self.encode(text, **special), dtype=np.uint32)

    def encode_single_token(self, text_or_bytes):
        rank = super().encode_single_token(text_or_bytes)
        return self.ids.get(rank, rank)

    def decode_single_token_bytes(self, token):
        return super().decode_single_token_bytes(self.ranks.get(token, token))

    def decode_bytes(self, tokens):
        return super().decode_bytes([self.ranks.get(token, token) for token in tokens])

    def decode(self, tokens, errors="replace"):
        return self.decode_bytes(tokens).decode("utf-8", errors=errors)

    @property
    def eot_token(self):
        """<|endoftext|> where there is one, else what the model expects in front of a text, or reads as its end."""
        if "<|endoftext|>" in self.special_tokens_set:
            return super().eot_token
        return self.eos if self.bos is None else self.bos

    def __getstate__(self):
        return {**super().__getstate__(), "ids": self.ids, "bos": self.bos, "eos": self.eos}


def byte_pairs(path, vocab, merges, special, split, vocab_size, bos=None, eos=None):
    """The encoding of {token: id} and merges [(left, right)], first learned first; `special`: tokens no text makes."""
    if sorted(vocab.values()) != list(range(len(vocab))) or not 0 < len(vocab) <= vocab_size:
        raise ValueError(f"{path}: the ids of {len(vocab)} tokens must be 0 to {len(vocab) - 1}, each once, and below "
                         f"the model's vocab_size {vocab_size}")
    single = {bytes([b]): vocab[c] for c, b in BYTES.items() if c in vocab}
    for i, pair in enumerate(merges):
        if len(pair) != 2 or not all(t in vocab and t for t in pair) or pair[0] + pair[1] not in vocab:
            raise ValueError(f"{path}: merge {i} {pair!r} is not of two tokens into a third of the vocabulary"[:300])
    merged = list(dict.fromkeys(left + right for left, right in merges))  # of several ways to a token the first counts
    try:
        merged_bytes = [bytes(BYTES[c] for c in token) for token in merged]
    except KeyError as error:
        raise ValueError(f"{path}: the merges use {error}, which is no byte: not a byte-level vocabulary") from None
    ids = [vocab[token] for token in merged]
    ranks = sorted(ids)  # as many numbers, but growing along the merges
    made = set(merged) | {c for c in BYTES if c in vocab}
    special = {token: i for token, i in vocab.items() if token in special or token not in made}
    if "" in special or any("\ud800" <= c <= "\udfff" for c in "".join(special)):
        raise ValueError(f"{path}: a special token is empty, or not Unicode")
    pattern = without(path, split, set(range(256)) - {t[0] for t in single})
    return Vocabulary(os.path.basename(path), pat_str=pattern, special_tokens=special,
                      mergeable_ranks={**single, **dict(zip(merged_bytes, ranks))},
                      ids={r: i for r, i in zip(ranks, ids) if r != i}, bos=bos, eos=eos)


def without(path, split, missing):
    """The split pattern, passing over characters that a vocabulary lacks the bytes for: rare control characters and
    the empty planes of Unicode in SmolLM2. The original tokenizer drops such bytes too."""
    passed = ""
    for b in sorted(missing - set(range(0xF5, 0x100)) - {0xC0, 0xC1}):  # these never occur in UTF-8
        if not (b < 9 or 13 < b < 32 or b == 0x7F or b > 0xF0):
            raise ValueError(f"{path}: no token for the byte {b:#04x}: common text could not be read")
        planes = {0xF1: (0x40000, 0x7FFFF), 0xF2: (0x80000, 0xBFFFF), 0xF3: (0xC0000, 0xFFFFF),
                  0xF4: (0x100000, 0x10FFFF)}  # what four-byte characters with these first bytes encode
        first, last = planes.get(b, (b, b))
        passed += rf"\x{{{first:X}}}-\x{{{last:X}}}"
    return split.replace(r"\p{N}]", rf"\p{{N}}{passed}]")


def from_folder(path, config, vocab_size):
    """The encoding of a folder: tokenizer.json, or vocab.json and merges.txt; None where it has neither.

    config      the folder's config.json as a dict, for the token that ends a text
    vocab_size  how many ids the model knows
    """
    def there(name):
        return os.path.exists(os.path.join(path, name))
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    eos = eos if type(eos) is int else None
    extra = read_json(os.path.join(path, "tokenizer_config.json")) if there("tokenizer_config.json") else {}
    bos = extra.get("bos_token") if extra.get("add_bos_token") is True else None
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if there("tokenizer.json"):
        file = os.path.join(path, "tokenizer.json")
        vocab, merges, special, split, first = parse_tokenizer(file, read_json(file))
        bos = bos or first
    elif there("vocab.json") and there("merges.txt"):
        file, special, split = os.path.join(path, "vocab.json"), set(), GPT2_SPLIT
        vocab = read_json(file)
        merges = read_merges(os.path.join(path, "merges.txt"))
    elif there("tokenizer.model"):
        raise ValueError(f"{os.path.join(path, 'tokenizer.model')}: {NO_SENTENCEPIECE}")
    else:
        return None
    if not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{file}: the vocabulary has ids that are not integers")
    bos = vocab.get(bos) if isinstance(bos, str) else None
    return byte_pairs(file, vocab, merges, special, split, vocab_size, bos, eos)


def read_merges(file):
    """The pairs of a merges.txt: two tokens a line, under a line with its version."""
    with open(file, "rb") as f:
        try:
            lines = f.read().decode().split("\n")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8") from None
    return [line.split(" ") for line in lines if line and not line.startswith("#version")]


def parse_tokenizer(file, t):
    """(vocab, merges, special tokens, split pattern, the token in front of every text or None) of a tokenizer.json."""
    model, added = t.get("model"), t.get("added_tokens", [])
    if not (isinstance(model, dict) and isinstance(model.get("vocab"), dict)
            and isinstance(model.get("merges"), list)):
        raise ValueError(f"{file}: model is not a BPE with vocab and merges")
    if model.get("byte_fallback") or t.get("normalizer"):
        raise ValueError(f"{file}: {NO_SENTENCEPIECE}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if not all(isinstance(m, list) and all(isinstance(part, str) for part in m) for m in merges):
        raise ValueError(f"{file}: merges are not pairs of tokens")
    vocab = dict(model["vocab"])
    if not (isinstance(added, list) and all(isinstance(a, dict) and isinstance(a.get("content"), str) for a in added)):
        raise ValueError(f"{file}: added_tokens is not a list of tokens")
    for a in added:
        if vocab.setdefault(a["content"], a.get("id")) != a.get("id"):
            raise ValueError(f"{file}: token {a['content']!r} has two ids, {a.get('id')!r} and "
                             f"{vocab[a['content']]!r}"[:300])
    first = None
    match t.get("post_processor"):
        case {"processors": [*steps]} | steps:
            for step in steps if isinstance(steps, list) else [steps]:
                match step:
                    case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
                        first = token
    return vocab, merges, {a["content"] for a in added}, split_of(file, t.get("pre_tokenizer")), first


def split_of(file, p):
    """The pattern that splits as a tokenizer.json's pre_tokenizer does. Only known ones: a pattern is a program."""
    match p:
        case {"type": "ByteLevel", "add_prefix_space": False} if p.get("use_regex", True) is True:
            return GPT2_SPLIT
        case {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                    {"type": "ByteLevel", "add_prefix_space": False} as b]}:
            if b.get("use_regex", True) is True:
                return DIGITS_SPLIT
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]} if pattern == LLAMA3_SPLIT:
            return LLAMA3_SPLIT
    raise ValueError(f"{file}: pre_tokenizer {json.dumps(p)[:160]} is not GPT-2's, Llama 3's or SmolLM's. If the "
                     "vocabulary is a sentencepiece one, load_pretrained(path, tokenizer=False) loads the weights")


def from_gguf(path, metadata, vocab_size):
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
    special = {token for token, kind in zip(tokens, types) if kind != 1}  # 1: an ordinary token
    add = metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    bos, eos = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return byte_pairs(path, vocab, [m.split(" ") for m in merges], special, GGUF_SPLITS[pre], vocab_size,
                      bos if add is True and type(bos) is int else None, eos if type(eos) is int else None)


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
