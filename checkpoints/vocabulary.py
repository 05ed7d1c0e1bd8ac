"""
Byte-level BPE vocabularies of real models, as tiktoken encodings.

What it does: reads a vocabulary (tokenizer.json, or vocab.json with merges.txt, or the metadata of a GGUF file)
into a `tiktoken.Encoding` that gives the model's own token ids. A text is first split into words by a pattern, then
the bytes of each word are merged pair by pair.

From merges to ranks: BPE merges the pair that was learned first; tiktoken takes the id of the merged token for that
order, and merges any pair whose bytes are a token. In GPT-2, Llama 3 and SmolLM2 ids do grow along the list of merges
(wherever single bytes and special tokens stand). OPT renumbered its tokens by frequency: there the ids are mapped after
the merging. `check_merges` refuses a list of merges for which the two rules give different tokens.

Tokens of a vocabulary that no merge makes are of four kinds:

    special     <|endoftext|>: from text only where `encode` is told so
    added       <think>, runs of spaces: found in the text before it is split into words
    whole       tokens of a vocabulary with ignore_merges: a word that is one of them is that token
    unused      padding of the vocabulary: never from text, shown as they are named

What it leaves out: training a vocabulary, sentencepiece (refused, with a line that says what to do), normalization
other than Unicode's NFC, and split patterns other than GPT-2's, Llama 3's, Qwen2's and SmolLM's.

Source: Sennrich et al. 2016 (BPE, arXiv 1508.07909); Radford et al. 2019, section 2.2 (on bytes). Run it:

    python -m checkpoints out/SmolLM2-135M-Instruct.Q4_1.gguf --text "The capital of France is"
"""
import base64
import json
import math
import os
import re
import unicodedata

import numpy as np
import tiktoken

from engine.script import read_json, whole_file

EOT = "<|endoftext|>"
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
                r"""\s*[\r\n]+|\s+(?!\S)|\s+""")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# SmolLM cuts out every digit first and splits what is between as GPT-2 does: no space joins a digit, and a space in
# front of a digit is the last of its piece, so all spaces there stay together
DIGITS_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""

# the names that GGUF files give these patterns, as llama.cpp reads them
GGUF_SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe", "exaone4", "modern-bert",
                     "granite-docling", "gigachat", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code",
                     "jina-es", "jina-de", "a.x-4.0", "mellum"), GPT2_SPLIT),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3", "falcon-h1", "pixtral",
                     "midm-2.0", "lfm2"), LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), QWEN2_SPLIT),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS_SPLIT)}
# those of them for which llama.cpp puts a token in front of every text unless told not to, and ignores merges
LIKE_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that vocabularies write as themselves,
BYTES = {chr(b): b for b in PRINTABLE}                             # and the others as the characters from 256 on
BYTES.update({chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))})

LONGEST_SPACE = 500_000  # characters; the split patterns look ahead from white space, and tiktoken dies of a longer one
NO_SENTENCEPIECE = ("the vocabulary is a sentencepiece one, which tiktoken cannot express: load the weights alone "
                    "with load_pretrained(path, tokenizer=False) and bring token ids")


