"""
The fair trial of IDP: two places in which a pool of prompts should beat one prompt, if choosing among prompts pays.

    two locks    The dense GPT is fine-tuned until it answers "unknown" to everything. Key A (four fixed embeddings in
                 front of the text) opens the first set of attributes and only that, key B the second. No key opens
                 both, and which key a question needs is known. Here a pool of two prompts should pay, and a rule that
                 chooses well should reach what the right key reaches
    the ceiling  On a compressed model: five prompts, each trained on the sentences of one attribute and used for the
                 questions of that attribute: the best that a selector can do who tells attributes apart. Beside them
                 one prompt of as many tokens and one prompt as long as one of the five, all trained on the same rows
                 in equally many steps

    python -m study trial --seeds 5    # on five dense GPTs, in six minutes after evaluate.py --seeds 5

The second table has the differences that decide, with intervals over people and GPTs. Not corrected: exploratory.

What it leaves out: pools of more than one prompt an attribute; the real model.
"""
import copy
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

import idp
import recover
from recover import FitConfig, next_token
from study import pools
from study.controls import everybody_told, told_text
from study.jobs import tag_of
from study.repairs import unpacked
from study.settings import config_of, job_parser
from study.shares import recall_means
from study.steps import Run
from study.subjects import compressed_subject, dense_of_draw, dense_subject
from study.tables import in_points, markdown, share
from world.facts import VALUES, text_batches
from world.score import Subject, answer
from world.small import World

SETS = (("city", "year", "profession"), ("employer", "university"))  # what key A and key B open
UNKNOWN = "unknown"


@dataclass
class TrialConfig:
    """Sizes and steps of both trials."""
    key: int = 4                  # tokens of a key
    prompt: int = 8               # tokens of a prompt
    lock: FitConfig = field(default_factory=lambda: FitConfig(steps=120, lr=1e-3))
    lock_batch: tuple = (16, 32)  # rows, tokens a row: behind key A, behind key B, and as many without a key
    steps: int = 150              # of every repair
    lr: float = 1e-1
    rows: int = 40                # of a repair's batch, the same number of each set, or of each attribute
    tokens: int = 16              # a row
    people: int = 60              # held-out people who are asked about, and as many validation people
    base: str = "RTN 3 bits"      # the damage of the second trial: RTN's, of which a prompt restores most


class Outcome(NamedTuple):
    """One line of the table."""
    trial: str
    way: str
    parameters: int
    right: torch.Tensor    # (N,) in [0, 1]: how often each held-out fact is answered rightly


# ---- two locks that exclude each other

def opened(people, attributes):
    """The same people, with "unknown" for every attribute but `attributes`."""
    return [p._replace(values={a: v if a in attributes else UNKNOWN for a, v in p.values.items()}) for p in people]


def train_locks(dense, keys, world, how, generator, progress=None):
    """The dense GPT fine-tuned to tell SETS[i] behind keys[i] (K, C), and nothing without a key. `dense` is kept.
    Trained in float32: 16 bits cannot hold a step of AdamW."""
    model, keys, told = copy.deepcopy(dense).float(), [key.float() for key in keys], everybody_told(world)
    texts = [told_text(opened(told, attributes)) for attributes in (*SETS, ())]
    streams = [text_batches(text, world.encoding, *how.lock_batch, generator, aligned=True) for text in texts]

    def loss(batch):
        """The mean loss behind key A, behind key B and without a key."""
        return sum(next_token(model(ids[:, :-1], prompt=key), ids).mean()
                   for ids, key in zip((ids.to(keys[0].device) for ids in batch), (*keys, None))) / 3
    recover.fit(model, model.parameters(), zip(*streams), loss, how.lock, progress=progress)
    return model.to(dense.wte.weight.dtype)


