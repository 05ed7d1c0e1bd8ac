"""
The steps of the study, in order: the world, the dense model, each compression of it, each repair of that.

Every step is done once: its result stands in the output folder beside the settings it was made with, and is read back
while they are the same. What comes out is a list of Subjects (tasks.py), one a row of the table; evaluate.py asks and
compares them.

    from study import StudyConfig, World, all_subjects

What it leaves out: statistics. Answers are looked at only to choose a learning rate, and by the scripts that try one
repair.
"""
import argparse
import copy
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import torch

import analyze
import data
import idp
import items
import recover
from compress import compress
from kernels import PackedLinear
from model import GPT, GPTConfig, load, read_safetensors, save, write_safetensors
from recover import FitConfig
from tasks import Subject, answer


@dataclass
class StudyConfig:
    world: data.WorldConfig = field(default_factory=data.WorldConfig)
    gpt: dict = field(default_factory=dict)  # what differs from GPTConfig's own defaults
    pretrain: FitConfig = field(default_factory=lambda: FitConfig(steps=1600, lr=4e-3, muon=0.02, weight_decay=0.1))
    pretrain_batch: tuple = (32, 64)         # rows, tokens a row
    without: str = ""                        # an ingredient of RECIPE that pretraining goes without
    calibration: tuple = (128, 64)
    repair_batch: tuple = (32, 32)
    repair_steps: int = 250
    repair_bfloat16: bool = False            # matrix products of a repair's training in bfloat16
    test_people: int = 500                   # of each split, at most, that the table asks about
    timing_rounds: int = 15                  # times that each model answers one question, taking turns
    ablation_people: int = 250               # held-out people that every way to choose from a pool is tried on
    size: str = "default"                    # the preset these settings are
    seed: int = 0
    seeds: int = 1                           # compression data, repair and prompts are drawn so many times
    repeat: int = 0                          # which of those times this is
    full: bool = False
    skills: bool = False                     # whether pretraining also reads the lessons of items.py
    task_items: int = 200                    # of each task and split
    task_repairs: tuple = ("LoRA rank 8", "IDP 4 x 8")  # whom tasks are asked of beside the unrepaired models
    all_tasks: bool = False                  # asked of every model
    out: str = "out"
    compressions: dict = field(default_factory=lambda: COMPRESSIONS)
    repairs: dict = field(default_factory=lambda: REPAIRS)
    rates: dict = field(default_factory=lambda: RATES)
    rate_grid: dict = field(default_factory=lambda: RATE_GRID)


SIZES = ("default", "quick", "medium")


def sized(size, seed=0, out="out", **more):
    """The study's settings. "quick": fewer people and steps, the same path in a minute, in OUT/quick. "medium": a wider
    GPT that pretraining also teaches to read a text, compare, summarize and follow instructions, in OUT/medium.
    """
    config = StudyConfig(world=data.WorldConfig(seed=seed), size=size, seed=seed, out=out, **more)
    if size == "quick":
        config.world = data.WorldConfig(seen=60, heldout=60, validation=40, novel=40, seed=seed)
        config.gpt = {"n_layer": 2, "n_embd": 64}
        config.pretrain.steps, config.pretrain_batch = 300, (16, 64)
        config.repair_steps, config.task_items = 30, 40
        config.out = os.path.join(out, "quick")
    if size == "medium":
        config.world.vocab_size, config.skills = 1280, True
        config.gpt = {"n_embd": 128, "context": 128}
        config.pretrain.steps, config.pretrain_batch = 6400, (16, 128)
        config.calibration, config.repair_batch, config.out = (128, 128), (16, 96), os.path.join(out, "medium")
    return config


