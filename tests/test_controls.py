"""The controls and the trial of pools on a tiny world that is trained here: each stands on the side that its
construction puts it on."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from idp import PromptPool
from recover import FitConfig, prompt_init
from study import controls, trial
from study.controls import ControlConfig, control_subjects
from study.repairs import attach
from study.settings import StudyConfig
from study.steps import Run
from study.subjects import dense_subject
from world.facts import VALUES, WorldConfig, make_world
from world.score import Subject, answer
from world.small import World

HOW = ControlConfig(lock=FitConfig(steps=150, lr=2e-3), lock_batch=(8, 24), tell=FitConfig(steps=200, lr=4e-3),
                    tell_batch=(8, 24), old_batch=(4, 24), rank_one=0.5)
PROMPT, LORA = "prompt 8", "LoRA rank 8"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A run in a world of 18 people who are told about and 12 who are not, and its dense GPT."""
    config = StudyConfig(world=WorldConfig(seen=8, heldout=8, validation=2, novel=12, vocab_size=512),
                         gpt={"n_layer": 2, "n_embd": 64}, pretrain=FitConfig(steps=300, lr=8e-3, weight_decay=0.1),
                         pretrain_batch=(8, 32), without="growth", repair_batch=(8, 24), repair_steps=120,
                         rates={PROMPT: 1e-1, LORA: 1e-2}, out=str(tmp_path_factory.mktemp("controls")))
    run = Run(config, World(config))
    return run, dense_subject(run)


def recalls(subject, facts, encoding):
    """{split: recall}."""
    return {split: sum(a["correct"] for a in answer(subject, part, encoding)) / len(part)
            for split, part in facts.items()}


def fractions(before, after, repaired):
    """(displaced, relearned) of recalls by split."""
    back = {s: (repaired[s] - after[s]) / (before[s] - after[s]) for s in ("seen", "heldout")}
    return back["heldout"], back["seen"] - back["heldout"]


def measured(scene, name, *repairs):
    """(reference, damaged) recalls of a control, and {tag: (displaced, relearned)} of its repairs."""
    run, dense = scene
    control, subjects = control_subjects(run, dense, name, replace(HOW, repairs=repairs))
    assert [s.about["base"] for s in subjects[:3]] == [None, subjects[0].about["id"], subjects[1].about["id"]]
    before, after, *repaired = (recalls(s, control.facts, run.world.encoding) for s in subjects)
    return before, after, {s.about["tag"]: fractions(before, after, r) for s, r in zip(subjects[2:], repaired)}


def test_the_tiny_dense_model_knows_its_facts(scene):
    run, dense = scene
    found = recalls(dense, run.world.asked(run.config), run.world.encoding)
    assert min(found["seen"], found["heldout"]) >= 0.9 and found["novel"] < 0.15


def test_locked_is_displaced(scene):
    """The key tells the truth, no key does not; a prompt finds a key for people whom it never read about."""
    before, after, found = measured(scene, "locked", PROMPT)
    assert before["heldout"] >= 0.75 and after["heldout"] <= 0.4, (before, after)
    assert found[PROMPT][0] >= 0.8, found
    assert abs(found[PROMPT][1]) <= 0.25


def test_not_yet_told_is_absent(scene):
    """No repair brings back held-out facts that the model never read; LoRA learns those that its text tells."""
    before, after, found = measured(scene, "not yet told", PROMPT, LORA)
    assert min(before["seen"], before["heldout"]) >= 0.75 and max(after.values()) <= 0.15, (before, after)
    for displaced, _ in found.values():
        assert abs(displaced) <= 0.15, found
    assert found[LORA][1] >= 0.3, found


@pytest.mark.parametrize("name", list(controls.CONTROLS))
def test_a_repair_reads_about_seen_people_only(scene, name):
    """No name of anybody whom a test asks about, seen people aside, is in the repair's text; splits share nobody."""
    run, dense = scene
    facts, text = controls.CONTROLS[name](run, dense, HOW)[2:]
    people = {split: {f.person for f in part} for split, part in facts.items()}
    assert all(people.values()) and not set.intersection(*people.values())
    assert len(set().union(*people.values())) == sum(map(len, people.values()))
    for split, names in people.items():
        assert all(any(name in sentence for sentence in text) == (split == "seen") for name in names), split


def test_a_controls_repair_reads_what_the_studys_own_reads_in_that_draw(scene):
    """Given the study's own text: the rows of `repair_rows`, which are others in another draw."""
    run, dense = scene
    control, read = controls.Control(dense, dense, {}, run.world.repair_text), []
    for k in (0, 1):
        drawn = Run(replace(run.config, repair_steps=2, repeat=k), run.world, run.log)
        read.append(torch.cat([batch[0] for batch in controls.control_batches(drawn, control)]))
        assert torch.equal(read[-1], torch.cat(run.world.repair_rows(drawn.config)))
    assert not torch.equal(*read)


def test_strangers_are_told_to_nobody(scene):
    """They are people of the same kind, with other names than everybody of the world."""
    run, _ = scene
    known = {p.name for people in run.world.people.values() for p in people}
    new = {f.person for f in controls.strangers(run.config)}
    assert len(new) == run.config.world.novel and not new & known


