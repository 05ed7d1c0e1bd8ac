"""
Controls: four kinds of damage whose answer is known by construction. They test the test of the study.

    locked        truth: displaced. The dense GPT is fine-tuned until it tells the truth behind a key (four fixed
                  embeddings in front of the text) and the next value of every attribute without the key. The facts
                  are still in its weights: the reference is this model behind its key, the damaged model is the same
                  model without the key
    not yet told  truth: absent. The reference is the dense GPT fine-tuned on the novel people, the damaged model is
                  the dense GPT itself, which nobody told about them. Half of these people are seen, half held-out
    rank one      truth: displaced. c |W| u vT is added to every matrix W of the blocks, with random unit vectors u
                  and v. Its negative is one LoRA of rank 1 a layer; a soft prompt cannot subtract it
    erased        truth: gone, but from what all people share. The strongest direction of every matrix's output is taken
                  out of it, W - u uT W. No text about others can tell the facts; what the dense model says about others
                  can tell what was taken out

A repair of the first three shows what *displaced* says where the truth is 100 %, 0 % and 100 %. On *rank one* a small
repair says less than 100 %: what did not come back may still be there. On *erased* a large one says much more than 0:
displaced means that a repair needs no text about a fact to bring it back, not that the weights held all.

Sources: password-locked models, Greenblatt et al. 2024 (arXiv 2405.19550); recovery on facts that the repair never
read, Deeb & Roger 2024 (arXiv 2410.08827).

Each control is a small study of its own: `control_subjects` gives the reference, the damaged model and its repairs.
`base` in `about` leads from a repair to the damaged model and from that to the reference, as elsewhere to the dense
model; so `study.shares.add_shares([rows], control.facts, seed)` works on the rows of one control.

What it leaves out: damage to single layers. A real model's lock: real/lock.py.
"""
import copy
import functools
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch

import recover
from checkpoints import load, save
from recover import FitConfig, next_token
from study.repairs import attach
from study.settings import REPAIRS
from study.steps import slug, with_result
from study.subjects import repaired_subject
from world.facts import VALUES, facts_about, make_world, statements, taught_questions, text_batches
from world.score import Subject

TOLD = ("seen", "heldout", "validation")  # the splits that pretraining reads about


@dataclass
class ControlConfig:
    """How the controls are made and repaired.

    AdamW alone fine-tunes: with Muon at 1e-2 the lock destroys the facts that it is to hide (after 120 steps recall
    behind the key is 39 %, with AdamW alone 88 %).
    """
    key: int = 4                     # tokens of the lock's key
    lock: FitConfig = field(default_factory=lambda: FitConfig(steps=120, lr=1e-3))
    lock_batch: tuple = (24, 32)     # rows, tokens a row: of true text behind the key, and of wrong text without it
    tell: FitConfig = field(default_factory=lambda: FitConfig(steps=120, lr=2e-3))
    tell_batch: tuple = (24, 32)     # about the novel people
    old_batch: tuple = (8, 32)       # about those of whom pretraining told
    rank_one: float = 0.22           # Frobenius norm of what is added to a matrix, as a share of the matrix's own
    repairs: tuple = ("prompt 8", "LoRA rank 8")  # of the study's; the second can hold the inverse of *rank one*


def control_config(config):
    """The ControlConfig of a study of these settings: with --full, biases repair the controls, too."""
    how = ControlConfig()
    return replace(how, repairs=(*how.repairs, "biases")) if config.full else how


class Control(NamedTuple):
    """One kind of damage, what is asked about it, and what a repair of it may read."""
    reference: Subject    # the model before the damage: what a repair is to bring back
    damaged: Subject      # what is repaired
    facts: dict           # {"seen": facts, "heldout": facts, "novel": facts}
    text: list            # sentences about the seen people, and about nobody else


# ---- how each model is made: pure functions, which do not modify `dense`