COMPRESSIONS = {  # tag: (operation, method, settings)
    "RTN 3 bits": ("quantize", "rtn", {"bits": 3, "group_size": 96}),
    "GPTQ 3 bits": ("quantize", "gptq", {"bits": 3, "group_size": 96, "search": False}),  # as in its paper
    "magnitude 50 %": ("prune", "magnitude", {"sparsity": 0.5}),
    "SparseGPT 50 %": ("prune", "sparsegpt", {"sparsity": 0.5}),
}
REPAIRS = {  # tag: (kind, size: a rank (and layers), a length, or prompts x length and how the pool is trained)
    "LoRA rank 1": ("lora", 1),
    "LoRA rank 8": ("lora", 8),
    "prompt 8": ("prompt", 8),
    "prompt 24": ("prompt", 24),
    "prefix 8": ("prefix", 8),
    "IDP 4 x 8": ("idp", (4, 8, "independent")),
}
POOLS = {  # the other ways to train a pool: with --full
    "IDP 4 x 8 joint": ("idp", (4, 8, "joint")),
    "IDP 4 x 8 competitive": ("idp", (4, 8, "competitive")),
    "IDP 4 x 8 selected": ("idp", (4, 8, "selected")),  # chosen by a probe that was trained with the prompts
}
RATES = {  # of what the paper repairs. Winners of `python evaluate.py --sweep lr`; a pool's prompts learn as one does
    "GPTQ 3 bits": {"LoRA rank 1": 3e-3, "LoRA rank 8": 3e-3, "prompt 8": 3e-1, "prompt 24": 1e-1, "prefix 8": 3e-2},
    "SparseGPT 50 %": {"LoRA rank 1": 3e-3, "LoRA rank 8": 3e-3, "prompt 8": 3e-1, "prompt 24": 3e-2, "prefix 8": 1e-1},
}


OPERATIONS = {
    "quantize": "weights rounded to a few bits", "prune": "weights set to zero",
    "LoRA": "a low-rank update beside each layer",
    "prompt": "trained vectors in front of the text", "prefix": "trained keys and values in front, in every layer",
    "IDP": "a pool of prompts, the input picks the one it attends to most",
}
OPERATION = {"lora": "LoRA", "prompt": "prompt", "prefix": "prefix", "idp": "IDP"}


# ---- the edge of every script: options, one line for a mistake, nothing lost on Ctrl-C

def options(description):
    """The options that every script of the study has."""
    defaults = StudyConfig()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="default", help="of the world and the training")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of every random choice")
    parser.add_argument("--out", default=defaults.out, help="folder for everything that is written")
    return parser


def guard(run):
    """Run a script's main function: bad input is one line and status 2, Ctrl-C is one line and status 130."""
    name = os.path.basename(sys.argv[0])
    try:
        run()
    except (ValueError, OSError) as error:
        what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        print(f"{name}: {what}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; every finished step is kept and will be reused", file=sys.stderr)
        sys.exit(130)


# ---- steps: done once, reused while their settings match

class Log:
    """Progress to stderr, and what each step took."""

    def __init__(self):
        self.times, self.began, self.shown = [], time.time(), 0.0

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def progress(self, label, steps, what="loss"):
        """A callback (step, loss or `what` else) that shows how far `label` is and how long it will take."""
        began = time.time()

        def show(step, loss):
            """A line, if the last was long ago or this step is the last."""
            nonlocal began
            now, last = time.time(), step + 1 == steps
            began = now if step == 0 else began  # a pool goes from 1 to `steps` once a prompt
            if not last and now - self.shown < (0.5 if sys.stderr.isatty() else 15):
                return
            self.shown = now
            left = (now - began) / max(1, step) * (steps - step - 1)
            line = f"  {label}: step {step + 1} of {steps}, {what} {loss:.4g}, {left:.0f} s left"
            screen = sys.stderr.isatty()
            print("\r" + line.ljust(78) if screen else line, end="\n" if last or not screen else "", file=sys.stderr,
                  flush=True)
        return show


def step(log, path, settings, make, write, read):
    """`make()` and `write(result, path)`, unless `path` was made with the same settings: then `read(path)`.

    The settings stand beside the result in `path`.json, written after it: what was interrupted is made again.
    """
    mark, began = path + ".settings.json", time.time()
    settings = json.loads(json.dumps(settings))
    if os.path.exists(path) and os.path.exists(mark):
        with open(mark) as f:
            if json.load(f) == settings:
                result = read(path)
                log.times.append({"step": os.path.basename(path), "seconds": time.time() - began, "reused": True})
                return result
    if os.path.exists(mark):
        os.remove(mark)
    result = make()
    write(result, path)
    write_text(mark, json.dumps(settings))
    log.times.append({"step": os.path.basename(path), "seconds": time.time() - began, "reused": False})
    log.say(f"{os.path.basename(path)}: {time.time() - began:.1f} s")
    return result