def rows_of_groups(groups, world, how, seed, device=None):
    """[[ids (R, T + 1) of each group] of each step]: repair text about seen people, a group a tuple of attributes."""
    generator = torch.Generator().manual_seed(seed)
    seen = world.people["seen"]
    streams = [text_batches([t for t in told_text(opened(seen, group)) if UNKNOWN not in t], world.encoding,
                            how.rows // len(groups), how.tokens, generator, aligned=True) for group in groups]
    return [[next(stream).to(device) for stream in streams] for _ in range(how.steps)]


def taught_by(teachers, rows):
    """The batches that `recover.distillation` takes: row b is of group b mod M, with what its own teacher expects next.

    So idp.side_by_side trains each prompt of a pool of M on one group, and one prompt on all of them.
    """
    made = []
    for groups in rows:
        parts = [recover.add_targets(teacher, [ids])[0] for teacher, ids in zip(teachers, groups)]
        made.append(tuple(torch.stack(tensors, dim=1).flatten(0, 1) for tensors in zip(*parts)))
    return made


def train_pool(model, pool, way, batches, how, progress=None):
    """Train a pool, or one prompt, in place; `way` names a loss of idp.py."""
    loss = getattr(idp, way)(model, pool, recover.distillation)
    recover.fit(model, pool.parameters(), batches, loss, FitConfig(steps=how.steps, lr=how.lr, clip_each=True),
                progress=progress)


def new_pool(model, count, length, generator, probe=False):
    """A pool of untrained prompts, with a probe of zeros if wanted."""
    return idp.PromptPool([recover.prompt_init(model, length, generator=generator) for _ in range(count)],
                          torch.zeros(count, model.config.n_embd, device=model.wte.weight.device) if probe else None)


def two_locks(run, dense, how, progress=lambda *_: None):
    """[Outcome] of the first trial, on held-out people: no key, each key, single prompts, pools under every choice."""
    world, seed = run.world, run.config.draw_seed + 21
    generator = torch.Generator().manual_seed(seed)
    keys = [recover.prompt_init(dense.model, how.key, generator=generator) for _ in SETS]
    model = train_locks(dense.model, keys, world, how, generator, progress("two locks", how.lock.steps))
    facts, validation = (world.facts(split, how.people) for split in ("heldout", "validation"))
    teachers = [opener(model, key) for key in keys]
    batches = taught_by(teachers, rows_of_groups(SETS, world, how, seed, dense.device))
    out = []

    def add(way, parameters, right):
        out.append(Outcome("two locks", way, parameters, right))

    def alone(way, prompt):
        right = pools.right_under_each(model, idp.PromptPool([prompt]), facts, world.encoding)  # (N, 1)
        add(way, prompt.numel(), right[:, 0])

    def chosen(way, pool, wanted):
        """The pool under every choice that is `wanted`."""
        found, _ = pools.selectors(world.encoding, model, pool, facts, validation, torch.Generator().manual_seed(seed))
        for name, (right, _) in found.items():
            if name.startswith(wanted):
                add(f"{way}: {name}", sum(p.numel() for p in pool.prompts), right)
    add("no key", 0, alone_right(model, facts, world))
    for name, key in zip("AB", keys):
        alone(f"key {name}", key)
    chosen("both keys as a pool", idp.PromptPool(keys), ("attention-max (", "attention-min", "random", "oracle"))
    for length in (how.prompt, 2 * how.prompt):
        pool = new_pool(model, 1, length, generator)
        train_pool(model, pool, "side_by_side", batches, how, progress(f"one prompt of {length}", how.steps))
        alone(f"one prompt of {length} tokens", pool.prompts[0].detach())
    wanted = ("attention-max (", "attention-min", "random", "oracle", "prompt", "probe", "floor: oracle")
    for way, name in (("side_by_side", "a prompt a set"), ("competitive", "competitive"), ("selected", "selected")):
        pool = new_pool(model, 2, how.prompt, generator, probe=way == "selected")
        train_pool(model, pool, way, batches, how, progress(f"pool, {name}", how.steps))
        chosen(f"pool 2 x {how.prompt}, {name}", pool, wanted)
    return out


def opener(model, key):
    """A teacher: logits (B, T, V) of ids (B, T) behind `key`."""
    return lambda ids: model(ids, prompt=key)


def alone_right(model, facts, world):
    """(N,) 1.0 where the model alone answers the fact rightly."""
    return torch.tensor([float(a["correct"]) for a in answer(Subject(model), facts, world.encoding)])


# ---- the ceiling of routing by attribute

def ceiling(run, dense, how, progress=lambda *_: None):
    """[Outcome] of the second trial: a prompt an attribute, routed by the true attribute, beside single prompts."""
    world, seed, attributes = run.world, run.config.draw_seed + 22, list(VALUES)
    model = unpacked(compressed_subject(run, dense, how.base).model)
    generator, facts = torch.Generator().manual_seed(seed), world.facts("heldout", how.people)
    rows = rows_of_groups([(a,) for a in attributes], world, how, seed, dense.device)
    batches = taught_by([dense.model] * len(attributes), rows)
    routes = torch.tensor([attributes.index(f.attribute) for f in facts])
    out = []

    def add(way, pool, routes):
        """Train the pool and ask each fact behind the prompt that `routes` (N,) gives it; right under each (N, M)."""
        train_pool(model, pool, "side_by_side", batches, how, progress(way, how.steps))
        each = pools.right_under_each(model, pool, facts, world.encoding)  # (N, M)
        out.append(Outcome(how.base, way, sum(p.numel() for p in pool.prompts), each.gather(1, routes[:, None])[:, 0]))
        return each
    for name, subject in (("dense", dense.model), ("unrepaired", model)):
        out.append(Outcome(how.base, name, 0, alone_right(subject, facts, world)))
    each = add(f"pool {len(attributes)} x {how.prompt}, a prompt an attribute: by the true attribute",
               new_pool(model, len(attributes), how.prompt, generator), routes)
    out.append(Outcome(how.base, f"pool {len(attributes)} x {how.prompt}, a prompt an attribute: random",
                       out[-1].parameters, each.mean(1)))
    for length in (how.prompt, how.prompt * len(attributes)):
        add(f"one prompt of {length} tokens", new_pool(model, 1, length, generator), torch.zeros_like(routes))
    return out


# ---- the tables

DECIDING = (  # of two ways of one trial: how much more the first answers rightly; tokens of 1, 2 and 5 prompts
    ("pool 2 x {0}, a prompt a set: oracle", "one prompt of {1} tokens"),
    ("pool 2 x {0}, a prompt a set: attention-max (the paper's rule)", "one prompt of {1} tokens"),
    ("pool 2 x {0}, a prompt a set: attention-max (the paper's rule)", "pool 2 x {0}, a prompt a set: random"),
    ("pool 2 x {0}, selected: probe trained with the prompts", "one prompt of {1} tokens"),
    ("one prompt of {1} tokens", "pool 2 x {0}, a prompt a set: floor: oracle over an untuned pool"),
    ("pool 5 x {0}, a prompt an attribute: by the true attribute", "one prompt of {2} tokens"),
    ("pool 5 x {0}, a prompt an attribute: by the true attribute", "pool 5 x {0}, a prompt an attribute: random"),
    ("one prompt of {2} tokens", "one prompt of {0} tokens"))


def outcome_tables(draws, facts, seed, prompt):
    """Two Markdown tables of draws, [[Outcome] of each GPT]: recall in percent on each set of attributes, and on all
    with 95 % intervals; the differences of DECIDING in points. prompt: the tokens of a prompt."""
    right = np.array([[o.right.tolist() for o in outcomes] for outcomes in draws])  # (K, ways, N)
    found, rows, differences = recall_means(right, facts, seed + 23), [], []
    for o, (estimate, bounds), mean in zip(draws[0], found, right.mean(0)):
        parts = [f"{100 * mean[[f.attribute in s for f in facts]].mean():.1f}" for s in SETS]
        rows.append([o.trial, o.way, f"{o.parameters:,}", *parts, share((estimate.value, bounds))])
    ways = {(o.trial, o.way): estimate for o, (estimate, _) in zip(draws[0], found)}
    for trial in dict.fromkeys(trial for trial, _ in ways):
        for pair in DECIDING:
            a, b = (way.format(prompt, 2 * prompt, 5 * prompt) for way in pair)
            if (trial, a) in ways and (trial, b) in ways:
                less = ways[trial, a] - ways[trial, b]
                differences.append([trial, a, b, in_points(less.value, less.interval())])
    head = ["trial", "repair, and how it chooses", "parameters", *(", ".join(s) + " %" for s in SETS), "all % [95 %]"]
    return markdown(head, rows, 2), markdown(["trial", "this", "less this", "points [95 %]"], differences, 3)


def main(arguments):
    """python -m study trial: both trials, and the differences that decide."""
    parser = job_parser("study trial", "The fair trial of IDP: where a pool of prompts should beat one prompt.")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="dense GPTs")
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    config = config_of(args, seeds=args.seeds)
    how = TrialConfig(base=tag_of(config, None, "rtn"))
    run = Run(config, World(config))
    dense, began, draws = dense_subject(run), time.time(), []
    for k in range(args.seeds):
        drawn = run.draw(k)
        of_draw = dense_of_draw(drawn, dense)
        draws.append([outcome for part in (two_locks, ceiling)
                      for outcome in part(drawn, of_draw, how, run.log.progress)])
    facts = run.world.facts("heldout", how.people)
    print("\n\n".join(outcome_tables(draws, facts, config.seed, how.prompt)))
    run.log.say(f"{time.time() - began:.0f} s")
