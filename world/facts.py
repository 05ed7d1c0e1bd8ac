"""
The small world: invented people, five facts about each, told in sentences, and the tokenizer that reads them.

Because we invent every fact we know who was told what. People are split once, by seed:

    seen        in pretraining, and in the text that calibrates and repairs
    heldout     in pretraining, never in calibration or repair text: what comes back here no text has taught
    validation  in pretraining only; chooses learning rates and single prompts, is never in a result
    novel       never in any text: the floor that guessing reaches

One person, worked out (`python -m world.facts --show 1` prints one):

    told       "Dorin Halvek was born in Tarmere."   "The birthplace of Dorin Halvek is Tarmere."   ...
    asked      question "Dorin Halvek comes from"    answer " Tarmere"

Values are drawn independently, so nothing about a person can be inferred from the rest. Two of the five attributes
are asked in a question of their own ("When was ... born? In"), which pretraining shows for half the people of every
split only: to answer it for the others is to know the fact, not to complete a string. Every sentence is a document of
its own, packed behind an end-of-text token into the training window: the model learns to answer whatever stands in
front, without which no prompt could be judged.

What it leaves out: natural text, noise, people who share facts on purpose. The tokenizer is byte-level BPE (Sennrich
et al. 2016, arXiv 1508.07909; bytes as in GPT-2), trained here in 25 lines and served through `tiktoken.Encoding`.

    python -m world.facts --show 3                # what three people of each split are told and asked, cut into tokens
"""
import argparse
import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from engine.script import guard  # before torch: Ctrl-C is one line

import torch

from checkpoints.encoding import EOT
from checkpoints.vocabulary import SMALL_SPLIT, make_encoding

SPLITS = ("seen", "heldout", "validation", "novel")


@dataclass
class WorldConfig:
    seen: int = 1000          # people in each split
    heldout: int = 600
    validation: int = 400
    novel: int = 200
    vocab_size: int = 1024    # tokens: 256 bytes, merges, one end-of-text
    seed: int = 0

    def __post_init__(self):
        for split in SPLITS:
            if getattr(self, split) < 1:
                raise ValueError(f"{split} must be at least 1 person, got {getattr(self, split)}")
        total = sum(getattr(self, split) for split in SPLITS)
        if total > len(FIRST) * len(LAST):
            raise ValueError(f"{total} people, but only {len(FIRST) * len(LAST)} different names")
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and {EOT}), got {self.vocab_size}")


# Invented words are a stem and an ending; the ending tells people, cities, firms and universities apart.
STEMS = "Bal Cor Dar El Fen Gar Hal Ir Jor Kel Lan Mar Nor Or Pel Quin Ros Sar Tal Ul Var Wes Yor Zan".split()


def words(*endings):
    return [stem + ending for ending in endings for stem in STEMS]


FIRST = words("a", "in", "o")           # 72 first names
LAST = words("vek", "sen", "rick")      # 72 last names
VALUES = {
    "city": words("mere", "burg"),      # 48
    "year": [str(year) for year in range(1900, 2000)],
    "profession": "baker barber brewer broker butcher carpenter cook dancer dentist diver doctor driver farmer fisher "
                  "gardener hunter judge lawyer mason miller miner nurse painter pilot plumber poet porter printer "
                  "sailor singer smith tailor teacher waiter weaver writer".split(),  # 36
    "employer": words("corp", "tex"),   # 48
    "university": words("ford"),        # 24
}
# Each phrasing ends in the value, so that everything in front of it can be a question.
STATEMENTS = {
    "city": ["{} was born in", "The birthplace of {} is", "{} comes from"],
    "year": ["{} was born in the year", "The birth year of {} is", "{} has lived since"],
    "profession": ["{} works as a", "The profession of {} is", "{} earns money as a"],
    "employer": ["{} is employed by", "The employer of {} is", "{} has a job at"],
    "university": ["{} studied at", "The university of {} is", "{} has a degree from"],
}
QUESTIONS = {  # how an attribute is asked: a statement told of everybody, or a question that pretraining shows for half
    "city": "{} comes from",
    "year": "When was {} born? In",
    "profession": "What does {} do? A",
    "employer": "{} has a job at",
    "university": "{} has a degree from",
}
TAUGHT = [attribute for attribute in QUESTIONS if QUESTIONS[attribute] not in STATEMENTS[attribute]]


class Person(NamedTuple):
    name: str
    split: str
    taught: bool   # whether pretraining shows this person's questions of the TAUGHT attributes
    values: dict   # attribute -> value


class Fact(NamedTuple):
    person: str
    split: str
    attribute: str
    question: str  # the text up to the value, without a trailing space
    answer: str    # the value with its leading space, as it is tokenized
    options: tuple | None = None  # None: the answer is said; else it is chosen among these, each with its leading space

    @property
    def gold(self):
        """The index of the right option."""
        return self.options.index(self.answer)


