"""
The small world as the study meets it: people by split, the texts that are read, the tokenizer, what is asked.
"""
import re

import torch

from world.facts import (SPLITS, VALUES, facts_about, make_encoding, make_world, sample, statements,
                         taught_questions, text_batches, train_bpe)
from world.items import LESSONS, TASKS, lessons, make_items


class World:
    """Everything that follows from the world's config: people by split, the texts, the tokenizer, windows of text to
    score.
    """
    name = "small world"
    trained = True  # the study trains the dense model, in every draw anew

    def __init__(self, config):
        self.made = {}  # what `facts` and `tasks` have made
        people = make_world(config.world)
        self.people = {split: [p for p in people if p.split == split] for split in SPLITS}
        self.skills, self.seed = config.skills, config.seed
        self.repair_text = self.text_about(self.people["seen"])
        self.ranks = train_bpe(self.pretraining(), config.world.vocab_size)
        self.encoding = make_encoding(self.ranks)
        self.windows = next(text_batches(statements(self.people["heldout"]), self.encoding, 100, 63,
                                         torch.Generator().manual_seed(config.seed), aligned=True))  # (100, 64)
        self.inside = self.windows[:50, :-1]  # the text on which attention and activations are compared

    def pretraining(self, share=1.0):
        """The documents of pretraining: about the first `share` of the people of every split but the novel ones."""
        return self.text_about([p for split in SPLITS[:3]
                                for p in self.people[split][:round(share * len(self.people[split]))]])

    def text_about(self, people):
        """All that is told about `people`; with `skills` also lessons, about those who are seen."""
        text = statements(people) + taught_questions(people)
        if self.skills:  # facts take fewer tokens than lessons: they are read four times as often
            text = 4 * text + lessons([p for p in people if p.split == "seen"], self.seed)
        return text

    def facts(self, split, people=None):
        """The facts of a split, or of a sample of `people` people of it."""
        key = split, people
        if key not in self.made:
            self.made[key] = facts_about(sample(self.people[split], people))
        return self.made[key]

    def asked(self, config):
        """{split: facts} that the table asks about."""
        return {split: self.facts(split, config.test_people) for split in ("seen", "heldout", "novel")}

    def tasks(self, config):
        """{task: {split: items}} of items.py that this GPT was prepared for, made at the first call."""
        key = config.task_items, config.seed, config.skills
        if key not in self.made:
            told = [p for split in SPLITS[:3] for p in self.people[split]]
            self.made[key] = {name: {split: make_items(name, sample(self.people[split], config.task_items), told,
                                                       config.task_items, config.seed)
                                     for split in ("seen", "heldout", "novel")}
                              for name in TASKS if config.skills or name not in LESSONS}
        return self.made[key]

    def unrelated(self):
        """24 tokens (24,) of sentences about people that no question asked behind them is about."""
        told = statements(self.people["validation"])[::len(VALUES) * 3 + 1]  # each about somebody else
        text = [t for sentence in told[:8] for t in [self.encoding.eot_token, *self.encoding.encode_ordinary(sentence)]]
        return torch.tensor(text[:24])

    def calibration(self, config):
        """The ids (N, T) that compression is calibrated on: text about seen people."""
        rows, T = config.calibration
        return next(text_batches(self.repair_text, self.encoding, rows, T - 1,
                                 torch.Generator().manual_seed(config.draw_seed + 1)))

    def repair_rows(self, config, text=None):
        """The ids (rows, T + 1) of every step of a repair: text about seen people, or other sentences."""
        stream = text_batches(text or self.repair_text, self.encoding, *config.repair_batch,
                              torch.Generator().manual_seed(config.draw_seed + 2), aligned=True)
        return [next(stream) for _ in range(config.repair_steps)]

    def check_leaks(self, ids):
        """Raise if anybody but seen people is named in `ids` (N, T), read as strings; returns how many rows were read.
        """
        hidden = {p.name for split in ("heldout", "validation", "novel") for p in self.people[split]}
        for row in ids.tolist():
            words = re.findall(r"\w+", self.encoding.decode(row))
            named = {f"{a} {b}" for a, b in zip(words, words[1:])} & hidden
            if named:
                raise AssertionError(f"{named} must not be in calibration or repair text")
        return len(ids)