def write_text(path, text):
    """Write a text file whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(temporary, path)


def read_json(path):
    with open(path) as f:
        return json.load(f)


def json_step(log, path, settings, make):
    """A `step` whose result is kept as JSON."""
    return step(log, path, settings, make, lambda result, path: write_text(path, json.dumps(result)), read_json)


def slug(tag):
    """A tag as a file name: "GPTQ 3 bits" -> "gptq-3-bits"."""
    return "-".join("".join(c if c.isalnum() else " " for c in tag.lower()).split())


# ---- the parts of the study

class World:
    """Everything that follows from the world's config: people by split, the texts, the tokenizer, windows of text to
    score.
    """
    name = "small world"

    def __init__(self, config):
        people = data.make_world(config.world)
        self.people = {split: [p for p in people if p.split == split] for split in data.SPLITS}
        told = [p for p in people if p.split != "novel"]
        first = [p for split in data.SPLITS[:3] for p in self.people[split][:len(self.people[split]) // 10]]
        self.text, self.first_text, self.repair_text = (  # pretraining, where it begins, and what repairs read
            data.statements(who) + data.taught_questions(who) for who in (told, first, self.people["seen"]))
        if config.skills:  # lessons are about seen people; facts, told in fewer tokens, are read four times as often
            few = [p for p in first if p.split == "seen"]
            self.text, self.first_text, self.repair_text = (
                4 * text + items.lessons(who, config.seed) for text, who in
                ((self.text, self.people["seen"]), (self.first_text, few), (self.repair_text, self.people["seen"])))
        self.ranks = data.train_bpe(self.text, config.world.vocab_size)
        self.encoding = data.make_encoding(self.ranks)
        self.windows = next(data.batches(data.statements(self.people["heldout"]), self.encoding, 100, 63,
                                         torch.Generator().manual_seed(config.seed), aligned=True))  # (100, 64)
        self.inside = self.windows[:50, :-1]  # the text on which attention and activations are compared

    def facts(self, split, people=None):
        """The facts of a split, of its first `people` people."""
        return data.facts(self.people[split][:people])

    def asked(self, config):
        """{split: facts} that the table asks about."""
        return {split: self.facts(split, config.test_people) for split in ("seen", "heldout", "novel")}

    def tasks(self, config):
        """{task: {split: items}} of items.py that this GPT was prepared for."""
        told = [p for split in data.SPLITS[:3] for p in self.people[split]]
        return {name: {split: items.make_items(name, self.people[split], told, config.task_items, config.seed)
                       for split in ("seen", "heldout", "novel")}
                for name, task in items.TASKS.items() if config.skills or not task.skill}

    def answer(self, subject, facts):
        """One dict a fact: what `subject` answers, see tasks.answer."""
        return answer(subject, facts, self.encoding)

    def under_each(self, model, pool, facts):
        """Every fact under every prompt of a pool, see analyze.under_each."""
        return analyze.under_each(model, pool, facts, self.encoding)

    def ensemble(self, model, pool, facts, each):
        """(N,) right or not by the mean of the prompts' probabilities; `each` is what `under_each` gave."""
        return analyze.ensemble(model, pool, facts, self.encoding)

    def in_top(self, model, facts, M):
        """(N,) whether the right answer is among the M likeliest, without any prompt."""
        return analyze.in_top(Subject(model), facts, self.encoding, M)

    def unrelated(self):
        """24 tokens (24,) of sentences about people that no question asked behind them is about."""
        told = data.statements(self.people["validation"])[::len(data.VALUES) * 3 + 1]  # each about somebody else
        text = [t for sentence in told[:8] for t in [self.encoding.eot_token, *self.encoding.encode_ordinary(sentence)]]
        return torch.tensor(text[:24])

    def calibration(self, config):
        """The ids (N, T) that compression is calibrated on: text about seen people."""
        rows, T = config.calibration
        return next(data.batches(self.repair_text, self.encoding, rows, T - 1,
                                 torch.Generator().manual_seed(again(config) + 1)))

    def repair_rows(self, config):
        """The ids (rows, T + 1) of every step of a repair: text about seen people."""
        stream = data.batches(self.repair_text, self.encoding, *config.repair_batch,
                              torch.Generator().manual_seed(again(config) + 2), aligned=True)
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


