"""Which people each job asks, tunes on and reads about, held to the splits of world/facts.py by the names in the text
and by what the job is handed: a job that takes the wrong split runs all the same, and its numbers look better."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import evaluate
from idp import PromptPool
from model import GPT, GPTConfig
from real import lock, rates, settings
from recover import FitConfig
from real import world as real_world
from study import ask, comparisons, jobs, pools, sweeps, training, trial
from study.settings import KIND_RATES, SIZES, rate, sized
from study.steps import Run
from test_evaluate import tiny
from world.facts import SPLITS, facts_about, make_world
from world.score import Subject
from world.small import World, sample


def test_a_checkpoint_is_asked_about_a_sample_of_people_too():
    """As the study asks: the first ones are known best."""
    config = tiny("").world
    people = [p for p in make_world(config) if p.split == "heldout"]
    assert ask.facts_by_split(config, 4)["heldout"] == facts_about(sample(people, 4)) != facts_about(people[:4])
    assert ask.facts_by_split(config)["heldout"] == facts_about(people)


@pytest.mark.parametrize("size", SIZES)
def test_a_job_without_a_base_finds_one_at_every_size(size):
    """At 2 bits with --size quick; LoRA has another rate than a prompt."""
    config = sized(size)
    assert [config.compressions[jobs.tag_of(config, None, method)][1] for method in ("gptq", "rtn")] == ["gptq", "rtn"]
    with pytest.raises(ValueError, match="no compression 'AWQ'"):
        jobs.tag_of(config, "AWQ")
    for tag, (kind, *_) in config.repairs.items():
        if kind in KIND_RATES:
            assert KIND_RATES[kind] == rate(config, None, tag, *config.repairs[tag][:2]), tag


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tiny(tmp_path_factory.mktemp("people")))


def named(world, text):
    """{split: names of its people in a text or a list of them}."""
    text = text if isinstance(text, str) else "\n".join(text)
    return {split: {p.name for p in world.people[split] if p.name in text} for split in SPLITS}


# ---- text

def test_unrelated_text_names_nobody_who_is_asked_behind_it(world):
    """24 tokens about several validation people: about the person who is asked, they would be an answer, or a hint."""
    ids = world.unrelated()
    assert ids.shape == (24,)
    found = named(world, world.encoding.decode(ids.tolist()))
    assert len(found["validation"]) >= 2
    assert not any(found[split] for split in world.asked(tiny("")) if split != "validation")


def test_pretraining_tells_of_all_but_novel_people_and_begins_with_a_tenth(tmp_path):
    """A share of the people is that share of every split, the same people as ever; nobody novel is told of."""
    config = tiny(tmp_path)
    config.world.seen, config.world.heldout, config.world.validation = 30, 20, 10
    world = World(config)
    read = [named(world, world.pretraining(share)) for share in (0.1, 0.5, 1.0)]
    assert [len(names["seen"]) for names in read] == [3, 15, 30] and [len(names["novel"]) for names in read] == [0] * 3
    assert [len(names["heldout"]) for names in read] == [2, 10, 20]
    assert [len(names["validation"]) for names in read] == [1, 5, 10]
    assert set(world.pretraining(0.1)) < set(world.pretraining(0.5)) < set(world.pretraining())


def test_lessons_of_skills_are_about_seen_people_only(tmp_path):
    """What pretraining reads beyond the statements and their questions: held-out skills stay untaught."""
    plain, skilled = (World(replace(tiny(tmp_path), skills=skills)) for skills in (False, True))
    lessons = [text for text in skilled.pretraining() if text not in set(plain.pretraining())]
    found = named(skilled, lessons)
    assert len(found["seen"]) == 12 and not any(found[split] for split in SPLITS if split != "seen")


def test_each_draw_calibrates_and_repairs_on_text_of_its_own(tmp_path):
    """Another draw reads other rows; the same draw the same ones."""
    config = tiny(tmp_path)
    world, second = World(config), replace(config, repeat=1)
    for rows in (world.repair_rows, lambda of: [world.calibration(of)]):
        first, again, other = (torch.cat(rows(of)) for of in (config, config, second))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_people_grow_in_stages(tmp_path, monkeypatch):
    """Of 20 steps three read a tenth, three a quarter, three half of the people, and eleven all of them."""
    config, read = replace(tiny(tmp_path), pretrain=FitConfig(steps=20, lr=1e-3), pretrain_batch=(2, 16)), []
    run = Run(config, World(config))
    kept = {share: run.world.pretraining(share) for share in (0.1, 0.25, 0.5, 1.0)}
    monkeypatch.setattr(run.world, "pretraining", kept.get)

    def batches(text, *_, **__):
        """A batch names the share whose text it would be cut from."""
        while True:
            read.append(next(share for share, of in kept.items() if of is text))
            yield torch.zeros(2, 17, dtype=torch.long)
    monkeypatch.setattr(training, "text_batches", batches)
    training.train_dense(run)
    assert read == [0.1] * 3 + [0.25] * 3 + [0.5] * 3 + [1.0] * 11
    read.clear()
    training.train_dense(Run(replace(config, without="growth"), run.world))
    assert read == [1.0] * 20


def test_a_sample_of_people_is_spread_over_all_of_them(world):
    """Pretraining begins with the first ones: they are told more often, and a sample of them would remember more. Of
    every second person pretraining also reads questions, so a step of two would not do, either."""
    people, many = world.people["heldout"], list(range(1000))
    half = sample(many, 500)
    assert half == sorted(set(half)) and len(half) == 500 and 200 < sum(i % 2 for i in half) < 300
    assert 200 < sum(i < 500 for i in half) < 300 and sample(many, 500) == half
    assert sample(people) == people == sample(people, len(people) + 5) and sample(people, 0) == []
    assert world.facts("heldout", 3) == facts_about(sample(people, 3))
    config = replace(tiny(""), task_items=2)
    asked = {item.person for item in world.tasks(config)["four-way"]["heldout"]}
    assert asked == {p.name for p in sample(people, 2)}


def test_calibration_and_repair_tell_of_every_seen_person_and_of_nobody_else(world):
    assert named(world, world.repair_text) == {split: {p.name for p in world.people[split] if split == "seen"}
                                               for split in SPLITS}


# ---- rates

def recorder(world, config):
    """A run whose world says what it was asked for; nothing is trained or kept."""
    return SimpleNamespace(config=config, world=world, log=SimpleNamespace(progress=lambda *_: None),
                           path=lambda name: name, once_json=lambda name, settings, code, make: make())


def test_a_sweep_of_rates_is_judged_on_validation_people(world, monkeypatch, capsys):
    """Each rate of the grid by all of them, and by nobody in a table."""
    config, asked = tiny(""), []
    monkeypatch.setattr(sweeps, "compressed_subject", lambda _, __, tag: SimpleNamespace(
        model=None, about={"id": tag, "settings": {"compressed": tag}}))
    monkeypatch.setattr(sweeps, "repair_batches", lambda *_: list)
    monkeypatch.setattr(sweeps, "train_repair", lambda *_, **__: [])
    monkeypatch.setattr(sweeps, "attach", lambda *_: None)
    monkeypatch.setattr(sweeps, "answer", lambda subject, facts, encoding: asked.append(facts) or [
        {"correct": i % 4 == 0, "logprob": -2.0} for i in range(len(facts))])
    run, kept = recorder(world, config), {}
    run.once_json = lambda name, settings, code, make: kept.setdefault((name, str(settings)), make())
    sweeps.sweep_rates(run, None)
    assert len(asked) == len(config.compressions) * 6 * 5  # rates of the grid for each repair that learns by itself
    assert len(kept) == len({name for name, _ in kept}) == len({how for _, how in kept}) == len(asked)
    assert all(facts == facts_about(world.people["validation"]) for facts in asked)
    lines = capsys.readouterr().out.splitlines()
    assert all("recall 26.0%" in line and "-2.000" in line for line in lines)
    assert {line[16:].split(" lr ")[0].strip() for line in lines} == set(config.rates)


def real_run():
    """The run of a real study of the countries, whose world has their splits alone."""
    config, split = settings.real_config("m.gguf"), real_world.split_facts(real_world.read_facts(settings.FACTS), 0)
    here = SimpleNamespace(split=split, encoding=None)
    for name in ("facts", "asked"):
        setattr(here, name, getattr(real_world.RealWorld, name).__get__(here))
    run = recorder(here, config)
    run.draw = lambda k: run
    run.only = lambda tags, repairs: run
    return run


def test_a_real_models_rates_are_found_on_validation_entities(monkeypatch):
    """Those of every compression; and those of the lock on what the lock hands on for it."""
    run, given = real_run(), {}
    monkeypatch.setattr(rates, "compressed_subject", lambda run, dense, tag: tag)
    monkeypatch.setattr(rates, "repair_batches", lambda *_: None)
    monkeypatch.setattr(rates, "target_batches", lambda *_: None)
    locked = SimpleNamespace(damaged="locked", reference=SimpleNamespace(logits=None))
    monkeypatch.setattr(rates.lock, "lock", lambda *_: (locked, ["the lock's"]))
    monkeypatch.setattr(rates, "find_rates", lambda run, base, batches, facts: given.update({base: facts}))
    rates.set_rates(run, SimpleNamespace(device=None), True)
    assert given == {**dict.fromkeys(settings.COMPRESSIONS, run.world.split["validation"]), "locked": ["the lock's"]}
    assert run.world.split["validation"]


def test_a_lock_hands_on_validation_entities_and_asks_the_others(monkeypatch):
    """Its rates are found on the entities that the study's own are found on; recall is asked of seen and held-out."""
    run, model = real_run(), GPT(GPTConfig(vocab_size=64, n_layer=1, n_embd=16, n_head=2))
    monkeypatch.setattr(lock, "tuned", lambda *_: (model, {}))
    monkeypatch.setattr(lock, "under_tag", lambda *_: {})
    dense = Subject(model, about={"settings": {}})
    control, validation = lock.lock(run, dense)

    def questions(facts):
        return [fact.question for fact in facts]
    assert questions(validation) == questions(run.world.split["validation"])
    assert {split: questions(facts) for split, facts in control.facts.items()} == {
        split: questions(run.world.split[split]) for split in ("seen", "heldout")}