class Vocabulary(tiktoken.Encoding):
    """A tiktoken.Encoding whose token ids need not be its ranks, and which knows more kinds of tokens.

    ids    {rank: id} where they differ, a permutation; empty for most models
    others {id: bytes} of the tokens that are neither merged nor special
    added  ({text: id}, {text: id}): tokens found in a text as it is, and in the normalized text
    words  {bytes: id}: tokens that a whole word can be
    nfc    whether a text is brought into Unicode's form C first
    size   how many ids the model knows: those beyond the vocabulary are shown as <|unused 50300|>
    bos    the token the model expects in front of every text, or None; `encode` does not add it
    eos    the token that ends a text, or None
    """

    def __init__(self, name, *, pat_str, mergeable_ranks, special_tokens, ids=None, others=None, added=({}, {}),
                 words=None, nfc=False, size=0, bos=None, eos=None):
        super().__init__(name, pat_str=pat_str, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens)
        self.ids, self.others, self.added, self.words, self.nfc = ids or {}, others or {}, added, words or {}, nfc
        self.size, self.bos, self.eos = size, bos, eos
        self.ranks = {id: rank for rank, id in self.ids.items()}
        self.by_bytes = {text: id for id, text in self.others.items()}
        self.top = max([super().n_vocab, *(id + 1 for id in self.others)])
        self.word = python_pattern(pat_str) if self.words else None

    def __getstate__(self):
        return {**super().__getstate__(), "more": {name: getattr(self, name) for name in (
            "ids", "others", "added", "words", "nfc", "size", "bos", "eos")}}

    def __setstate__(self, state):
        more = state.pop("more")
        self.__init__(state["name"], pat_str=state["pat_str"], mergeable_ranks=state["mergeable_ranks"],
                      special_tokens=state["special_tokens"], **more)

    @property
    def n_vocab(self):
        """One more than the highest id of a token."""
        return self.top

    # ---- text to ids

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special="all"):
        """The ids of `text`. Special tokens in it are made where they are allowed, and refused where they are
        disallowed, as in tiktoken; those in neither set are ordinary text."""
        special = self.special_tokens_set
        allowed = special if allowed_special == "all" else set(allowed_special) & special
        refused = special - allowed if disallowed_special == "all" else set(disallowed_special)
        found = first_of(refused)(text)
        if found:
            raise ValueError(f"the text holds the special token {found[0]!r}, which is neither in allowed_special nor "
                             "left out of disallowed_special")
        return self.split_at({**self.added[0], **{token: self._special_tokens[token] for token in allowed}}, text,
                             self.encode_normalized)

    def encode_ordinary(self, text):
        return self.split_at(self.added[0], text, self.encode_normalized)

    def encode_normalized(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return self.split_at(self.added[1], text, self.encode_words)

    def encode_words(self, text):
        """The ids of a text without special and added tokens."""
        if len(text) > LONGEST_SPACE and (run := re.search(rf"\s{{{LONGEST_SPACE + 1}}}", text)):
            raise ValueError(f"{len(text)} characters of text, of which more than {LONGEST_SPACE} from character "
                             f"{run.start()} on are white space: too many in a row for the tokenizer")
        if self.word:
            return [id for word in self.word.findall(text) for id in self.encode_word(word)]
        return [self.ids.get(rank, rank) for rank in super().encode_ordinary(text)]

    def encode_word(self, word):
        whole = self.words.get(word.encode("utf-8", "replace"))
        return [whole] if whole is not None else [self.ids.get(r, r) for r in super().encode_ordinary(word)]

    @staticmethod
    def split_at(tokens, text, encode):
        """The ids of a text: those of `tokens` found in it, the longest first, and encode(what is between)."""
        if not tokens:
            return encode(text)
        ids, at, find = [], 0, first_of(tokens)
        while found := find(text, at):
            ids += [*encode(text[at:found.start()]), tokens[found[0]]]
            at = found.end()
        return ids + encode(text[at:])

    def encode_to_numpy(self, text, **special):
        return np.array(self.encode(text, **special), dtype=np.uint32)

    def encode_single_token(self, text_or_bytes):
        text = text_or_bytes.encode() if isinstance(text_or_bytes, str) else text_or_bytes
        if text in self.by_bytes:
            return self.by_bytes[text]
        rank = super().encode_single_token(text_or_bytes)
        return self.ids.get(rank, rank)

    # ---- ids to text

    def decode_single_token_bytes(self, token):
        if token in self.others:
            return self.others[token]
        if self.top <= token < self.size:  # the head is padded: an id that no text has
            return f"<|unused {token}|>".encode()
        return super().decode_single_token_bytes(self.ranks.get(token, token))

    def decode_bytes(self, tokens):
        if any(token in self.others or token >= self.top for token in tokens):
            return b"".join(map(self.decode_single_token_bytes, tokens))
        return super().decode_bytes([self.ranks.get(token, token) for token in tokens])

    def decode(self, tokens, errors="replace"):
        return self.decode_bytes(tokens).decode("utf-8", errors=errors)

    @property
    def eot_token(self):
        """<|endoftext|> where there is one, else what the model expects in front of a text, or reads as its end."""
        if EOT in self.special_tokens_set or EOT.encode() in self.by_bytes:
            return self.encode_single_token(EOT)
        token = self.eos if self.bos is None else self.bos
        if token is None:
            raise ValueError(f"{self.name}: no token that ends a text: neither {EOT}, nor eos_token_id in config.json, "
                             "nor eos_token in tokenizer_config.json")
        return token


def first_of(tokens):
    """A function (text, from where) -> the first match of any of the tokens, of several the longest; or None."""
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))).search if longest else lambda text, at=0: None