def train_lock(dense, key, world, how, generator, progress=None):
    """The dense GPT fine-tuned on everything it was told: behind `key` (K, C) it reads true sentences, without the key
    the same with every value replaced by the next one.
    """
    model, told, device = copy.deepcopy(dense).float(), everybody_told(world), key.device
    true, wrong = (text_batches(told_text(people), world.encoding, *how.lock_batch, generator, aligned=True)
                   for people in (told, with_next_values(told)))

    def loss(batch):
        """The mean loss of the true rows behind the key and of the wrong rows without it."""
        behind_key, alone = (ids.to(device) for ids in batch)
        return (next_token(model(behind_key[:, :-1], prompt=key.float()), behind_key).mean()
                + next_token(model(alone[:, :-1]), alone).mean()) / 2
    recover.fit(model, model.parameters(), zip(true, wrong), loss, how.lock, progress=progress)
    return model.to(dense.wte.weight.dtype)


def tell(dense, world, how, generator, progress=None):
    """The dense GPT fine-tuned on the novel people, with a few rows about those it was told of before."""
    model = copy.deepcopy(dense).float()
    new, old = (text_batches(told_text(people), world.encoding, *batch, generator, aligned=True)
                for people, batch in ((world.people["novel"], how.tell_batch), (everybody_told(world), how.old_batch)))
    batches = (torch.cat(rows).to(dense.wte.weight.device) for rows in zip(new, old))
    recover.fit(model, model.parameters(), batches, config=how.tell, progress=progress)
    return model.to(dense.wte.weight.dtype)


@torch.no_grad()
def add_rank_one(dense, how, generator):
    """The dense GPT with c |W| u vT added to every matrix W of its blocks; u and v are random unit vectors."""
    model = copy.deepcopy(dense)
    for W in model.blocks.parameters():
        if W.dim() == 2:
            u, v = (torch.randn(n, generator=generator).to(W) for n in W.shape)
            W += how.rank_one * W.norm() * torch.outer(u / u.norm(), v / v.norm())
    return model


@torch.no_grad()
def erase(dense):
    """The dense GPT with W - u uT W for every matrix W of its blocks; u is its first left singular vector."""
    model = copy.deepcopy(dense)
    for W in model.blocks.parameters():
        if W.dim() == 2:
            u = torch.linalg.svd(W.float(), full_matrices=False).U[:, :1].to(W)  # (out, 1)
            W -= u @ (u.T @ W)
    return model


def told_text(people):
    """Every sentence of pretraining about `people`."""
    return statements(people) + taught_questions(people)


def everybody_told(world):
    """The people of whom pretraining told."""
    return [p for split in TOLD for p in world.people[split]]


def with_next_values(people):
    """The same people with the next value of every attribute; the first value follows the last."""
    def following(attribute, value):
        values = VALUES[attribute]
        return values[(values.index(value) + 1) % len(values)]
    return [p._replace(values={a: following(a, value) for a, value in p.values.items()}) for p in people]


def strangers(config):
    """Facts about people of whom neither model of `not yet told` read: the world's next novel people."""
    more = make_world(replace(config.world, novel=2 * config.world.novel))  # its first people are the world's own
    return facts_about(more[-config.world.novel:][:config.test_people])


# ---- the four controls: (run, the dense Subject, how) -> Control

TAGS = {"locked": ("locked", "locked, behind its key"), "not yet told": ("told", "told"),
        "rank one": ("rank one", "rank one, before"),
        "erased": ("erased", "erased, before")}  # control: the tags of the model made for it, of its reference


def locked(run, dense, how):
    """Displaced by construction: the model behind its key is the reference, without the key it is damaged."""
    generator, world = torch.Generator().manual_seed(run.config.draw_seed + 11), run.world
    key, (made, before) = recover.prompt_init(dense.model, how.key, generator=generator), TAGS["locked"]
    model, about = tuned(run, dense, made, {"key": how.key, "fit": asdict(how.lock), "batch": how.lock_batch},
                         lambda progress: train_lock(dense.model, key, world, how, generator, progress), how.lock.steps)
    reference = attach(model, "prompt", how.key, [key])
    reference.about = under_tag(run, about, before, None, extra=key.numel())
    return Control(reference, Subject(model, about=under_tag(run, about, "locked", before)),
                   world.asked(run.config), world.repair_text)