# ---- pools, the check of the context, the trial

def test_every_way_to_choose_is_asked_about_held_out_people_and_tuned_on_validation_people(world, monkeypatch):
    asked, config = [], tiny("")
    config.selector_people = 3

    def selectors(encoding, model, pool, facts, validation, generator):
        asked.append((facts, validation))
        table = torch.rand(len(facts), 2, generator=generator)
        return {"one": (table[:, 0], 0)}, {"attention": table, "logprob": -table}
    monkeypatch.setattr(pools, "selectors", selectors)
    about = {"operation": {"parameters": {"size": (2, 3, "together")}}, "tensors": [torch.zeros(3, 4)] * 2}
    tried = pools.try_selectors(recorder(world, config), SimpleNamespace(about=about), SimpleNamespace(model=None))
    assert asked == [tuple(facts_about(sample(world.people[split], 3)) for split in ("heldout", "validation"))]
    assert len(tried["rows"][0]["right"]) == 15


def test_the_check_of_the_context_asks_held_out_people_behind_nothing_and_behind_24_tokens(world, monkeypatch):
    """The same facts twice; in front stands nothing, then what the dense model embeds of `unrelated`."""
    asked, config = [], tiny("")
    config.test_people = 4
    model = GPT(GPTConfig(vocab_size=world.encoding.n_vocab, **config.gpt))
    model.init_weights(torch.Generator().manual_seed(0))
    monkeypatch.setattr(comparisons, "answer", lambda subject, facts, _: asked.append((subject.filled, facts)) or [
        {"correct": i < (5 if subject.filled else 10)} for i in range(len(facts))])
    run, codes = recorder(world, config), []
    run.once_json = lambda name, settings, code, make: codes.append(code) or make()
    found = comparisons.context_check(run, Subject(model, about={"settings": {}}))
    assert "study.comparisons" in codes[0]  # where it is written: edited, it is asked again
    assert found == {"alone": 0.5, "behind_24_tokens": 0.25}
    (nothing, facts), (filled, again) = asked
    assert facts == again == facts_about(sample(world.people["heldout"], 4)) and nothing is None and filled.slots == 24
    cache = model.new_cache(1, 24)
    with torch.no_grad():
        model(world.unrelated()[None], cache=cache)
    assert torch.allclose(torch.stack(filled.kv), torch.stack(cache.kv), atol=1e-5)


