"""
What a study's steps are, and how long each takes: for "step 7 of 42, 31 s left of about 5 min" from the first line on.

A step is a model that is made and asked, a control with its repairs, or one of the two checks at the end. Seconds are
those of a laptop with two cores. `Run.expect` replaces them by what the same files took before, Log corrects them by
the pace of the run.

What it leaves out: the steps of a real model (real/): how long one of them takes depends on the model.
"""
from study.controls import TAGS, control_config, control_file
from study.steps import slug

TOKENS = 50_000   # of pretraining, a second
QUESTIONS = 4000  # answered a second
REPAIR = 0.02     # seconds a training step of a repair


def planned(run):
    """{step: {file: typical seconds}} of `python evaluate.py`; under "" what has no file: intervals, the page."""
    config, (rows, tokens) = run.config, run.config.pretrain_batch
    asking = 0.3 + sum(len(facts) for facts in run.world.asked(config).values()) / QUESTIONS
    draws = {f", draw {k + 1}" if k else "": run.draw(k).config for k in range(config.seeds)}
    plan = {}
    for words, drawn in draws.items():
        plan["dense" + words] = model_files("dense" + drawn.draw_suffix, config.pretrain.steps * rows * tokens / TOKENS,
                                            asking, {} if drawn.repeat else closer(run, "dense"))
        for tag in config.compressions:
            base = slug(tag) + drawn.draw_suffix
            plan[tag + words] = model_files(base, 1.5, asking, {} if drawn.repeat else closer(run, tag))
            for name, (kind, *_) in config.repairs.items():
                training = 0.5 if kind == "correction" else REPAIR * config.repair_steps
                plan[f"{tag} + {name}{words}"] = model_files(f"{base}-{slug(name)}", training, asking,
                                                             {} if drawn.repeat else closer(run, name, kind))
    for name in TAGS:
        for words, drawn in draws.items():
            plan[f"control {name}{words}"] = control_files(drawn, name, asking)
    return {**plan, "context": {"context": asking}, "noise floor": {"noise": 3 * asking},
            "": {"": 10 + 5 * config.seeds}}


def model_files(file, making, asking, more):
    """{file: seconds} of one model: made, asked, and what else is measured."""
    return {file: making, f"{file}.answers": asking, **{f"{file}.{what}": seconds for what, seconds in more.items()}}


def closer(run, tag, kind=None):
    """{what: seconds} of what is measured of models of the first draw alone; `kind` is that of a repair."""
    config, more = run.config, {"perplexity": 0.2, "inside": 0.4}
    if run.world.tasks(config) and (config.all_tasks or kind is None or tag in config.task_repairs):
        more["tasks"] = 0.3 + config.task_items / 150
    if kind == "idp" and config.selector_people:
        more["selectors"] = 0.3 + 0.02 * config.selector_people
    return more


def control_files(config, name, asking):
    """{file: seconds} of one control in one draw: it, its repairs, and what they and its reference answer."""
    how, (made, before) = control_config(config), TAGS[name]
    reference, damaged = (slug(tag) + config.draw_suffix for tag in (before, name))
    repairs = {f"{damaged}-{slug(tag)}": REPAIR * config.repair_steps for tag in how.repairs}
    return {control_file(config, made): 0.05 * how.lock.steps, **repairs,
            **{f"{file}.answers": asking for file in (reference, damaged, *repairs)}}