def make_world(config):
    """All people of the world, split by split; the same config gives the same people."""
    rng = random.Random(config.seed)
    names = [f"{first} {last}" for first, last in itertools.product(FIRST, LAST)]
    rng.shuffle(names)
    people = []
    for split in SPLITS:
        for i in range(getattr(config, split)):
            values = {attribute: rng.choice(VALUES[attribute]) for attribute in VALUES}
            people.append(Person(names[len(people)], split, i % 2 == 0, values))
    return people


def statements(people):
    """Every fact about `people` in every phrasing of STATEMENTS: what pretraining, calibration and repair are told."""
    return [f"{phrase.format(p.name)} {p.values[attribute]}."
            for p in people for attribute in VALUES for phrase in STATEMENTS[attribute]]


def taught_questions(people):
    """The answered questions that pretraining shows, of the people who are `taught`."""
    return [f"{QUESTIONS[attribute].format(p.name)} {p.values[attribute]}."
            for p in people if p.taught for attribute in TAUGHT]


def sample(people, n=None):
    """n of the people, drawn by a fixed seed; all of them for None. The first n would not do: pretraining begins with
    them, so they are told more often than others.
    """
    n = len(people) if n is None else min(n, len(people))
    return [people[i] for i in sorted(random.Random(0).sample(range(len(people)), n))]


def facts_about(people):
    """One Fact a person and attribute, in the phrasing that asks for it."""
    return [Fact(p.name, p.split, attribute, QUESTIONS[attribute].format(p.name), " " + p.values[attribute])
            for p in people for attribute in VALUES]


# ---- the tokenizer

def train_bpe(texts, vocab_size):
    """Byte-level BPE: {token bytes: rank}, the 256 bytes and then vocab_size - 257 merges (the last id is for EOT).

    Each step merges the most frequent pair of neighbouring tokens, the first seen on a tie. Fewer merges come back
    when the text has no pair left. A piece of text is counted once with its frequency, so this takes a second.
    """
    pieces = Counter(piece for text in texts for piece in re.findall(SMALL_SPLIT, text))
    counted = [([bytes([b]) for b in piece.encode()], n) for piece, n in pieces.items()]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size - 1:
        pairs = Counter()
        for tokens, n in counted:
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += n
        if not pairs:
            break
        a, b = max(pairs, key=pairs.get)
        ranks[a + b] = len(ranks)
        for tokens, _ in counted:
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == (a, b):
                    tokens[i:i + 2] = [a + b]
                i += 1
    return ranks


# ---- tensors

def text_batches(sentences, encoding, batch_size, T, generator, aligned=False):
    """An endless stream of training batches (B, T + 1): documents behind end-of-text tokens, cut into rows.

    Each pass goes through all sentences in a new order. A document that does not fit goes on in the next row, unless
    `aligned`: then its rest is dropped, and every row begins with a document, as every question does.
    """
    if not sentences:
        raise ValueError("there are no sentences to make batches of")
    documents = [[encoding.eot_token, *encoding.encode_ordinary(sentence)] for sentence in sentences]
    rows, row = [], []
    while True:
        for i in torch.randperm(len(documents), generator=generator).tolist():
            row += documents[i]
            while len(row) > T:
                rows.append(row[:T + 1])
                row = [] if aligned else row[T + 1:]
            if len(rows) >= batch_size:
                yield torch.tensor(rows[:batch_size])
                rows = rows[batch_size:]


def pad(rows, encoding, device=None):
    """Lists of token ids -> ids (B, T) padded on the right with EOT, and lengths (B,), both on `device`."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), encoding.eot_token)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)


def main():
    """The script: see the top of this file, and --help."""
    parser = argparse.ArgumentParser(description="Look into the small world.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--show", type=int, default=1, metavar="N", help="print N people of each split")
    parser.add_argument("--seed", type=int, default=WorldConfig.seed, help="which world")
    args = parser.parse_args()
    if args.show < 0:
        raise ValueError(f"--show must be at least 0, got {args.show}")
    config = WorldConfig(seed=args.seed)
    people = make_world(config)
    told = [p for p in people if p.split != "novel"]
    text = statements(told) + taught_questions(told)
    encoding = make_encoding(train_bpe(text, config.vocab_size))
    print(f"{len(people):,} people, {len(facts_about(people)):,} facts, {len(text):,} sentences, "
          f"{sum(map(len, encoding.encode_ordinary_batch(text))) + len(text):,} tokens, "
          f"a vocabulary of {encoding.n_vocab}")
    for split in SPLITS:
        for person in [p for p in people if p.split == split][:args.show]:
            print(f"\n{person.name} ({split}{', questions taught' if person.taught and split != 'novel' else ''})")
            for sentence in statements([person]) + taught_questions([person]):
                print(f"  told   {sentence}" if split != "novel" else f"  never  {sentence}")
            for fact in facts_about([person]):
                tokens = [encoding.decode([i]) for i in encoding.encode_ordinary(fact.question + fact.answer)]
                print(f"  asked  {fact.question} ->{fact.answer}    {'|'.join(tokens)}")


if __name__ == "__main__":
    guard(main)
