"""
The models of the study, each made once: the dense one, its compressions, their repairs.

Each is a Subject (world/score.py) that answers questions, with what the tables need to know in `subject.about`.
"""
import functools
import json
import os
from dataclasses import asdict

import torch

import recover
from checkpoints import load, save
from checkpoints.adapters import load_tensors, save_tensors
from checkpoints.vocabulary import save_ranks
from compress import compress
from engine.device import DTYPES
from engine.files import read_json, write_text
from recover import FitConfig, correct_biases
from study.repairs import attach, lora_size, train_repair, unpacked
from study.settings import OPERATION, rate
from study.steps import LAYERS, slug, with_result
from study.training import train_dense
from world.items import LESSONS
from world.score import Subject


def dense_subject(run):
    """The Subject of the dense GPT, trained or read back, and its tokenizer's ranks written beside it."""
    config, log = run.config, run.log
    settings = {"world": asdict(config.world), "gpt": config.gpt, "pretrain": asdict(config.pretrain),
                "batch": config.pretrain_batch, "seed": config.draw_seed, "torch": torch.__version__,
                "device": config.device, "dtype": config.dtype, "without": config.without,
                "lessons": LESSONS if config.skills else None}
    name = "dense" + config.draw_suffix
    path = run.path(name + ".safetensors")
    model = run.once(name + ".safetensors", settings, ("study.training",), lambda: train_dense(run), save, load)
    if not config.repeat:
        save_ranks(run.world.ranks, run.path("tokens.tiktoken"))
        log.say(f"dense: {model.n_parameters():,} parameters, {os.path.getsize(path):,} bytes, "
                f"{model.flops_per_token():,} floating-point operations a token")
    model = model.to(config.device, DTYPES[config.dtype])
    return Subject(model, about={"id": name, "tag": "dense", "base": None, "operation": None,
                                 "settings": with_result(settings, path), "path": path,
                                 "extra": 0, "layers": None})


def dense_of_draw(run, dense):
    """The dense Subject of a draw's run: `dense` is that of the first draw; a world that is `trained` has one for each.
    """
    return dense_subject(run) if run.config.repeat and run.world.trained else dense


def compressed_subject(run, dense, tag):
    """The Subject that config.compressions[tag] makes of the dense one, calibrated on text about seen people."""
    config = run.config
    operation, method, how = config.compressions[tag]
    calibration = run.world.calibration(config)
    run.world.check_leaks(calibration)
    settings = {**dense.about["settings"], "method": method, **how, "calibration": config.calibration,
                "repeat": config.repeat}
    name = slug(tag) + config.draw_suffix
    path = run.path(name + ".safetensors")

    def write(compressed, path):
        """The report first: without the model nobody takes it for finished."""
        model, rows = compressed
        write_text(path + LAYERS, json.dumps(rows))
        save(model, path)
    model, rows = run.once(name + ".safetensors", settings, ("compress", "study.training"),
                           lambda: compress(dense.model, calibration, method, **how), write,
                           lambda path: (load(path), read_json(path + LAYERS, list)))
    model = model.to(dense.device)
    return Subject(model, about={"id": name, "tag": tag, "base": dense.about["id"],
                                 "settings": with_result(settings, path), "path": path,
                                 "extra": 0, "layers": rows,
                                 "operation": {"name": operation, "parameters": {"method": method, **how}}})


def repair_batches(run, dense):
    """A function that gives the repair batches with the dense model's targets, and makes them when it is first called.
    """
    return target_batches(run, dense.model, dense.device)


def target_batches(run, teacher, device):
    """A function that gives the repair batches with a teacher's targets, and makes them when it is first called.

    teacher  ids (B, T) -> logits (B, T, V)
    """
    @functools.cache
    def batches():
        """The batches, made at the first call."""
        rows = run.world.repair_rows(run.config)
        run.world.check_leaks(torch.cat(rows))
        return recover.add_targets(teacher, [ids.to(device) for ids in rows])
    return batches


def repaired_subject(run, base, batches, tag, kind, size, objective="distillation", lr=None, dense=None, code=()):
    """`base` repaired in one way, on what `repair_batches` gave; kept as an adapter (checkpoints/adapters.py).

    code   modules that other batches come from
    dense  the undamaged model, for bias correction, which trains nothing and reads the calibration text
    """
    config, trained = run.config, kind != "correction"
    fit_config = FitConfig(steps=config.repair_steps,
                           lr=lr or rate(config, base.about["tag"], tag, kind, size)) if trained else None
    settings = {**base.about["settings"], "repair": kind, "size": size, "bfloat16": config.repair_bfloat16,
                **({"objective": objective, "fit": asdict(fit_config), "repair_batch": config.repair_batch}
                   if trained else {})}
    name = f"{base.about['id']}-{slug(tag)}"
    layout = "bias" if kind == "correction" else kind
    targets = size.split() if layout == "bias" else lora_size(size)[1] if kind == "lora" else None

    def make():
        """The repair's tensors, trained or computed."""
        if not trained:
            calibration = run.world.calibration(config).to(base.device)
            return correct_biases(unpacked(base.model), dense.model, calibration, size)
        return train_repair(base.model, kind, size, batches(), getattr(recover, objective), fit_config,
                            config.draw_seed, run.log.progress(name, fit_config.steps), config.repair_bfloat16)
    tensors = run.once(name, settings, ("study.repairs", "compress", "study.training", *code), make,
                       lambda tensors, path: save_tensors(path, base.model, layout, tensors, targets,
                                                          kind == "idp" and size[2] == "selected"),
                       lambda path: load_tensors(path, base.model, layout))
    tensors = [t.to(base.device) for t in tensors]
    subject = attach(base.model, kind, size, tensors)
    training = {"objective": objective, "lr": fit_config.lr, "steps": fit_config.steps} if trained else {}
    subject.about = {"id": name, "tag": tag, "base": base.about["id"],
                     "settings": with_result(settings, run.path(name)), "path": base.about["path"],
                     "layers": None, "extra": sum(t.numel() for t in tensors), "kind": kind, "tensors": tensors,
                     "operation": {"name": OPERATION[kind], "parameters": {"size": size, **training}}}
    return subject