RECIPE = {  # what the dense GPT is trained with, and what each ingredient is for
    "muon": "Muon on the blocks' matrices; without it AdamW takes all, at half the rate",
    "few": "the first tenth of the steps reads a tenth of the people",
    "aligned": "every row of a batch begins with a document, as every question does",
}


def train_dense(config, world, log):
    """The dense GPT, trained on everybody but the novel people, with all of RECIPE but config.without.

    The first tenth of the steps reads a tenth of the people, of every split alike: a model learns how to look a fact up
    from few people told often, and then learns the others' much faster (Zucchet et al. 2025, arXiv 2503.21676).
    """
    generator, began = torch.Generator().manual_seed(config.seed), time.time()
    model = GPT(GPTConfig(vocab_size=world.encoding.n_vocab, **config.gpt)).init_weights(generator)
    few, everybody = (data.batches(text, world.encoding, *config.pretrain_batch, generator,
                                   aligned=config.without != "aligned") for text in (world.first_text, world.text))
    steps, fit = config.pretrain.steps, config.pretrain
    first = 0 if config.without == "few" else steps // 10
    if config.without == "muon":
        fit = replace(fit, lr=fit.lr / 2, muon=0.0)
    stream = (next(few if i < first else everybody) for i in range(steps))
    recover.fit(model, model.parameters(), stream, config=fit, progress=log.progress("dense", steps))
    tokens = steps * config.pretrain_batch[0] * config.pretrain_batch[1]
    log.say(f"dense: {tokens:,} tokens, {tokens / (time.time() - began):,.0f} a second")
    return model


def train_repair(model, kind, size, batches, losses, fit_config, seed, progress=None, bfloat16=False):
    """Train one repair of the frozen `model` -> its tensors. `losses` is recover.next_token or recover.distillation.

    bfloat16  matrix products in bfloat16, all else and what is trained in float32: faster where the CPU has them
    """
    with torch.autocast(model.wte.weight.device.type, torch.bfloat16, enabled=bfloat16,
                        cache_enabled=False):  # a cached cast would outlive the step that changes what was cast
        return trained(unpacked(model), kind, size, batches, losses, fit_config, seed, progress)


def trained(model, kind, size, batches, losses, fit_config, seed, progress):
    """The body of `train_repair`, on float weights."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "lora":
        parameters = recover.add_lora(model, *lora_size(size), generator=generator)
        recover.fit(model, parameters, batches, recover.objective(model, losses), fit_config, progress=progress)
        return parameters
    if kind == "prefix":
        prefix = recover.Prefix(recover.prefix_init(model, recover.prompt_init(model, size, generator=generator)))
        loss = recover.objective(lambda ids: model(ids, cache=prefix.cache(model, *ids.shape)), losses)
        recover.fit(model, prefix.parameters(), batches, loss, fit_config, progress=progress)
        return [prefix.weight]
    M, P, way = size if kind == "idp" else (1, size, "independent")
    pool = idp.PromptPool([recover.prompt_init(model, P, generator=generator) for _ in range(M)],
                          torch.zeros(M, model.config.n_embd) if way == "selected" else None)
    if way == "independent":
        for m, prompt in enumerate(pool.prompts):  # each on a shard of its own
            loss = idp.independent(model, pool, losses, m)
            recover.fit(model, [prompt], batches[m::M], loss, fit_config, progress=progress)
    else:
        loss = {"joint": idp.joint, "competitive": idp.competitive, "selected": idp.selected}[way](model, pool, losses)
        recover.fit(model, pool.parameters(), batches, loss, fit_config, progress=progress)
    return [*pool.prompts] + ([pool.probe] if way == "selected" else [])


def lora_size(size):
    """(rank, alpha, targets) of a LoRA's size: a rank, for every linear layer, or (rank, "q v")."""
    rank, targets = (size, recover.LINEARS) if isinstance(size, int) else (size[0], tuple(size[1].split()))
    return rank, None, targets


def attach(model, kind, size, tensors):
    """The Subject that a trained repair makes of `model`."""
    if kind == "lora":
        model = shared_copy(model)
        with torch.no_grad():
            for p, trained in zip(recover.add_lora(model, *lora_size(size)), tensors):
                p.copy_(trained)
        return Subject(model)
    if kind == "prefix":
        with torch.no_grad():
            return Subject(model, recover.Prefix(tensors[0]).cache(model, 1, 0))
    return pool_subject(model, make_pool(kind, size, tensors))