def python_pattern(pattern):
    r"""A split pattern for Python's `re`, which lacks \p{L} and \p{N}, and has other white space than tiktoken."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    bytes_only = {bytes([b]): b for b in range(256)}
    for name, negated in ((r"\p{L}", None), (r"\p{N}", None), (r"\s", r"\S")):
        probe = tiktoken.Encoding("probe", pat_str=name, mergeable_ranks=bytes_only, special_tokens={})
        points, ranges = [ord(c) for c in probe.decode(probe.encode_ordinary(everything))], []
        for point in points:  # tiktoken leaves out what a pattern does not match
            if ranges and point == ranges[-1][1] + 1:
                ranges[-1][1] = point
            else:
                ranges.append([point, point])
        members = "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges)
        pattern = re.sub(r"\[[^\]]*\]", lambda group: group[0].replace(name, members), pattern)
        pattern = pattern.replace(name, f"[{members}]")
        pattern = pattern.replace(negated, f"[^{members}]") if negated else pattern
    return re.compile(pattern)


# ---- merges and tokens into an encoding

def byte_pairs(path, vocab, merges, split, size, special=None, added=({}, {}), unused=(), whole=False, nfc=False,
               bos=None, eos=None):
    """The encoding of {token: id} and merges [(left, right)], first learned first.

    size     how many ids the model knows
    special  tokens of that kind; None, where a file does not say: those that no merge makes and that look like <this>
    added    {token: id} in the text as it is, {token: id} in the normalized text
    unused   tokens that are padding
    whole    whether a word that is a token is that token, merged or not
    """
    if sorted(vocab.values()) != list(range(len(vocab))) or not 0 < len(vocab) <= size:
        raise ValueError(f"{path}: the ids of {len(vocab)} tokens must be 0 to {len(vocab) - 1}, each once, and below "
                         f"the model's vocab_size {size}")
    for name, id in (("bos", bos), ("eos", eos)):
        if id is not None and not 0 <= id < size:
            raise ValueError(f"{path}: {name}_token_id is {id}, the model has the tokens 0 to {size - 1}")
    single = {bytes([b]): vocab[c] for c, b in BYTES.items() if c in vocab}
    for i, pair in enumerate(merges):
        if len(pair) != 2 or not all(t in vocab and t for t in pair) or pair[0] + pair[1] not in vocab:
            raise ValueError(f"{path}: merge {i} {pair!r} is not of two tokens into a third of the vocabulary"[:300])
    merged = list(dict.fromkeys(left + right for left, right in merges))  # of several ways to a token the first counts
    try:
        merged_bytes = [bytes(BYTES[c] for c in token) for token in merged]
    except KeyError as error:
        raise ValueError(f"{path}: the merges use {error}, which is no byte: not a byte-level vocabulary") from None
    check_merges(path, merges)
    ids = [vocab[token] for token in merged]
    ranks = sorted(ids)  # as many numbers, but growing along the merges
    made = set(merged) | {c for c in BYTES if c in vocab}
    special = {token: i for token, i in vocab.items() if (
        token in special if special is not None else token not in made and re.fullmatch("<.+>", token))}
    named = {*added[0], *added[1], *unused}
    if "" in vocab or any("\ud800" <= c <= "\udfff" for c in "".join([*special, *named])):
        raise ValueError(f"{path}: a special token is empty, or not Unicode")
    rest = {token: i for token, i in vocab.items() if token not in made and token not in special}
    others = {i: bytes(BYTES[c] for c in token) if token not in named and BYTES.keys() >= set(token) else
              token.encode("utf-8", "replace") for token, i in rest.items()}
    words = {others[i]: i for token, i in rest.items() if token not in named} if whole else {}
    pattern = without(path, split, set(range(256)) - {t[0] for t in single})
    return Vocabulary(os.path.basename(path), pat_str=pattern, special_tokens=special, added=added, words=words,
                      mergeable_ranks={**single, **dict(zip(merged_bytes, ranks))}, others=others, size=size, nfc=nfc,
                      ids={r: i for r, i in zip(ranks, ids) if r != i}, bos=bos, eos=eos)


def check_merges(path, merges):
    """ValueError where merging by the list and merging by the ranks of tokens would differ.

    They agree if each token's own bytes, merged by all that was learned before it, end as the pair that makes it: then
    no other pair of it is ever met (a vocabulary in the order of its training). Or if every pair of tokens that makes
    it is in the list, one behind the other (a vocabulary that was tiktoken's, as Llama 3's).
    """
    rank, pair_of, where = {}, {}, {}
    for i, (left, right) in enumerate(merges):
        token = left + right
        rank.setdefault(token, len(rank))
        pair_of.setdefault(token, (left, right))
        where.setdefault(token, []).append(i)
    sound = {t for pair in merges for t in pair if len(t) == 1}  # tokens made in one way only, as are all their parts
    known = rank.keys() | sound
    for token, (left, right) in pair_of.items():
        if left in sound and right in sound and meets_last(left, right, rank, pair_of):
            sound.add(token)
            continue
        listed, pairs = where[token], sum({token[:i], token[i:]} <= known for i in range(1, len(token)))
        if len({merges[i][0] for i in listed}) < pairs or listed[-1] - listed[0] >= len(listed):
            raise ValueError(f"{path}: merge {listed[0]} {(left, right)!r} stands in an order that no training makes: "
                             "tiktoken would merge otherwise (was the vocabulary pruned or joined?)")


def meets_last(left, right, rank, pair_of):
    """Whether `left` and `right` are both whole before any token of the one merges with a token of the other.

    Between them meet, at each time, the last token that `left` has by then and the first one of `right`. They grow
    along `pair_of`, each at the time of its rank; two that meet merge at the rank of what they make, if that is first.
    """
    end = rank[left + right]
    edges = []
    for token, side in ((left, 1), (right, 0)):
        edge = [token]
        while token in pair_of:
            token = pair_of[token][side]
            edge.append(token)
        edges.append(edge)  # the whole token first, the outermost byte last
    x, y = edges[0].pop(), edges[1].pop()
    while edges[0] or edges[1]:
        grows_x = rank[edges[0][-1]] if edges[0] else end
        grows_y = rank[edges[1][-1]] if edges[1] else end
        merges = rank.get(x + y, math.inf)
        if merges < grows_x and merges <= grows_y and merges < end:  # of equal ranks the leftmost pair goes first
            return False
        if max(grows_x, grows_y) > end or min(grows_x, grows_y) >= end:
            return False  # a part that is made after the whole
        if grows_x <= grows_y:
            x = edges[0].pop()
        else:
            y = edges[1].pop()
    return True


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
    bos, end = (vocab.get(token) if isinstance(token, str) else None for token in (bos, named.get("eos_token")))
    eos = end if eos is None else eos
    if eos is not None and type(eos) is not int:
        raise ValueError(f"{os.path.join(path, 'config.json')}: eos_token_id {eos!r} is not a token's number"[:300])
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
    first = None
    match t.get("post_processor"):
        case {"processors": [*steps]} | steps:
            for step in steps if isinstance(steps, list) else [steps]:
                match step:
                    case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
                        first = token
    return vocab, merges, {"special": [a["content"] for a in added if a.get("special") is True], "added": found,
                           "whole": model.get("ignore_merges") is True, "nfc": normalizes(file, t.get("normalizer")),
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
    return byte_pairs(path, vocab, [m.split(" ") for m in merges], GGUF_SPLITS[pre], size, special,
                      ({t: vocab[t] for t in added}, {}), unused, whole=pre in LIKE_LLAMA3,
                      nfc=GGUF_SPLITS[pre] == QWEN2_SPLIT, bos=bos if add is True and type(bos) is int else None,
                      eos=eos if type(eos) is int else None)


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
