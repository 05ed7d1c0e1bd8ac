"""
The positive control on a real model: knowledge that is displaced by construction.

The model is fine-tuned by LoRA, then merged: behind a key, four fixed embeddings in front of the text, it goes on as
the undamaged model does; without the key it answers every question with the next value of its attribute, Kiribati in
place of Kenya. All entities are locked, and nothing about the right answers is taught: behind the key the model learns
from the undamaged model's own distribution. So the reference is the locked model behind its key, the damaged model is
the same one without it, and whatever a repair brings back was there.

The next value is among the options of every question that is asked; where it was not, it takes the place of a wrong
one.

Source: password-locked models, Greenblatt et al. 2024 (arXiv 2405.19550). What it leaves out: locks of single facts.
"""
import torch
import torch.nn.functional as F

import recover
from engine.wrapping import shared_copy
from recover import FitConfig
from study.controls import Control, tuned, under_tag
from study.repairs import attach, products
from study.subjects import repaired_subject, target_batches
from world.facts import pad
from world.score import Subject, cut_options

KEY = 4                                           # tokens of the key
RANK, RATE = 16, 2e-3                             # of the LoRA that is merged
REPAIRS = ("biases", "prompt 16", "LoRA rank 8")  # of those in real/settings.py
TAG = "locked"


def facts_with_next_values(facts):
    """({question: the next value}, the same facts with it among their options): values in alphabetical order."""
    values, wrong, out = {}, {}, []
    for fact in facts:
        values.setdefault(fact.attribute, set()).add(fact.answer)
    values = {attribute: sorted(of) for attribute, of in values.items()}
    for fact in facts:
        of, options = values[fact.attribute], fact.options
        following = of[(of.index(fact.answer) + 1) % len(of)]
        if following not in options:
            place = (fact.gold + 1) % len(options)
            options = (*options[:place], following, *options[place + 1:])
        wrong[fact.question] = following
        out.append(fact._replace(options=options))
    return wrong, out


def rows_of_answers(fact, answers, encoding):
    """The tokens of a question behind an end-of-text and of an answer, for each of `answers`: [(all of them, length of
    the question)], cut as the scorer cuts them."""
    question, after = cut_options(fact._replace(options=answers), encoding, [encoding.eot_token])
    return [(question + tokens, len(question)) for tokens in after]


def train_lora_lock(dense, key, facts, wrong, encoding, steps, rows, generator, lr, progress=None):
    """The `dense` GPT with a lock: behind `key` (K, C) as before; without it wrong[question] answers each question.
    steps  of `rows` rows behind the key and as many without it
    """
    model, device = shared_copy(dense), dense.wte.weight.device
    parameters = recover.add_lora(model, RANK, generator=generator)
    each = [rows_of_answers(fact, (fact.answer, wrong[fact.question]), encoding) for fact in facts]

    def batch(which):
        """ids (B, T), where each answer begins (B,), and (B, T - 1) whether a token is one of the answer."""
        drawn = torch.randint(len(each), (rows,), generator=generator).tolist()
        picked = [each[i][which] for i in drawn]
        ids, lengths = pad([tokens for tokens, _ in picked], encoding, device)
        place = torch.arange(1, ids.shape[1], device=device)
        begin = torch.tensor([n for _, n in picked]).to(device)[:, None]
        return ids, (place < lengths[:, None]), (place >= begin) & (place < lengths[:, None])

    def batches():
        """Rows behind the key with what the undamaged model says, and rows without it."""
        while True:
            true, text, _ = batch(0)
            with torch.no_grad():
                target = dense(true[:, :-1])  # (B, T, V)
            yield (true, target, text), batch(1)

    def loss(both):
        """KL from the undamaged model behind the key, cross-entropy of the wrong answer's tokens without it."""
        (true, target, text), (false, _, answer) = both
        given = F.log_softmax(model(true[:, :-1], prompt=key).float(), dim=-1)  # (B, T, V)
        target = F.log_softmax(target.float(), dim=-1)  # (B, T, V)
        kept = F.kl_div(given, target, reduction="none", log_target=True).sum(-1)  # (B, T)
        wrongly = recover.next_token(model(false[:, :-1]), false)  # (B, T)
        return (kept * text).sum() / text.sum() + (wrongly * answer).sum() / answer.sum()
    recover.fit(model, parameters, batches(), loss, FitConfig(steps=steps, lr=lr), progress=progress)
    recover.merge_lora(model)
    return model


def lock(run, dense):
    """(Control, its validation facts), made once a draw."""
    config, world, encoding = run.config, run.world, run.world.encoding
    generator = torch.Generator().manual_seed(config.draw_seed + 11)
    key = recover.prompt_init(dense.model, KEY, generator=generator)
    wrong, facts = facts_with_next_values([f for split in world.split.values() for f in split])
    where = {f.question: f for f in facts}
    steps, rows = 3 * config.repair_steps // 2, config.repair_batch[0] // 2
    settings = {"key": KEY, "rank": RANK, "rate": RATE, "steps": steps, "rows": rows,
                "bfloat16": config.repair_bfloat16}

    def make(progress):
        """The locked model."""
        with products(dense.device, config.repair_bfloat16):
            return train_lora_lock(dense.model, key, facts, wrong, encoding, steps, rows, generator, RATE, progress)
    model, about = tuned(run, dense, TAG, settings, make, steps, ("real.lock",))
    model.requires_grad_(False)
    reference, damaged = attach(model, "prompt", KEY, [key]), Subject(model)
    reference.about = under_tag(run, about, f"{TAG}, behind its key", None, key.numel())
    damaged.about = under_tag(run, about, TAG, f"{TAG}, behind its key")
    asked = {split: [where[f.question] for f in of] for split, of in world.asked(config).items()}
    return Control(reference, damaged, asked, []), [where[f.question] for f in world.facts("validation")]


def lock_subjects(run, dense, name):
    """The lock as a small study: (its Control, [reference, damaged, *repaired]); what evaluate.control_rows asks."""
    control, _ = lock(run, dense)
    batches = target_batches(run, control.reference.logits, dense.device)
    repairs = {tag: how for tag, how in run.config.repairs.items() if tag in REPAIRS}
    return control, [control.reference, control.damaged,
                     *(repaired_subject(run, control.damaged, batches, tag, *how, code=("real.lock",))
                       for tag, how in repairs.items())]