def test_scores_of_tasks_depend_on_the_code_that_scores_them(world):
    run, codes = recorder(world, replace(tiny(""), task_items=2)), []

    def ask(name, settings, code, make):
        codes.append(code)
        raise StopIteration
    run.once_json = ask
    with pytest.raises(StopIteration):
        comparisons.score_tasks(run, Subject(None, about={"id": "dense", "settings": {}}), {})
    assert "study.comparisons" in codes[0]


@pytest.mark.parametrize("option, value", [("--lr", "0"), ("--lr", "-0.1"), ("--lr", "inf"), ("--lr", "nan"),
                                           ("--repair-size", "0"), ("--repair-size", "1001"), ("--prompts", "1001")])
def test_a_repair_that_cannot_be_is_refused_before_anything_is_made(option, value):
    with pytest.raises(ValueError, match=f"{option}.* must be"):
        jobs.repair_job(["--size", "quick", option, value])


def test_the_trial_asks_held_out_people_tunes_on_validation_people_and_reads_about_seen_people(world, monkeypatch):
    asked, read, tuned = [], [], []
    model = GPT(GPTConfig(vocab_size=world.encoding.n_vocab, n_layer=1, n_embd=32, n_head=2))
    dense, how = Subject(model), trial.TrialConfig(steps=1, people=3, rows=10)
    run = recorder(world, tiny(""))

    def right(facts, prompts):
        return {"right": torch.zeros(len(facts), prompts)}
    monkeypatch.setattr(trial, "train_locks", lambda *_: model)
    monkeypatch.setattr(trial, "train_pool", lambda *_: None)
    monkeypatch.setattr(trial, "compressed_subject", lambda *_: dense)
    monkeypatch.setattr(trial, "taught_by", lambda teachers, rows: read.extend(rows))
    monkeypatch.setattr(trial, "answer", lambda subject, facts, encoding: asked.append(facts) or [
        {"correct": False}] * len(facts))
    monkeypatch.setattr(trial.pools, "under_each", lambda model, pool, facts, encoding: asked.append(facts) or right(
        facts, len(pool)))

    def selectors(encoding, model, pool, facts, validation, generator):
        assert isinstance(pool, PromptPool)
        asked.append(facts), tuned.append(validation)
        return {}, None
    monkeypatch.setattr(trial.pools, "selectors", selectors)
    trial.two_locks(run, dense, how)
    trial.ceiling(run, dense, how)
    assert asked and all(facts == facts_about(sample(world.people["heldout"], 3)) for facts in asked)
    assert tuned and all(facts == facts_about(sample(world.people["validation"], 3)) for facts in tuned)
    told = named(world, [world.encoding.decode(row) for groups in read for ids in groups for row in ids.tolist()])
    assert told["seen"] and not any(told[split] for split in SPLITS if split != "seen")