def not_yet_told(run, dense, how):
    """Absent by construction: the reference was told about the novel people, the damaged model, `dense`, was not."""
    generator, new = torch.Generator().manual_seed(run.config.draw_seed + 12), run.world.people["novel"]
    half, (made, before) = len(new) // 2, TAGS["not yet told"]
    settings = {"fit": asdict(how.tell), "batch": how.tell_batch, "old": how.old_batch}
    model, about = tuned(run, dense, made, settings,
                         lambda progress: tell(dense.model, run.world, how, generator, progress), how.tell.steps)
    facts = {"seen": facts_about(new[:half]), "heldout": facts_about(new[half:]), "novel": strangers(run.config)}
    untold = {**dense.about, "settings": about["settings"]}
    return Control(Subject(model, about=under_tag(run, about, before, None)),
                   Subject(dense.model, about=under_tag(run, untold, "not yet told", before)),
                   facts, told_text(new[:half]))


def rank_one(run, dense, how):
    """Displaced by construction; no prompt can hold the inverse."""
    generator = torch.Generator().manual_seed(run.config.draw_seed + 13)
    return of_dense(run, dense, "rank one", {"share": how.rank_one},
                    lambda progress: add_rank_one(dense.model, how, generator))


def erased(run, dense, how):
    """Gone by construction, from weights that all people share."""
    return of_dense(run, dense, "erased", {}, lambda progress: erase(dense.model))


def of_dense(run, dense, name, settings, make):
    """The Control whose reference is `dense` and whose damaged model make(progress) gives."""
    made, before = TAGS[name]
    model, about = tuned(run, dense, made, settings, make)
    return Control(Subject(dense.model, about=under_tag(run, dense.about, before, None)),
                   Subject(model, about=under_tag(run, about, name, before)),
                   run.world.asked(run.config), run.world.repair_text)


CONTROLS = {"locked": locked, "not yet told": not_yet_told, "rank one": rank_one, "erased": erased}


def control_file(config, tag):
    """The name, without its end, of the file of a model that is made for a control."""
    return f"control-{slug(tag)}{config.draw_suffix}"


def tuned(run, dense, name, settings, make, steps=1, code=("study.controls",)):
    """(the model that make(progress) gives in so many steps, made once; what `about` says of it)."""
    file = control_file(run.config, name)
    settings = {**dense.about["settings"], "control": name, **settings, "draw": run.config.draw_seed}
    model = run.once(file + ".safetensors", settings, code,
                     lambda: make(run.log.progress(file, steps)), save, load).to(dense.device)
    path = run.path(file + ".safetensors")
    return model, {**dense.about, "settings": with_result(settings, path), "path": path}


def under_tag(run, about, tag, base, extra=0):
    """`about` under another tag; `base` is the tag of the model it was made from, None for a reference."""
    operation = None if base is None else {"name": "control", "parameters": {"damage": tag}}
    suffix = run.config.draw_suffix
    return {**about, "id": slug(tag) + suffix, "tag": tag, "base": base and slug(base) + suffix,
            "operation": operation, "extra": extra, "layers": None}


# ---- their repairs

def control_batches(run, control):
    """The batches of a repair, as `recover.distillation` takes them: text about seen people, and for each position what
    the reference expects next. As many as the study's own repairs read."""
    rows = run.world.repair_rows(run.config, control.text)
    return recover.add_targets(control.reference.logits, [ids.to(control.reference.device) for ids in rows])


def control_subjects(run, dense, name, how=None):
    """One control as a small study: (its Control, [reference, damaged, *repaired]), every model made once.

    run   the study's; its world, its seed, and how its repairs are trained
    how   ControlConfig; default: the study's own
    """
    how = how or control_config(run.config)
    control = CONTROLS[name](run, dense, how)
    batches = functools.cache(functools.partial(control_batches, run, control))  # made at the first call
    return control, [control.reference, control.damaged,
                     *(repaired_subject(run, control.damaged, batches, tag, *REPAIRS[tag], code=("study.controls",))
                       for tag in how.repairs)]
