"""
The study on a real language model: its own text, facts about the real world, the same compressors and repairs.

    python -m real path/to/model                            # facts/countries.jsonl, text of the model's own
    python -m real path/to/model --facts mine.jsonl --text mine.txt
    python -m real path/to/model --task arc=ARC-Easy.jsonl  # tasks in the harness' layouts, taskfiles.py

The facts are multiple choice: the option whose log-probability behind the question is highest is the answer. They are
split by what they are about (a country), not one by one:

    seen        may be named in calibration and repair text
    held-out    never is, nor an answer that is theirs alone: text that names either is dropped, read as strings
    validation  like held-out; learning rates are judged on it

The text is the model's own by default, sampled at temperature 1 (data-free, after Liu et al. 2023, arXiv 2305.17888);
one row in four begins with the name of a seen country, so that there is something to re-learn. There are no novel
countries; guessing, and the most frequent answer, are the floor.

What it leaves out: chat templates, answers in free text, aliases of a country's name.
"""
import json
import os
import re

import torch

from checkpoints import load_pretrained
from study.settings import StudyConfig
from study.steps import digest
from world.facts import Fact, pad, text_batches
from world.score import Subject

FACTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "facts", "countries.jsonl")
STEPS = 100  # of each repair, by default
SPLITS = {"seen": 0.35, "heldout": 0.5, "validation": 0.15}  # shares: most where the question is decided
COMPRESSIONS = {
    "RTN 3 bits": ("quantize", "rtn", {"bits": 3, "group_size": 64}),
    "GPTQ 3 bits": ("quantize", "gptq", {"bits": 3, "group_size": 64}),  # as in its paper
    "SparseGPT 50 %": ("prune", "sparsegpt", {"sparsity": 0.5}),
}
REPAIRS = {
    "LoRA rank 4, q and v": ("lora", (4, "q v")),
    "LoRA rank 8": ("lora", 8),
    "prompt 16": ("prompt", 16),
    "prefix 16": ("prefix", 16),
    "IDP 4 x 16": ("idp", (4, 16, "independent")),
}
RATE_GRID = {"lora": (1e-3, 3e-3, 1e-2), "prompt": (3e-3, 1e-2, 3e-2), "prefix": (1e-3, 3e-3, 1e-2)}
RATES = {  # winners of `python -m real ... --sweep lr --repair-steps 30` on SmolLM2-135M
    "GPTQ 3 bits": {"LoRA rank 4, q and v": 1e-3, "LoRA rank 8": 3e-3, "prompt 16": 1e-2, "prefix 16": 3e-3},
    "SparseGPT 50 %": {"LoRA rank 4, q and v": 1e-2, "LoRA rank 8": 3e-3, "prompt 16": 3e-2, "prefix 16": 1e-2},
}


def real_config(path, seed=0, out="out", steps=STEPS, seeds=1):
    """The study's settings for the model at `path`; everything is written to a folder of its own in `out`."""
    if steps < 4:
        raise ValueError(f"--repair-steps must be at least 4, a batch for each prompt of a pool, got {steps}")
    name = os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
    return StudyConfig(calibration=(64, 64), repair_batch=(4, 64), repair_steps=steps, repair_bfloat16=True,
                       test_people=10 ** 6, seed=seed, seeds=seeds,
                       timing_rounds=3, ablation_people=25, out=os.path.join(out, name),
                       compressions=COMPRESSIONS, repairs=REPAIRS, rates=RATES, rate_grid=RATE_GRID)


def read_facts(path):
    """The facts of a JSON lines file: question, answer, options, entity, and attribute if there is one.

    Raises ValueError with the line's number for one that is not such an object.
    """
    facts = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                question, answer, entity, options = (row[key] for key in ("question", "answer", "entity", "options"))
                given = [question, answer, entity, row.get("attribute", ""), *options]
                if not all(isinstance(text, str) for text in given) or not question or not entity:
                    raise TypeError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}: line {number} is not an object with the texts question, answer and entity "
                                 "and a list of options") from None
            if answer not in options or len(set(options)) != len(options) or len(options) < 2 or "" in options:
                raise ValueError(f"{path}: line {number} needs at least 2 different options with the answer "
                                 f"{answer!r} among them, got {options}")
            facts.append(Fact(entity, "", given[3], question.rstrip(), " " + answer, tuple(" " + o for o in options)))
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


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


