"""
The study: train, compress, repair, and answer: is the knowledge forgotten or displaced?

    python evaluate.py                  # the whole study: out/results.json, tables.md, report.html
    python evaluate.py --quick          # the same path through a smaller world, in a minute
    python evaluate.py --seeds 3        # three dense GPTs, each compressed and repaired anew
    python evaluate.py --full           # more rivals: prefixes, pools trained in other ways, ...
    python evaluate.py --size medium    # a second GPT, also taught to read, compare and follow
    python -m study                     # single steps, sweeps of one setting, the figure
    python -m real MODEL                # the same on a real language model

The hypothesis, written down first. People are split into seen (in the repair's text) and
held-out (never in it). With a(m, s) the recall of model m on split s,

    displaced = (a(repaired, held-out) - a(compressed, held-out))
                / (a(dense, held-out) - a(compressed, held-out))
    relearned = the same fraction on seen people, minus displaced

    H0  what compression took is forgotten: displaced = 0; a repair gains on the people in its text
    H1  it is displaced: displaced > 0, on people that no repair has read about

Displaced is what one repair brings back. What it does not bring back may still be there: verdicts
say "at least". Four controls (study/controls.py), damaged by construction, say what the test
answers where the truth is known. Every number has a 95 % interval over people and draws; every
model is compared with the one it was made from by an exact test that flips a person's facts
together; the study's comparisons are corrected together, and each control's (study/comparisons.py).
Four claims were written down after planning runs and before the reported ones (study/claims.py).
The verdicts in words follow from these alone.

Read it from the bottom: `study` makes every model and asks it (`every_model`, `ask`), so that each
is a row; then it passes over the finished rows for intervals, comparisons and verdicts.
"""
import argparse
import sys
from dataclasses import asdict
from functools import partial
from math import floor

from engine.script import guard  # before torch: Ctrl-C is one line

from study import beside, claims, inside, pools, progress, publish
from study.comparisons import (ANSWERS, add_tasks, comparisons, compressed_again, context_check,
                               noise_floor, score_tasks, task_items)
from study.controls import CONTROLS, control_subjects
from study.costs import costs
from study.overlap import same_facts
from study.repairs import answers, light
from study.settings import OPERATIONS, StudyConfig, config_of, job_parser
from study.shares import add_attributes, add_shares
from study.steps import Run, digest
from study.subjects import (compressed_subject, dense_of_draw, dense_subject, repair_batches,
                            repaired_subject)
from study.taskfiles import add_files
from world.score import perplexity
from world.small import World


# ---- every model is made and asked: a row each

def every_model(run, dense):
    """The Subjects of the study in the table's order: dense, each compression and its repairs."""
    yield dense
    batches = repair_batches(run, dense)
    for tag in run.config.compressions:
        base = compressed_subject(run, dense, tag)
        yield base
        for name, how in run.config.repairs.items():
            yield repaired_subject(run, base, batches, name, *how, dense=dense)


def ask(run, subject, asked, group="study"):
    """One model becomes a row: what it is, what it costs, what it answers to asked {split: facts}.

    group  "study", or the control that it belongs to: rows of a group share facts and one undamaged
           reference

    "answers", "entities" and "scores" hold single facts; `publish` takes them out of the row.
    """
    about, world = subject.about, run.world
    settings = {**about["settings"], "asked": digest(asked)}
    given = run.once_json(about["id"] + ".answers", settings, ANSWERS,
                          lambda: answers(subject, asked, world.encoding))
    entities = {split: [fact.person for fact in facts] for split, facts in asked.items()}
    return {**{key: about[key] for key in ("id", "tag", "base", "operation", "layers")},
            "kind": kind_of(about), "group": group, "metrics": costs(subject), "intervals": {},
            "verdict": None, "confirmed": None, "answers": given, "entities": entities}


def kind_of(about):
    """The undamaged reference, a control, a compressed model, or a repair of one of these two."""
    if about["base"] is None:
        return "dense" if about["tag"] == "dense" else "reference"
    if "kind" in about:
        return "repaired"
    return "control" if about["operation"]["name"] == "control" else "compressed"


