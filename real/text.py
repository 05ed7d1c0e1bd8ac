"""
What a real model reads: rows of its own writing, or of a file, and the search for names that must not stand in them.

    calibration  the model's own text, sampled at temperature 1 (data-free, after Liu et al. 2023, arXiv 2305.17888);
                 one row in four begins with the name of a seen entity
    repair       short rows, each the beginning of a question about a seen entity and what the model goes on to say: of
                 24 tokens, about half are the question's and the rest is said about the entity. Rows of 64 that only
                 began with a name had a fact in one row of eight, at ten times the tokens

What it leaves out: filtering by quality; rows are what the model says, wrong or right.
"""
import re
import unicodedata

import torch

from world.facts import pad, text_batches

BATCH = 64  # rows sampled at a time on a CPU: the rows depend on it


PLAIN = str.maketrans({**dict.fromkeys("\u2018\u2019\u02bb\u02bc\u02be\u02bf\u2032\u00b4`", "'"),  # apostrophes
                       "ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th"})


def searchable(text):
    """A text in which names are looked for: no case, no accents, one kind of apostrophe, and one space for any white
    space, underscore and hyphen between words; no full stop behind a word: "St. John's", "st john’s" are one."""
    letters = unicodedata.normalize("NFKD", text.translate(PLAIN))
    letters = "".join(c for c in letters if unicodedata.category(c) not in ("Mn", "Cf")).casefold().translate(PLAIN)
    words = re.sub(r"\.(?!\w)", "", " ".join(letters.replace("_", " ").split()))
    return re.sub(r"(?<=\w) ?[-\u2010-\u2015\u2212]+ ?(?=\w)", " ", words)


class Names:
    """Names that text must not hold, found where a word begins with one: "Kenyans" holds Kenya.

    A name that begins with another sign than a letter, as "(New)", is found wherever it stands.
    """

    def __init__(self, names):
        beginnings = {}
        for name in sorted(filter(None, map(searchable, names))):
            beginnings.setdefault(name[0], []).append(re.escape(name[1:]))
        each = [(r"(?<!\w)" if first.isalnum() else "") + re.escape(first) + f"(?:{'|'.join(rest)})"
                for first, rest in beginnings.items()]  # by first letter: ten times as fast as a plain list
        self.pattern = re.compile("|".join(each) or r"(?!)")

    def search(self, text):
        """The first name in a text, or None."""
        found = self.pattern.search(searchable(text))
        return found and found[0]


class Writer:
    """A model that writes rows which name nothing hidden.

    encoding  its tokenizer
    hidden    Names
    """

    def __init__(self, subject, encoding, hidden, log):
        self.subject, self.encoding, self.hidden, self.log = subject, encoding, hidden, log

    def write(self, label, wanted, length, generator, starts):
        """(wanted, length) rows: each start, end-of-text and the tokens of a text, and what the model says behind it.

        starts  (n) -> n texts to begin with, "" for none
        Raises ValueError where none of the first 640 rows may be used.
        """
        device, kept, dropped = self.subject.device, [], 0
        batch = BATCH if device.type == "cpu" else 16 * BATCH
        show = self.log.progress(label, wanted, "rows dropped")
        while len(kept) < wanted:
            begun = [[self.encoding.eot_token, *self.encoding.encode_ordinary(text)] for text in starts(batch)]
            ids, lengths = pad([row[:length - 1] for row in begun], self.encoding, device)
            most = length - int(lengths.min())  # tokens that the shortest start lacks
            rows = self.subject.model.generate(ids, most, lengths, temperature=1.0, generator=generator)
            rows = rows[:, :length].cpu()
            good = [row for row in rows if self.may_be_read(row.tolist())]
            kept, dropped = kept + good, dropped + len(rows) - len(good)
            if not kept and dropped >= 640:
                raise ValueError(f"{self.subject.name}: every row it writes names something hidden; "
                                 "give it a text file")
            if kept:
                show(min(len(kept), wanted) - 1, dropped)
        self.log.say(f"{label}: {wanted:,} rows; {dropped:,} of {dropped + len(kept):,} dropped, "
                     "as they named what is hidden")
        return torch.stack(kept[:wanted])

    def may_be_read(self, tokens):
        """Whether a row names nothing hidden; one with a token that the vocabulary lacks (a padded head) may not."""
        try:
            return not self.hidden.search(self.encoding.decode(tokens))
        except KeyError:
            return False


def one_of(texts, generator, every=1):
    """n -> n of these texts drawn at random, "" in all places but each `every`th."""
    def starts(n):
        drawn = torch.randint(len(texts), (-(-n // every),), generator=generator).tolist()
        return [texts[drawn[i // every]] if i % every == 0 else "" for i in range(n)]
    return starts


def read_documents(path, hidden):
    """The documents of a text file, parted by blank lines, that name nothing hidden: at least 2, else ValueError."""
    with open(path, encoding="utf-8-sig") as f:
        try:
            text = f.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    documents = [d.strip() for d in re.split(r"\n\s*\n", text)]
    documents = [d for d in documents if d and not hidden.search(d)]
    if len(documents) < 2:
        raise ValueError(f"{path}: {len(documents)} documents that name nothing hidden; "
                         "it needs 2, parted by blank lines")
    return documents


def rows_of_documents(documents, encoding, wanted, T, generator, hidden):
    """(wanted, T + 1) rows of documents: short ones joined, long ones cut. A piece that begins inside a word may name
    something hidden, as "Romania" behind its first letter does: it is left out."""
    tokens = [encoding.encode_ordinary(d) for d in documents]
    if sum(map(len, tokens)) <= T:
        raise ValueError(f"the text is too short: a part of it has less than {T + 1} tokens")
    pieces = [encoding.decode(t[i:i + T]) for t in tokens for i in range(0, len(t), T)]
    pieces = [piece for piece in pieces if not hidden.search(piece)]
    return next(text_batches(pieces, encoding, wanted, T, generator, aligned=True))
