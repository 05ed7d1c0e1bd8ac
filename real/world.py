"""
The world that a real language model is asked about: facts by split, and text that names nothing hidden.

The facts are multiple choice: the option whose log-probability behind the question is highest is the answer. They are
split by what they are about (a country), not one by one:

    seen        may be named in calibration and repair text
    held-out    never is, nor an answer that is theirs alone: text that names either is dropped, read as strings
    validation  like held-out; learning rates are judged on it

Text that is read is the model's own, or a file's (real/text.py). There are no novel entities; guessing, and the most
frequent answer, are the floor.

What it leaves out: chat templates, answers in free text, aliases of an entity's name.
"""
import json
import os
from dataclasses import replace

import torch

from checkpoints import load_pretrained
from real.text import Names, Writer, one_of, read_documents, rows_of_documents
from study.steps import digest, digest_of
from study.taskfiles import check_line, lines_of
from world.facts import Fact, sample
from world.score import Subject

SPLITS = {"seen": 0.35, "heldout": 0.5, "validation": 0.15}  # shares: most where the question is decided
WINDOWS = 64  # rows on which perplexity is measured


def read_facts(path, check=None):
    """The facts of a JSON lines file: question (or a list of wordings), answer, options, entity, and attribute if any.

    check  what else a fact must pass, raising ValueError (study.taskfiles.fits)

    Raises ValueError with the number of a line that is no such object, does not pass, or was asked before.
    """
    facts, lines = [], {}
    for number, line in lines_of(path):
        try:
            row = json.loads(line)
            question, answer, entity, options = (row[key] for key in ("question", "answer", "entity", "options"))
            wordings = question if isinstance(question, list) else [question]
            texts = [answer, entity, row.get("attribute", ""), *wordings, *options]
            if not isinstance(options, list) or not all(isinstance(text, str) for text in texts):
                raise TypeError
            if not wordings or not all(text.strip() for text in (entity, *wordings)):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: line {number} is not an object with the texts question, answer and entity "
                             "and a list of options") from None
        same = len({option.strip() for option in options}) < len(options)
        if answer not in options or same or len(options) < 2 or not all(option.strip() for option in options):
            raise ValueError(f"{path}: line {number} needs at least 2 different options with the answer "
                             f"{answer!r} among them, got {options}")
        for wording in wordings:
            fact = Fact(entity, "", row.get("attribute", ""), wording.rstrip(), " " + answer,
                        tuple(" " + option for option in options))
            if fact.question in lines:
                raise ValueError(f"{path}: line {number} asks {fact.question!r}, as line {lines[fact.question]} does")
            lines[fact.question] = number
            if check:
                check_line(path, number, check, fact)
            facts.append(fact)
    if not facts:
        raise ValueError(f"{path}: no facts in it")
    return facts


def split_facts(facts, seed):
    """{split: facts}, whole entities to each, by the shares of SPLITS."""
    entities = list(dict.fromkeys(f.person for f in facts))
    if len(entities) < len(SPLITS):
        raise ValueError(f"splitting needs at least {len(SPLITS)} entities, got {len(entities)}")
    order = torch.randperm(len(entities), generator=torch.Generator().manual_seed(seed)).tolist()
    first = max(1, round(SPLITS["seen"] * len(entities)))
    last = min(len(entities) - 1, max(first + 1, first + round(SPLITS["heldout"] * len(entities))))
    split_of = {entities[i]: "seen" if place < first else "heldout" if place < last else "validation"
                for place, i in enumerate(order)}
    return {split: [f for f in facts if split_of[f.person] == split] for split in SPLITS}