class RealWorld:
    """Facts by split and rows of text, with what study.World offers: the study reads one as it reads the other."""

    def __init__(self, run, model, encoding, facts, text=None):
        config = run.config
        self.name = os.path.basename(config.out)
        self.encoding, self.split = encoding, split_facts(facts, config.seed)
        hidden = self.split["heldout"] + self.split["validation"]
        known = {f.answer for f in self.split["seen"]}
        names = {f.person for f in hidden} | {f.answer.strip() for f in hidden if f.answer not in known}
        # from a word's start to wherever it goes on, so that Kenyans are found, too
        self.hidden = re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, names))) + ")", re.IGNORECASE)
        self.settings = {"facts": digest(facts), "seed": config.seed, "text": text and digest(read_bytes(text))}
        self.drawn, self.draw = {}, lambda config: self.draw_rows(run, model, text, config)
        self.rows = self.text(config)
        self.windows = self.rows[:64]
        self.inside = self.windows[:8, :-1]

    def text(self, config):
        """(rows, T + 1) all that is read: 64 windows for perplexity, calibration, repair. Every seed of `--seeds` has
        rows of its own, but for the windows."""
        if config.repeat not in self.drawn:
            self.drawn[config.repeat] = self.draw(config)
        return self.drawn[config.repeat]

    def draw_rows(self, run, model, text, config):
        """The rows of one seed: the model's own, or from the file `text`."""
        T, seed = config.repair_batch[1], config.draw_seed
        wanted = 64 + config.calibration[0] + config.repair_steps * config.repair_batch[0]
        if text:
            return self.read_text(text, wanted, T, seed)
        name = f"sampled-{wanted}" + (f"-seed-{config.repeat}" if config.repeat else "")
        made = run.once_tensors(name, self.settings, ("real.world",),
                                lambda: {"rows": self.sampled(model, wanted, T + 1, seed, run.log)})
        return made["rows"].long()

    def sampled(self, model, wanted, length, seed, log):
        """(wanted, length) rows that the model wrote, none that names what is hidden."""
        generator, kept, dropped = torch.Generator().manual_seed(seed + 6), [], 0
        names = list(dict.fromkeys(f.person for f in self.split["seen"]))
        show = log.progress("text of the model's own", wanted, "rows dropped")
        while len(kept) < wanted:
            starts = [[self.encoding.eot_token] for _ in range(64)]
            for i, name in enumerate(torch.randint(len(names), (16,), generator=generator).tolist()):
                starts[4 * i] += self.encoding.encode_ordinary(names[name])[:length - 1]
            ids, lengths = pad(starts, self.encoding)
            rows = model.generate(ids, length - 1, lengths, temperature=1.0, generator=generator)[:, :length]
            good = [row for row in rows if self.may_be_read(row.tolist())]
            kept, dropped = kept + good, dropped + len(rows) - len(good)
            if not kept and dropped >= 640:
                raise ValueError("every row the model writes names something hidden: give it a text file")
            show(min(len(kept), wanted) - 1, dropped)
        return torch.stack(kept[:wanted])

    def may_be_read(self, tokens):
        """Whether a row names nothing hidden; one with a token that the vocabulary lacks (a padded head) may not."""
        try:
            return not self.hidden.search(self.encoding.decode(tokens))
        except KeyError:
            return False

    def read_text(self, path, wanted, T, seed):
        """(wanted, T + 1) rows of a text file, its documents parted by blank lines; short ones are joined, and the file
        is gone through again when it is short. The windows of perplexity come from its first tenth, which nothing else
        does."""
        with open(path, encoding="utf-8") as f:
            documents = [d.strip() for d in re.split(r"\n\s*\n", f.read())]
        documents = [d for d in documents if d and not self.hidden.search(d)]
        first = max(1, len(documents) // 10)
        if len(documents) < 2:
            raise ValueError(f"{path}: {len(documents)} documents that name nothing hidden; it needs 2, parted by "
                             "blank lines")
        rows = []
        for part, n in ((documents[:first], 64), (documents[first:], wanted - 64)):
            part = [piece for d in part for piece in self.pieces(d, T)]
            if sum(map(len, self.encoding.encode_ordinary_batch(part))) <= T:
                raise ValueError(f"{path}: too short, a part of it has less than {T + 1} tokens")
            rows.append(next(text_batches(part, self.encoding, n, T, torch.Generator().manual_seed(seed + 6))))
        return torch.cat(rows)

    def pieces(self, document, T):
        """A long document in pieces of T tokens, so that a row can start anywhere in it."""
        tokens = self.encoding.encode_ordinary(document)
        return [self.encoding.decode(tokens[i:i + T]) for i in range(0, len(tokens), T)]

    def facts(self, split, people=None):
        """The facts of a split, of its first `people` entities."""
        first = set(list(dict.fromkeys(f.person for f in self.split[split]))[:people])
        return [f for f in self.split[split] if f.person in first]

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
        return self.text(config)[64:64 + config.calibration[0], :config.calibration[1]]

    def repair_rows(self, config):
        """The ids (rows, T + 1) of every step of a repair."""
        return list(self.text(config)[64 + config.calibration[0]:].split(config.repair_batch[0]))

    def check_leaks(self, ids):
        """Raise if anything hidden is named in `ids` (N, T), read as strings; returns how many rows were read."""
        for row in ids.tolist():
            named = self.hidden.search(self.encoding.decode(row))
            if named:
                raise AssertionError(f"{named[0]} must not be in calibration or repair text")
        return len(ids)


def real_dense(path, log):
    """The Subject of the model at `path`, as it comes, and its tokenizer."""
    model, encoding = load_pretrained(path)
    if encoding is None:
        raise ValueError(f"{path}: no tokenizer beside the model")
    for p in model.parameters():
        p.requires_grad_(False)
    log.say(f"dense: {model.n_parameters():,} parameters, "
            f"{model.flops_per_token():,} floating-point operations a token")
    files = [path] if os.path.isfile(path) else sorted(os.path.join(path, name) for name in os.listdir(path))
    settings = {"model": [[os.path.basename(f), os.path.getsize(f)] for f in files]}
    return Subject(model, about={"id": "dense", "tag": "dense", "base": None, "operation": None, "settings": settings,
                                 "path": path, "bytes": 4 * model.n_parameters(), "extra": 0, "layers": None}), encoding