def make_pool(kind, size, tensors):
    """The pool of a trained prompt or pool: its prompts and, of one that was trained with it, its probe."""
    M = size[0] if kind == "idp" else 1
    return idp.PromptPool(tensors[:M], *tensors[M:])


def pool_subject(model, pool):
    """The Subject of a pool under the paper's rule, or its probe if it has one; one prompt leaves nothing to choose."""
    with torch.no_grad():
        filled = idp.prefill(model, pool)

    def choose(ids, lengths):
        if pool.probe is None:
            return idp.select(model, pool, ids, lengths, filled)
        return idp.highest(idp.probed(model, pool, ids, lengths))
    return Subject(model, filled, choose if len(pool) > 1 else None)


def unpacked(model):
    """A shared copy whose packed layers are float ones of the same values: unpacked once, not at every step."""
    model = shared_copy(model)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, PackedLinear):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                plain.weight = torch.nn.Parameter(layer.packed.dequantize(), requires_grad=False)
                plain.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias, requires_grad=False)
                setattr(parent, name, plain)
    return model


def shared_copy(model):
    """A copy of the model whose tensors are the same: modules can be wrapped in it without touching the given one."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def dense_subject(config, world, log):
    """The Subject of the dense GPT, trained or read back, and its tokenizer's ranks written beside it."""
    settings = {"world": asdict(config.world), "gpt": config.gpt, "pretrain": asdict(config.pretrain),
                "batch": config.pretrain_batch, "seed": config.seed, "torch": torch.__version__,
                **({"lessons": items.LESSONS} if config.skills else {}),
                **({"without": config.without} if config.without else {})}
    os.makedirs(config.out, exist_ok=True)
    path = os.path.join(config.out, "dense.safetensors")
    model = step(log, path, settings, lambda: train_dense(config, world, log), save, load)
    data.save_ranks(world.ranks, os.path.join(config.out, "tokens.tiktoken"))
    log.say(f"dense: {model.n_parameters():,} parameters, {os.path.getsize(path):,} bytes, "
            f"{model.flops_per_token():,} floating-point operations a token")
    return Subject(model, about={"id": "dense", "tag": "dense", "base": None, "operation": None, "settings": settings,
                                 "path": path, "extra": 0, "layers": None})


def again(config):
    """The seed of what `--seeds` draws again: calibration text, repair text, the start of every repair."""
    return config.seed + 1000 * config.repeat


def compressed_subject(dense, tag, config, world, log):
    """The Subject that config.compressions[tag] makes of the dense one, calibrated on text about seen people."""
    operation, method, how = config.compressions[tag]
    calibration = world.calibration(config)
    world.check_leaks(calibration)
    settings = {**dense.about["settings"], "method": method, **how, "calibration": config.calibration,
                **({"repeat": config.repeat} if config.repeat else {})}
    name = slug(tag) + (f"-seed-{config.repeat}" if config.repeat else "")
    path = os.path.join(config.out, name + ".safetensors")

    def make():
        model, rows = compress(dense.model, calibration, method, **how)
        write_text(path + ".layers.json", json.dumps(rows))
        return model
    model = step(log, path, settings, make, save, load)
    with open(path + ".layers.json") as f:
        rows = json.load(f)
    return Subject(model, about={"id": name, "tag": tag, "base": "dense", "settings": settings, "path": path,
                                 "extra": 0, "layers": rows,
                                 "operation": {"name": operation, "parameters": {"method": method, **how}}})


def repair_batches(dense, config, world, log):
    """A function that gives the repair batches with the dense model's targets, and makes them when it is first called.
    """
    made = []

    def batches():
        if not made:
            log.say("the dense model's targets for the repair text")
            ids = world.repair_rows(config)
            world.check_leaks(torch.cat(ids))
            made.extend(recover.add_targets(dense.model, ids))
        return made
    return batches