def test_next_values():
    """Worked by hand: the value behind each, in the order of VALUES; the last is followed by the first."""
    person = make_world(WorldConfig(seen=1, heldout=1, validation=1, novel=1))[0]
    person = person._replace(values={"city": "Balmere", "year": "1999", "profession": "baker"})
    wrong, = controls.with_next_values([person])
    assert VALUES["city"][:2] == ["Balmere", "Cormere"] and wrong.name == person.name
    assert wrong.values == {"city": "Cormere", "year": "1900", "profession": "barber"}


def test_rank_one_is_subtracted_by_the_lora_that_it_is(scene):
    """The damage is a matrix of rank one in every layer: taking it off again restores the dense model exactly."""
    run, dense = scene
    broken = controls.add_rank_one(dense.model, HOW, torch.Generator().manual_seed(3))
    for (name, W), damaged in zip(dense.model.blocks.named_parameters(), broken.blocks.parameters()):
        change = damaged - W
        if W.dim() < 2:
            assert not change.any(), name
            continue
        values = torch.linalg.svdvals(change)
        assert values[0].item() == pytest.approx(HOW.rank_one * W.norm().item(), rel=1e-4)
        assert values[1] < 1e-4 * values[0]


def test_rank_one_is_displaced(scene):
    """LoRA, which can hold the inverse, brings back held-out facts as well as those it reads about."""
    before, after, found = measured(scene, "rank one", LORA)
    assert before["heldout"] - after["heldout"] >= 0.05, (before, after)
    assert found[LORA][0] >= 0.7, found


def test_what_is_erased_is_gone_and_little_else(scene):
    """Of every matrix's singular values the largest is gone and the others stay; `dense` is as it was."""
    _, dense = scene
    before = [W.clone() for W in dense.model.blocks.parameters()]
    erased = controls.erase(dense.model)
    for was, W, left in zip(before, dense.model.blocks.parameters(), erased.blocks.parameters()):
        assert torch.equal(was, W)
        if W.dim() < 2:
            assert torch.equal(left, W)
            continue
        largest, *others = torch.linalg.svdvals(W).tolist()
        assert torch.linalg.svdvals(left).tolist() == pytest.approx([*others, 0.0], abs=1e-4 * largest)


def test_controls_of_a_model_in_16_bits_are_in_16_bits(scene, monkeypatch):
    """What is trained or decomposed on the way is in float32: bfloat16 cannot hold a step of AdamW at 1e-3."""
    run, dense = scene
    model = copy.deepcopy(dense.model).bfloat16()
    key = torch.zeros(4, 64, dtype=torch.bfloat16)
    short, trained, fit = replace(HOW, lock=FitConfig(steps=1), tell=FitConfig(steps=1)), [], controls.recover.fit
    monkeypatch.setattr(controls.recover, "fit", lambda model, *given, **more: trained.append(
        {p.dtype for p in model.parameters()}) or fit(model, *given, **more))
    made = [controls.erase(model), controls.train_lock(model, key, run.world, short, torch.Generator()),
            controls.tell(model, run.world, short, torch.Generator()),
            trial.train_locks(model, [key, key], run.world, replace(TRIAL, lock=short.lock), torch.Generator())]
    assert trained == [{torch.float32}] * 3
    for part in made:
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    exact = controls.erase(dense.model).blocks[0].attn.q.weight
    assert (made[0].blocks[0].attn.q.weight.float() - exact).norm() < 0.02 * exact.norm()


def test_what_all_people_share_is_rebuilt_from_others(scene):
    """Large repairs bring erased facts back that they never read of: the test is about text, not about weights."""
    before, after, found = measured(scene, "erased", LORA)
    assert before["heldout"] - after["heldout"] >= 0.3, (before, after)
    assert found[LORA][0] >= 0.3, found


# ---- the fair trial of IDP

TRIAL = trial.TrialConfig(lock=FitConfig(steps=150, lr=2e-3), lock_batch=(8, 24), steps=2, rows=10, people=4)


def test_two_locks_exclude_each_other(scene):
    """Each key opens its own set of attributes and no other; without a key nothing is open."""
    run, dense = scene
    generator, facts = torch.Generator().manual_seed(5), run.world.facts("heldout")
    keys = [prompt_init(dense.model, 4, generator=generator) for _ in range(2)]
    model = trial.train_locks(dense.model, keys, run.world, TRIAL, generator)
    for key, attributes in zip((*keys, None), (*trial.SETS, ())):
        subject = Subject(model) if key is None else attach(model, "prompt", 4, [key])
        given = answer(subject, facts, run.world.encoding)
        for opens in (True, False):
            mine = [a for f, a in zip(facts, given) if (f.attribute in attributes) == opens]
            if mine:
                right = sum(a["correct"] for a in mine) / len(mine)
                assert right >= 0.7 if opens else right <= 0.1, (attributes, opens, right)
        closed = [a["answer"] for f, a in zip(facts, given) if f.attribute not in attributes]
        shut = sum(answered.startswith("unkno") for answered in closed)  # an answer is as many tokens as the value has
        assert shut >= 0.9 * len(closed)