def look_closer(run, row, subject, reference, base):
    """What else the study's own models are asked: perplexity, tasks, attention, ways to choose.

    reference  what happens `inside` the dense model; base: the Subject that was repaired
    """
    about, world, config = subject.about, run.world, run.config
    name, settings, people = about["id"], about["settings"], config.selector_people
    row["metrics"]["perplexity"] = run.once_json(
        name + ".perplexity", settings, ANSWERS, lambda: perplexity(light(subject), world.windows))
    row["scores"] = score_tasks(run, subject, row["answers"])
    row["similarity"] = run.once_json(
        name + ".inside", {**settings, "texts": len(world.inside)}, ("study.inside", *ANSWERS),
        lambda: inside.similarity(subject, reference, world.inside))
    if about.get("kind") == "idp" and people:
        tried = run.once_json(
            name + ".selectors", {**settings, "people": people}, ("study.pools", *ANSWERS),
            lambda: pools.try_selectors(run, subject, light(base)))
        row["idp"] = pools.with_intervals(tried, world.facts("heldout", people), config.seed)


def own_rows(run, dense):
    """(rows, Subjects) of the study's own models in one draw of `--seeds`.

    The first draw has all that is measured, the others have what intervals need.
    """
    asked, rows, made = run.world.asked(run.config), [], {}
    reference = None if run.config.repeat else inside.inside(dense, run.world.inside)
    for subject in every_model(run, dense):
        row, made[subject.about["id"]] = ask(run, subject, asked), subject
        if run.config.repeat == 0:
            look_closer(run, row, subject, reference, made.get(row["base"]))
        rows.append(row)
    return rows, list(made.values())


def control_rows(run, dense, name, make=control_subjects):
    """(rows, facts) of one control in one draw: reference, damaged model, repairs; what was asked.

    make  (run, dense, name) -> (Control, its Subjects)
    """
    control, subjects = make(run, dense, name)
    return [ask(run, subject, control.facts, name) for subject in subjects], control.facts


def every_draw(run, dense, rows_of):
    """([rows of each draw], what else the first draw gave) of rows_of(a draw's run, its dense).

    A model has the same id in every draw.
    """
    draws, first = [], None
    for k in range(run.config.seeds):
        drawn = run.draw(k)
        rows, more = rows_of(drawn, dense_of_draw(drawn, dense))
        draws.append(rows)
        if k == 0:
            first = more
        for row, same in zip(rows, draws[0]):
            row |= {"id": same["id"], "base": same["base"]}
    return draws, first


# ---- passes over the finished rows

def add_verdicts(rows, tests):
    """Whether a repair's held-out gain is confirmed, by its comparison (people, in these draws) and
    by the interval of displaced (people and draws); and the verdict in words."""
    recall = {m["id"]: m["metrics"]["recall_heldout"] for m in rows}
    for m in rows:
        if m["kind"] == "repaired":
            test, = [t for t in tests if (t["model"], t["what"]) == (m["id"], "recall, held-out")]
            lost = recall[rows[0]["id"]] - recall[m["base"]]
            low = m["intervals"]["displaced"][0]
            m["confirmed"] = bool(test["p_holm"] < 0.05 and test["difference"] > 0
                                  and (low is None or low > 0))
            reach = test["detectable"] / lost if test["detectable"] and lost > 0 else None
            m["verdict"] = verdict(m, test, reach)


def verdict(model, test, reach=None):
    """What one repaired model's test and intervals say in words: nothing in it is judged by hand.

    test   its comparison with the unrepaired model on held-out recall: for a claim its corrected p
           is below 0.05
    reach  the smallest displaced share that the test would find four times in five
    """
    value, bounds = model["metrics"], model["intervals"]
    if value["displaced"] is None or value["relearned"] is None:
        return "the damage took too little recall to divide by"
    (low, high), (least, most) = bounds["displaced"], bounds["relearned"]
    if test["p_holm"] >= 0.05:
        said = "no held-out gain is shown"
    elif test["difference"] < 0:
        said = "held-out facts are lost further"
    elif low <= 0:
        said = "a held-out gain in these draws, which others may not have"
    else:
        said = f"at least {floor(100 * low + 1e-9)}% came back"
    power = f", a share of {reach:.0%} would be found four times in five" if reach else ""
    again = "re-learned is above zero" if least > 0 else "re-learned is below zero"
    if least <= 0 <= most:
        again = "re-learned cannot be distinguished from zero"
    return (f"{said}: displaced {value['displaced']:.0%} [{low:.0%}, {high:.0%}]{power}; {again}, "
            f"{value['relearned']:.0%} [{least:.0%}, {most:.0%}]")


# ---- the main job

