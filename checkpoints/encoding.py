"""
A byte-level BPE vocabulary as a tiktoken.Encoding: from tokens and merges to the model's own token ids.

A text is first split into words by a pattern, then the bytes of each word are merged pair by pair.

From merges to ranks: BPE merges the pair that was learned first; tiktoken takes the id of the merged token for that
order, and merges any pair whose bytes are a token. In GPT-2, Llama 3 and SmolLM2 ids do grow along the list of merges
(wherever single bytes and special tokens stand). OPT renumbered its tokens by frequency: there the ids are mapped after
the merging. `check_merges` refuses a list of merges for which the two rules give different tokens.

Tokens of a vocabulary that no merge makes are of four kinds:

    special     <|endoftext|>: from text only where `encode` is told so
    added       <think>, runs of spaces: found in the text before it is split into words
    whole       tokens of a vocabulary with ignore_merges: a word that is one of them is that token
    unused      padding of the vocabulary: never from text, shown as they are named

What it leaves out: training a vocabulary (world/facts.py has 25 lines of that), and files (vocabulary.py).

Source: Sennrich et al. 2016 (BPE, arXiv 1508.07909); Radford et al. 2019, section 2.2 (on bytes).
"""
import functools
import math
import os
import re
import unicodedata

import numpy as np
import tiktoken

EOT = "<|endoftext|>"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that vocabularies write as themselves,
BYTES = {chr(b): b for b in PRINTABLE}                             # and the others as the characters from 256 on
BYTES.update({chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))})

LONGEST_SPACE = 500_000  # characters; the split patterns look ahead from white space, and tiktoken dies of a longer one


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


@functools.lru_cache(maxsize=8)
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
    check_merges(path, merges, whole)
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


def check_merges(path, merges, whole=False):
    """ValueError where merging by the list and merging by the ranks of tokens would differ.

    They agree if each token's own bytes, merged by all that was learned before it, end as the pair that makes it: then
    no other pair of it is ever met (a vocabulary in the order of its training). Or if every pair of tokens that makes
    it is in the list, one behind the other (a vocabulary that was tiktoken's, as Llama 3's), and a word that is this
    token becomes it: tiktoken looks for whole words before it merges, which otherwise only `whole` vocabularies do.
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
        complete = len({merges[i][0] for i in listed}) == pairs and listed[-1] - listed[0] < len(listed)
        if not complete or not (whole or len(merge(token, rank)) == 1):
            raise ValueError(f"{path}: merge {listed[0]} {(left, right)!r} stands in an order that no training makes: "
                             "tiktoken would merge otherwise (was the vocabulary pruned or joined?)")


def merge(word, rank):
    """The tokens of a word: the pair whose token has the lowest rank is merged, the leftmost of equals, and again."""
    parts = list(word)
    while True:
        ranks = [rank.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        if min(ranks, default=math.inf) == math.inf:
            return parts
        i = ranks.index(min(ranks))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


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