class RealWorld:
    """Facts by split and rows of text: what world.small.World offers, so that the study reads both alike.
    run    the study's Run
    dense  the undamaged model's Subject, which writes the text unless there is a file
    text   path of a text file to read instead
    """
    trained = False  # the dense model is given, the same in every draw

    def __init__(self, run, dense, encoding, facts, text=None):
        config = run.config
        self.name, self.run, self.dense, self.file = os.path.basename(config.out), run, dense, text
        self.encoding, self.split = encoding, split_facts(facts, config.seed)
        hidden = self.split["heldout"] + self.split["validation"]
        known = {f.answer for f in self.split["seen"]}
        self.hidden = Names({f.person for f in hidden} | {f.answer.strip() for f in hidden if f.answer not in known})
        self.settings = {"facts": digest(facts), "seed": config.seed, "text": text and digest_of(text)}
        self.windows = self.text("windows", WINDOWS, config.calibration[1] - 1, replace(config, repeat=0))
        self.inside = self.windows[:8]

    def text(self, kind, wanted, T, config):
        """(wanted, T + 1) rows: "windows" for perplexity, "calibration" or "repair"; others for each of `--seeds`."""
        name = f"text-{kind}{config.draw_suffix}"
        settings = {**self.dense.about["settings"], **self.settings,
                    "rows": wanted, "tokens": T, "draw": config.draw_seed}
        return torch.tensor(self.run.once_json(name, settings, ("real.world",),
                                               lambda: self.make(kind, wanted, T, config).tolist()))

    def make(self, kind, wanted, T, config):
        """The body of `text`."""
        own = {"windows": 6, "calibration": 7, "repair": 8}[kind]  # no two kinds of text share a seed
        generator = torch.Generator().manual_seed(config.draw_seed + own)
        if self.file:  # the windows come from its first tenth, which nothing else does
            documents = read_documents(self.file, self.hidden)
            first = max(1, len(documents) // 10)
            part = documents[:first] if kind == "windows" else documents[first:]
            return rows_of_documents(part, self.encoding, wanted, T, generator, self.hidden)
        seen, every = self.split["seen"], 1 if kind == "repair" else 4
        texts = [f.question if kind == "repair" else f.person for f in seen]
        writer = Writer(self.dense, self.encoding, self.hidden, self.run.log)
        return writer.write(f"text for {kind}", wanted, T + 1, generator,
                            one_of(list(dict.fromkeys(texts)), generator, every))

    def facts(self, split, people=None):
        """The facts of a split, of so many of its entities: a sample, as files may begin with the best known."""
        some = set(sample(list(dict.fromkeys(f.person for f in self.split[split])), people))
        return [f for f in self.split[split] if f.person in some]

    def asked(self, config):
        return {split: self.facts(split, config.test_people) for split in ("seen", "heldout")}

    def tasks(self, config):
        """None of items.py: those are about the small world's people."""
        return {}

    def unrelated(self):
        """24 tokens (24,) of text about something else."""
        return self.windows[0, :24]

    def calibration(self, config):
        """The ids (N, T) that compression is calibrated on."""
        rows, T = config.calibration
        return self.text("calibration", rows, T, config)[:, :T]

    def repair_rows(self, config):
        """The ids (rows, T + 1) of every step of a repair."""
        rows, T = config.repair_batch
        return list(self.text("repair", rows * config.repair_steps, T, config).split(rows))

    def check_leaks(self, ids):
        """Raise if anything hidden is named in `ids` (N, T), read as strings; returns how many rows were read."""
        for row in ids.tolist():
            named = self.hidden.search(self.encoding.decode(row))
            if named:
                raise AssertionError(f"{named} must not be in calibration or repair text")
        return len(ids)


def real_dense(path, log, device="cpu", dtype=torch.float32):
    """The Subject of the model at `path`, as it comes, and its tokenizer."""
    model, encoding = load_pretrained(path)
    if encoding is None:
        raise ValueError(f"{path}: no tokenizer beside the model")
    model.requires_grad_(False).to(device, dtype)
    log.say(f"dense: {model.n_parameters():,} parameters, "
            f"{model.flops_per_token():,} floating-point operations a token")
    settings = {"model": digest_of(path), "torch": torch.__version__, "device": str(device), "dtype": str(dtype)}
    return Subject(model, about={"id": "dense", "tag": "dense", "base": None, "operation": None, "settings": settings,
                                 "path": path, "bytes": sum(p.nbytes for p in model.parameters()), "extra": 0,
                                 "layers": None}), encoding