def repaired_subject(base, tag, kind, size, batches, config, log, objective="distillation", lr=None):
    """`base` repaired in one way, on the batches of `repair_batches`."""
    lr = lr or config.rates[base.about["tag"]][f"prompt {size[1]}" if kind == "idp" else tag]
    fit_config = FitConfig(steps=config.repair_steps, lr=lr)
    settings = {**base.about["settings"], "repair": kind, "size": size, "objective": objective,
                "fit": asdict(fit_config), "repair_batch": config.repair_batch,
                **({"bfloat16": True} if config.repair_bfloat16 else {})}
    if objective != "distillation":
        tag += ", next token"
    name = f"{base.about['id']}-{slug(tag)}"
    path = os.path.join(config.out, name + ".safetensors")
    tensors = step(log, path, settings,
                   lambda: train_repair(base.model, kind, size, batches(), getattr(recover, objective), fit_config,
                                        again(config), log.progress(name, fit_config.steps), config.repair_bfloat16),
                   lambda tensors, path: write_safetensors(path, {f"{i:03d}": t for i, t in enumerate(tensors)}),
                   lambda path: list(read_safetensors(path)[0].values()))
    subject = attach(base.model, kind, size, tensors)
    how = {"size": size, "objective": objective, "lr": fit_config.lr, "steps": fit_config.steps}
    subject.about = {"id": name, "tag": tag, "base": base.about["id"], "settings": settings, "path": base.about["path"],
                     "layers": None, "extra": sum(t.numel() for t in tensors), "kind": kind, "tensors": tensors,
                     "operation": {"name": OPERATION[kind], "parameters": how}}
    return subject


def all_subjects(dense, config, world, log):
    """Every model of the study, in the order of the table; each is compressed or repaired, or reused."""
    subjects, batches = [dense], repair_batches(dense, config, world, log)
    for tag in config.compressions:
        base = compressed_subject(dense, tag, config, world, log)
        subjects.append(base)
        if tag not in config.rates:
            continue
        wanted = [(repair, *how, "distillation") for repair, how in config.repairs.items()]
        if config.full:
            wanted += [(repair, *how, "distillation") for repair, how in POOLS.items()]
            wanted += [(repair, *how, "next_token") for repair, how in config.repairs.items()]
        subjects += [repaired_subject(base, repair, kind, size, batches, config, log, objective)
                     for repair, kind, size, objective in wanted]
    return subjects


RATE_GRID = {"lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "prompt": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
             "prefix": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}  # five each: no method gets more tries than another


def sweep_rates(dense, config, world, log):
    """Try the learning rates of the grid for each repair but the pool, whose prompts learn as a single one does.

    Judged on the validation people: recall, with the log-probability of the right answer beside it. Prints a row a run.
    """
    batches, facts = repair_batches(dense, config, world, log), world.facts("validation")
    for base_tag in config.rates:
        base = compressed_subject(dense, base_tag, config, world, log)
        for tag, (kind, size) in config.repairs.items():
            for lr in config.rate_grid.get(kind, ()):
                tensors = train_repair(base.model, kind, size, batches(), recover.distillation,
                                       FitConfig(steps=config.repair_steps, lr=lr), config.seed,
                                       bfloat16=config.repair_bfloat16)
                given = world.answer(attach(base.model, kind, size, tensors), facts)
                recall, logprob = (sum(a[key] for a in given) / len(given) for key in ("correct", "logprob"))
                print(f"{base_tag:15s} {tag:12s} lr {lr:<7g} validation recall {recall:.1%}, "
                      f"log-probability {logprob:.3f}", flush=True)


def repair_one(config, base_tag, kind, size, objective, lr):
    """Train one repair, print recall before and after: what `python recover.py` and `python idp.py` do."""
    world, log = World(config), Log()
    dense = dense_subject(config, world, log)
    base = compressed_subject(dense, base_tag, config, world, log)
    tag = f"{kind} {size if isinstance(size, int) else ' '.join(map(str, size))} lr {lr:g}"
    batches = repair_batches(dense, config, world, log)
    repaired = repaired_subject(base, tag, kind, size, batches, config, log, objective, lr)
    for split in ("seen", "heldout", "novel"):
        facts = data.facts(world.people[split][:config.test_people])
        right = [sum(a["correct"] for a in answer(s, facts, world.encoding)) for s in (dense, base, repaired)]
        print(f"{split:8s} {len(facts):,} facts: " + ", ".join(f"{name} {n / len(facts):.1%}" for name, n in
                                                               zip(("dense", base_tag, "repaired"), right)))
    print(f"{repaired.about['extra']:,} extra parameters")
