"""
The steps of the study, in order: the world, the dense model, each compression of it, each repair of that.

Every step is done once: its result stands in the output folder beside the settings it was made with, and is read back
while they are the same. What comes out is a list of Subjects (tasks.py), one a row of the table; evaluate.py asks and
compares them.

    from study.subjects import StudyConfig, World, all_subjects

What it leaves out: statistics. Answers are looked at only to choose a learning rate, and by the scripts that try one
repair.
"""
import copy
import json
import os
import time
from dataclasses import asdict, replace

import torch

import idp
import recover
from checkpoints import load, save
from compress import compress
from engine.safetensors import read_safetensors, write_safetensors
from engine.script import write_text
from kernels import PackedLinear
from model import GPT, GPTConfig
from recover import FitConfig
from study.settings import OPERATION, POOLS
from study.steps import slug, step
from world.facts import save_ranks, text_batches
from world.items import LESSONS
from world.score import Subject, answer


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
    few, everybody = (text_batches(text, world.encoding, *config.pretrain_batch, generator,
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
                **({"lessons": LESSONS} if config.skills else {}),
                **({"without": config.without} if config.without else {})}
    os.makedirs(config.out, exist_ok=True)
    path = os.path.join(config.out, "dense.safetensors")
    model = step(log, path, settings, lambda: train_dense(config, world, log), save, load)
    save_ranks(world.ranks, os.path.join(config.out, "tokens.tiktoken"))
    log.say(f"dense: {model.n_parameters():,} parameters, {os.path.getsize(path):,} bytes, "
            f"{model.flops_per_token():,} floating-point operations a token")
    return Subject(model, about={"id": "dense", "tag": "dense", "base": None, "operation": None, "settings": settings,
                                 "path": path, "extra": 0, "layers": None})


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
                                        config.draw_seed, log.progress(name, fit_config.steps), config.repair_bfloat16),
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
                given = answer(attach(base.model, kind, size, tensors), facts, world.encoding)
                recall, logprob = (sum(a[key] for a in given) / len(given) for key in ("correct", "logprob"))
                print(f"{base_tag:15s} {tag:12s} lr {lr:<7g} validation recall {recall:.1%}, "
                      f"log-probability {logprob:.3f}", flush=True)