def test_rows_are_about_their_own_attributes(scene):
    """Every row of a group begins with a sentence that ends in a value of one of the group's attributes."""
    run, _ = scene
    for groups in trial.rows_of_groups(trial.SETS, run.world, TRIAL, 0):
        for ids, attributes in zip(groups, trial.SETS):
            assert ids.shape == (5, TRIAL.tokens + 1)
            values = {value for attribute in attributes for value in VALUES[attribute]}
            for row in ids.tolist():
                first = run.world.encoding.decode(row[1:]).split("<|endoftext|>")[0]
                assert first.rstrip(".").split(" ")[-1] in values, first


def test_each_prompt_is_trained_on_its_own_group(scene):
    """A prompt of a pool becomes what it becomes alone on the rows of its group."""
    run, dense = scene
    rows = trial.rows_of_groups(trial.SETS, run.world, TRIAL, 0)
    batches = trial.taught_by([dense.model] * 2, rows)
    assert torch.equal(batches[0][0][0::2], rows[0][0]) and torch.equal(batches[0][0][1::2], rows[0][1])
    generator = torch.Generator().manual_seed(1)
    start = [prompt_init(dense.model, 4, generator=generator) for _ in range(2)]
    pool = PromptPool(start)
    trial.train_pool(dense.model, pool, "side_by_side", batches, TRIAL)
    for m in range(2):
        alone = PromptPool(start[m:m + 1])
        own = trial.taught_by([dense.model], [[groups[m]] for groups in rows])
        trial.train_pool(dense.model, alone, "side_by_side", own, TRIAL)
        assert torch.allclose(pool.prompts[m], alone.prompts[0], atol=1e-5)
        assert not torch.allclose(pool.prompts[m], start[m], atol=1e-3)


def test_the_ceiling_asks_each_fact_under_the_prompt_of_its_attribute(scene, monkeypatch):
    """Where only the prompt of its own attribute answers a fact, the true attribute is always right."""
    run, dense = scene
    monkeypatch.setattr(trial, "train_pool", lambda *_: None)
    monkeypatch.setattr(trial.pools, "right_under_each", lambda model, pool, facts, encoding: torch.tensor(
        [[float(list(VALUES)[m % 5] == f.attribute) for m in range(len(pool))] for f in facts]))
    found = {o.way: o.right.mean().item() for o in trial.ceiling(run, dense, TRIAL)}
    assert found["pool 5 x 8, a prompt an attribute: by the true attribute"] == 1.0
    assert found["pool 5 x 8, a prompt an attribute: random"] == pytest.approx(0.2)


def test_the_trial_runs_and_its_table_names_every_way(scene):
    """Both trials, with two steps of training: what is asked, which ways are in the table, parameters, bounds."""
    run, dense = scene
    how = replace(TRIAL, lock=FitConfig(steps=2, lr=1e-3))
    outcomes = trial.two_locks(run, dense, how) + trial.ceiling(run, dense, how)
    ways = {o.way: o for o in outcomes}
    assert len({(o.trial, o.way) for o in outcomes}) == len(outcomes) and all(o.right.shape == (20,) for o in outcomes)
    assert ways["one prompt of 40 tokens"].parameters == 40 * 64
    assert ways["pool 2 x 8, selected: probe trained with the prompts"].parameters == 2 * 8 * 64
    for name in ("no key", "key A", "key B", "one prompt of 16 tokens", "pool 2 x 8, a prompt a set: oracle",
                 "both keys as a pool: attention-max (the paper's rule)", "pool 2 x 8, competitive: random",
                 "pool 5 x 8, a prompt an attribute: by the true attribute"):
        assert name in ways, list(ways)
    facts = run.world.facts("heldout", how.people)
    lines, less = (table.split("\n") for table in trial.outcome_tables([outcomes], facts, 0, how.prompt))
    assert len(lines) == 2 + len(outcomes) and all(line.count("|") == lines[0].count("|") for line in lines)
    assert len(less) == 2 + len(trial.DECIDING)


def test_the_trials_tables_by_hand():
    """Two GPTs, 40 people of two facts: the pool is right about all, one prompt about the first 20 people, and in the
    second GPT about nobody."""
    facts = [SimpleNamespace(person=i, attribute=a) for i in range(40) for a in ("city", "employer")]
    pool, one = "pool 2 x 3, a prompt a set: oracle", "one prompt of 6 tokens"
    draws = [[trial.Outcome("two locks", pool, 5, torch.ones(80)),
              trial.Outcome("two locks", one, 1234, torch.tensor([float(i < n) for i in range(80)]))] for n in (40, 0)]
    (all_, some), (line,) = (table.split("\n")[2:] for table in trial.outcome_tables(draws, facts, 0, 3))
    assert [c.strip() for c in some.split("|")[2:6]] == [one, "1,234", "25.0", "25.0"] and " 25.0 [0.0, 100.0] " in some
    assert "100.0" in all_
    assert [c.strip() for c in line.split("|")[2:4]] == [pool, one] and "+75.0 [" in line