def study(run, dense, files=None, controls=CONTROLS, make_control=control_subjects,
          guess=lambda asked: (None, None)):
    """The whole study of one dense model: what results.json holds, rows with their single answers.

    files     {task: its questions} to ask of every model beside the facts, see study/taskfiles.py
    controls  the names of the kinds of damage that are known by construction, which `make_control`
              makes (control_rows)
    guess     (facts) -> ({split: whether each can be guessed}, what is said of it), as
              real/guess.py; by default there is nothing to guess by
    """
    config, asked, seed = run.config, run.world.asked(run.config), run.config.seed
    draws, subjects = every_draw(run, dense, own_rows)
    rows, items, (guessed, guessing) = draws[0], task_items(run), guess(asked)

    displaced = add_shares(draws, asked, seed, guessed)
    add_tasks(rows, items, seed + 6)
    add_attributes(rows, asked, seed)
    add_files(run, rows, subjects, files or {})
    compared = comparisons(draws, items)
    add_verdicts(rows, compared)
    texts = {m["id"]: m["similarity"]["texts"] for m in rows}
    for m in rows:
        if m["kind"] == "repaired":
            m["similarity"]["nearer"] = inside.nearer(texts[m["id"]], texts[m["base"]], seed + 8)
    for name in controls:
        known, facts = every_draw(run, dense, partial(control_rows, name=name, make=make_control))
        add_shares(known, facts, seed, guess(facts)[0])
        tests = comparisons(known, {})
        add_verdicts(known[0], tests)
        compared, rows = compared + tests, rows + known[0]

    context = context_check(run, dense)
    said = {"asked": digest(asked)}
    noise = run.once_json("noise", [said, *(s.about["settings"] for s in subjects)],
                          ("study.comparisons", *ANSWERS),
                          lambda: noise_floor(run, subjects,
                                              {m["id"]: m["answers"] for m in draws[0]}))
    return {
        "name": run.world.name, "settings": asdict(config),
        "hypothesis": "H0: displaced = 0. "
                      "H1: displaced > 0 on people that no repair has read about.",
        "headline": claims.headline(draws[0]),
        "claims": claims.claims(draws, displaced, config.claimed),
        "pairs": claims.pairs(draws[0], displaced, config.claimed),
        "same": same_facts(draws, asked["heldout"], seed + 9),
        "models": rows, "comparisons": compared, "noise": noise, "context": context,
        "guessing": guessing,
        "metrics": publish.describe_metrics(rows, files or {}),
        "files": {name: len(questions) for name, questions in (files or {}).items()},
        "operations": [{"name": name, "parameters": None, "description": what}
                       for name, what in OPERATIONS.items()]}


def backwards(run):
    """Make and ask every model from the last to the first: what the second process does."""
    for k in reversed(range(run.config.seeds)):
        drawn = run.draw(k)
        dense = dense_subject(drawn)
        if k == 0:  # what the study ends with
            context_check(drawn, dense)
            list(compressed_again(drawn, dense))
        for name in reversed(CONTROLS):
            control_rows(drawn, dense, name)
        for tag in reversed(run.config.compressions):
            own_rows(drawn.only([tag], reversed(run.config.repairs)), dense)


def main():
    """The script: see the top of this file, and --help."""
    parser = job_parser("evaluate.py", "Train, compress, repair, and say whether knowledge was "
                                       "forgotten or displaced.")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size",
                        help="the same as --size quick")
    parser.add_argument("--full", action="store_true",
                        help="more rivals: a prefix, LoRA of rank 1, pools trained in other ways,"
                             " repairs trained on the next token; biases for the controls")
    parser.add_argument("--seeds", type=int, default=StudyConfig.seeds, metavar="K",
                        help="make everything K times, from the dense GPT on")
    parser.add_argument("--all-tasks", action="store_true",
                        help="ask every model every task of items.py, not a few")
    parser.add_argument("--backwards", type=int, metavar="PARENT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.seeds <= 1000:
        raise ValueError(f"--seeds must be from 1 to 1000, got {args.seeds}")
    config = config_of(args, full=args.full, all_tasks=args.all_tasks, seeds=args.seeds)
    run = Run(config, World(config))
    if args.backwards:  # beside another process, see study/beside.py
        beside.quietly(run, args.backwards)
        return backwards(run)
    run.alone()
    run.describe_reuse()
    run.expect(progress.planned(run))
    with beside.second_process(run, sys.argv[1:]) as share_threads:
        dense = dense_subject(run)
        share_threads()
        results = study(run, dense)
    publish.publish(run, dense, results)


if __name__ == "__main__":
    guard(main)
