"""The statistics against closed forms and cases worked by hand; the study's steps; the script's edge."""
import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from checkpoints import load, save
from compress import compress
from kernels import PackedLinear
from model import GPT, GPTConfig
from study import comparisons, inside, publish, subjects, tables
from study.costs import costs
from engine.wrapping import Wrapper
from study.repairs import attach, unpacked
from study.settings import StudyConfig
from study.shares import add_attributes, add_shares, means
from study.statistics import exact_interval, recall_interval
from study.steps import Run
from study.subjects import dense_subject
from test_tables import cells
from world.facts import WorldConfig, facts_about, make_world, text_batches
from world.items import TASKS
from world.score import Subject, answer
from world.small import World

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def tiny(out):
    """A study of seconds: the same path, a world of a few people."""
    world = WorldConfig(seen=12, heldout=12, validation=10, novel=6, vocab_size=600)
    config = StudyConfig(world=world, out=str(out))
    config.gpt = {"n_layer": 1, "n_embd": 32, "n_head": 2}
    config.pretrain.steps, config.pretrain_batch, config.repair_steps = 8, (4, 32), 4
    config.calibration, config.repair_batch = (8, 32), (4, 24)
    config.task_items = 6
    return config


# ---- forgotten or displaced

def said(p=0.01, difference=0.1, displaced=(0.2, [0.1, 0.3]), relearned=(0.0, [-1.0, 1.0])):
    """A verdict in words."""
    names = ("displaced", "relearned")
    model = {"metrics": dict(zip(names, (displaced[0], relearned[0]))),
             "intervals": dict(zip(names, (displaced[1], relearned[1])))}
    return evaluate.verdict(model, {"p_holm": p, "difference": difference})


def test_a_gain_that_other_draws_may_not_have_is_no_share():
    """The test asks about these draws, the interval about others too: both must say so."""
    text = said(displaced=(0.2, [-0.1, 0.5]))
    assert text.startswith("a held-out gain in these draws") and "at least" not in text


@pytest.mark.parametrize("p, difference, word", [
    (0.04, 0.1, "at least 10% came back"), (0.04, -0.1, "lost further"),
    (0.06, 0.1, "no held-out gain"), (1.0, 0.0, "no held-out gain")])
def test_verdict_follows_from_the_corrected_test(p, difference, word):
    """The corrected p must be below 0.05; an interval alone claims nothing."""
    text = said(p, difference)
    assert word in text.split(":")[0] and "displaced 20% [10%, 30%]" in text and "cannot be distinguished" in text


def test_at_least_is_rounded_down():
    """A bound of 82.6 % shows 82 %; one of 29 %, which floats write as 28.999..., shows 29 %."""
    assert said(displaced=(0.9, [0.826, 1.0])).startswith("at least 82% came back: displaced 90% [83%, 100%]")
    assert said(displaced=(0.9, [0.29, 1.0])).startswith("at least 29% came back")


def test_nothing_lost_is_no_verdict():
    assert "too little" in said(displaced=(None, [None, None]))


def test_verdicts_say_what_they_could_have_seen():
    """Dense 90, compressed 50: a detectable difference of 4 points is a tenth of the 40 that were lost."""
    rows = [{"id": name, "base": base, "verdict": None, "kind": kind, "confirmed": None,
             "metrics": {"recall_heldout": r, "displaced": .5, "relearned": 0},
             "intervals": {"displaced": [.4, .6], "relearned": [-1, 1]}}
            for name, base, kind, r in (("dense", None, "dense", .9), ("small", "dense", "compressed", .5),
                                        ("back", "small", "repaired", .7))]
    test = {"model": "back", "what": "recall, held-out", "p_holm": 0.01, "difference": 0.2, "detectable": 0.04}
    evaluate.add_verdicts(rows, [{**test, "what": "recall, seen"}, test, {**test, "model": "small"}])
    assert [m["confirmed"] for m in rows] == [None, None, True] and rows[0]["verdict"] is None
    assert "at least 40% came back: displaced 50% [40%, 60%], a share of 10% would be found" in rows[2]["verdict"]
    for p_holm, difference, sure in ((0.05, 0.2, False), (0.049, 0.2, True), (0.01, -0.2, False), (1.0, 0.0, False)):
        evaluate.add_verdicts(rows, [{**test, "p_holm": p_holm, "difference": difference}])
        assert rows[2]["confirmed"] is sure, (p_holm, difference)  # a loss that is no luck is no gain
    for low, sure in ((0.0, False), (1e-9, True), (None, True)):  # None: too little was lost to divide by
        rows[2]["intervals"]["displaced"][0] = low
        rows[2]["metrics"]["displaced"] = None if low is None else 0.5
        evaluate.add_verdicts(rows, [test])
        assert rows[2]["confirmed"] is sure, low


def test_lessons_are_for_seen_people_only(tmp_path):
    """E8 with the second preset's lessons: calibration and repair rows name nobody hidden; all skills are asked."""
    config = tiny(tmp_path)
    config.skills, config.gpt["context"], config.repair_batch = True, 128, (4, 64)
    world = World(config)
    for rows in (torch.cat(world.repair_rows(config)), world.calibration(config)):
        assert world.check_leaks(rows) == len(rows) > 0
    for read in (world.repair_text, world.pretraining()):
        assert any("In short:" in text for text in read)
    run = Run(config, world)
    dense = dense_subject(run)
    row = evaluate.ask(run, dense, world.asked(config))
    evaluate.look_closer(run, row, dense, inside.inside(dense, world.inside), None)
    items = comparisons.task_items(run)
    assert row["scores"].keys() == items.keys() == {"trained", "unseen", *TASKS}
    comparisons.add_tasks([row], items, 0)
    assert {"f1", "precision", "recall"} == row["tasks"]["summary"]["novel"].keys()
    assert "2 facts" in {item.attribute for item in items["summary"]["novel"]}


def rows_of(*answers):
    """Rows as evaluate.ask makes them: dense, small, back."""
    return [{"id": name, "base": base, "metrics": {}, "intervals": {}, "answers": given}
            for (name, base), given in zip((("dense", None), ("small", "dense"), ("back", "small")), answers)]


def right(*counts, of=5):
    """Answers about people of whom so many of `of` facts each are right."""
    return [{"correct": i < n, "knowledge": float(i < n) - 1, "logprob": float(i < n) - 2}
            for n in counts for i in range(of)]


def test_means_keep_draws_and_columns_apart():
    """Two draws of three columns, each one number throughout: whoever is drawn, these are the means."""
    scores = np.arange(6.0).reshape(2, 3, 1).repeat(4, axis=2)
    for j, found in enumerate(means(scores, [SimpleNamespace(person=i) for i in range(4)], 0)):
        assert found.value == j + 1.5 and found.seeds.tolist() == [j, j + 3]
        assert found.samples.shape == (10_000, 2) and (found.samples == [j, j + 3]).all()


def test_recalls_and_fractions_of_a_table_worked_by_hand():
    """Forty people, five facts each, all alike: dense 5, compressed 2, repaired 3.5 on held-out; seen 5, 2.5, 5."""
    rows = rows_of(*({"seen": right(*20 * seen), "heldout": right(*20 * heldout), "novel": right(*20 * (0, 0))}
                     for seen, heldout in (((5, 5), (5, 5)), ((2, 3), (2, 2)), ((5, 5), (4, 3)))))
    facts = [SimpleNamespace(person=i) for i in range(40) for _ in range(5)]
    displaced = add_shares([rows], dict.fromkeys(("seen", "heldout", "novel"), facts), 0)
    assert [m["metrics"]["recall_heldout"] for m in rows] == pytest.approx([1.0, 0.4, 0.7])
    assert [m["metrics"]["recall_seen"] for m in rows] == pytest.approx([1.0, 0.5, 1.0])
    for m in rows[:2]:  # the reference, and what is made of it: neither repairs anything
        assert not {"displaced", "relearned", "gain_logprob"} & m["metrics"].keys() and m["id"] not in displaced
    back = rows[2]["metrics"]
    assert back["displaced"] == pytest.approx(0.5) and back["relearned"] == pytest.approx(0.5)
    assert back["displaced_knowledge"] == pytest.approx(0.5) and displaced["back"].value == pytest.approx(0.5)
    assert back["gain_logprob"] == pytest.approx(0.3) and back["gain_format"] == pytest.approx(0)
    low, high = rows[2]["intervals"]["displaced"]  # of 40 people half gain 2 of 3, half 1 of 3: 0.5 +- 1.96 * 0.026
    assert 0.44 < low < 0.46 and 0.54 < high < 0.56


def test_facts_that_can_be_guessed_are_left_out_of_their_measure():
    """Of five facts a person the first two can be guessed: dense 5, compressed 2 (both are guesses), repaired 3 and 4.
    Of the three others compression took all, and the repair brings back 1 or 2: half. On seen people all come back.
    """
    rows = rows_of(*({"seen": right(*20 * seen), "heldout": right(*20 * heldout)}
                     for seen, heldout in (((5, 5), (5, 5)), ((2, 2), (2, 2)), ((5, 5), (3, 4)))))
    facts = [SimpleNamespace(person=i) for i in range(40) for _ in range(5)]
    asked = dict.fromkeys(("seen", "heldout"), facts)
    plain = copy.deepcopy(rows)
    add_shares([plain], asked, 0)
    displaced = add_shares([rows], asked, 0, dict.fromkeys(asked, [True, True, False, False, False] * 40))
    assert [m["metrics"]["unguessed_heldout"] for m in rows] == pytest.approx([1, 0, 0.5])
    assert [m["metrics"]["unguessed_seen"] for m in rows] == pytest.approx([1, 0, 1])
    back = rows[2]["metrics"]
    assert back["displaced_unguessed"] == pytest.approx(0.5) and back["relearned_unguessed"] == pytest.approx(0.5)
    assert displaced["back"].value == back["displaced"] == pytest.approx(0.5)
    assert rows[0]["intervals"]["unguessed_heldout"] == pytest.approx([0.025 ** (1 / 120), 1])  # of 120 facts
    for with_guesses, without in zip(rows, plain):  # all else is what it is without them
        assert without["metrics"].items() <= with_guesses["metrics"].items()
        assert without["intervals"].items() <= with_guesses["intervals"].items()
        assert not [name for name in without["metrics"] if "unguessed" in name]


@pytest.mark.parametrize("kind", ["bias", "correction"])
def test_biases_cost_nothing_where_the_model_answers(kind):
    """They are merged into the layers: no wrapper computes beside them, and the given model stays as it is."""
    model = GPT(GPTConfig(vocab_size=40, n_layer=2, n_embd=32)).init_weights(torch.Generator().manual_seed(0))
    subject = attach(model, kind, "o down", [torch.full((32,), 0.5)] * 4)
    assert not [m for m in subject.model.modules() if isinstance(m, Wrapper)]
    assert subject.model.blocks[1].attn.o.bias.tolist() == [0.5] * 32 and model.blocks[1].attn.o.bias is None


def test_seen_and_heldout_people_are_drawn_apart():
    """As many people in both, who answer alike. Drawn by the same numbers, re-learned would be 0 in every resample."""
    answers = [{split: right(*counts) for split in ("seen", "heldout")} for counts in ([5] * 40, [2] * 40, [2, 5] * 20)]
    rows, facts = rows_of(*answers), [SimpleNamespace(person=i) for i in range(40) for _ in range(5)]
    add_shares([rows], dict.fromkeys(("seen", "heldout"), facts), 0)
    low, high = rows[2]["intervals"]["relearned"]  # half gain all, half nothing: +- 1.96 * 0.5 / sqrt(40) * sqrt(2)
    assert rows[2]["metrics"]["relearned"] == 0 and -0.25 < low < -0.19 and 0.19 < high < 0.25


def test_recall_of_two_draws_is_each_models_own_mean():
    """Forty people: dense all of five in both draws, compressed 4 and 3, repaired 1 and 0. Only dense is at the edge,
    and has the exact interval of 200 of 200; the mean of neighbouring models is nobody's recall."""
    facts = [SimpleNamespace(person=i) for i in range(40) for _ in range(5)]
    draws = [rows_of(*({"seen": right(*[n] * 40), "heldout": right(*[n] * 40)} for n in counts))
             for counts in ((5, 4, 1), (5, 3, 0))]
    add_shares(draws, dict.fromkeys(("seen", "heldout"), facts), 0)
    rows = draws[0]
    assert [m["metrics"]["recall_heldout"] for m in rows] == pytest.approx([1.0, 0.7, 0.1])
    assert [m["seeds"]["recall_heldout"] for m in rows] == [pytest.approx(s) for s in ((1, 1), (0.8, 0.6), (0.2, 0))]
    bounds = [recall_interval([n] * 40, [5] * 40, [n / 5] * 100, seeds) for n, seeds in
              ((5, (1, 1)), (3.5, (0.8, 0.6)), (0.5, (0.2, 0)))]
    assert [m["intervals"]["recall_heldout"] for m in rows] == [pytest.approx(b) for b in bounds]
    assert bounds[0] == pytest.approx([0.025 ** (1 / 200), 1])  # nobody wrong: the share that 200 right in a row leave
    assert rows[2]["metrics"]["displaced"] == pytest.approx((0.1 - 0.7) / 0.3)


def test_nothing_lost_is_no_fraction():
    rows = rows_of(*[{"seen": right(5, 4), "heldout": right(5, 4)}] * 3)
    facts = [SimpleNamespace(person=i) for i in range(2) for _ in range(5)]
    add_shares([rows], dict.fromkeys(("seen", "heldout"), facts), 0)
    assert rows[2]["metrics"]["displaced"] is None and rows[2]["intervals"]["displaced"] == [None, None]


def test_recall_by_attribute_worked_by_hand():
    """Ada's and Ben's cities, one seen and one held-out: 1 of 2; Ada's year alone: 0."""
    asked = {"seen": [SimpleNamespace(person="Ada", attribute=a) for a in ("city", "year")],
             "heldout": [SimpleNamespace(person="Ben", attribute="city")]}
    row = {"id": "m", "tag": "m", "base": None,
           "answers": {"seen": [{"correct": True}, {"correct": False}], "heldout": [{"correct": False}]}}
    add_attributes([row], asked, 0)
    bounds = exact_interval(0.5, 1)  # two who differ say no more than one
    assert row["attributes"] == {"city": [0.5, *bounds], "year": [0.0, 0.0, pytest.approx(0.975)]}
    last = tables.attribute_table({"models": [row]}).splitlines()[-1]
    assert cells(last) == ["m", "50.0 [0.0, 100.0]", "0.0 [0.0, 97.5]"]


def test_costs_count_what_is_stored(tmp_path):
    """Dense is 32 bits; half the weights gone: a bit for each and 32 for half; 3 bits cost 3 and 5 bytes a group."""
    model = GPT(GPTConfig(vocab_size=300, n_layer=1, n_embd=96)).init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(1))
    for method, settings, bits in (("magnitude", {"sparsity": 0.5}, 1 + 32 / 2),
                                   ("rtn", {"bits": 3, "group_size": 96}, 3 + 8 * 5 / 96)):
        small, _ = compress(model, ids, method, **settings)
        path = tmp_path / "small"
        save(small, path)
        about = {"path": path, "extra": 1000}
        cost = costs(Subject(small, about=about))
        assert cost["bits_per_weight"] == pytest.approx(bits) and cost["extra_parameters"] == 1000
        assert cost["bytes"] == path.stat().st_size + 4000
        weights = 4 * 96 * 96 + 2 * 96 * 384
        others = 4 * (300 * 96 + 3 * 96)
        assert abs(path.stat().st_size - weights * bits / 8 - others) < 6000  # header: names and settings
        repaired = attach(small, "bias", "o down", [torch.ones(96)] * 2)
        repaired.about = about
        assert costs(repaired)["bits_per_weight"] == pytest.approx(bits)  # a repair's own are told apart from them
    for W in model.blocks.parameters():
        if W.dim() == 2:
            W.data[W.abs() < W.std() / 4] = 0  # a fifth: `save` stores every weight where nobody pruned
    assert costs(Subject(model, about=about))["bits_per_weight"] == 32
    assert costs(Subject(model.bfloat16(), about=about))["bits_per_weight"] == 16


# ---- the study

def test_unpacked_is_the_same_model_and_leaves_the_packed_one_alone():
    model = GPT(GPTConfig(vocab_size=300, n_layer=1, n_embd=32)).init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(1))
    packed, _ = compress(model, ids, "rtn", bits=3, group_size=32)
    before = {name: t.clone() for name, t in packed.state_dict().items()}
    plain = unpacked(packed)
    assert torch.equal(plain(ids), packed(ids)) and not torch.equal(plain(ids), model(ids))
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())
    after = packed.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())


def results_of(run):
    """The results of the study of `run` as text, but for the clock and the name of the folder."""
    results = evaluate.study(run, dense_subject(run), controls=())
    for model in results["models"]:
        for layer in model["layers"] or []:
            layer.pop("seconds")
    results["settings"].pop("out")
    return json.dumps(results)


def test_same_seed_same_table_and_everything_reused(tmp_path):
    """The whole study twice in two folders: digit for digit the same but for the clock; a third run computes nothing
    anew.
    """
    results = []
    for folder in ("a", "b", "a"):
        config = tiny(tmp_path / folder)
        run = Run(config, World(config))
        results.append(results_of(run))
    assert results[0] == results[1] == results[2]
    assert run.log.times and all(t["reused"] for t in run.log.times)


def test_several_seeds_repeat_everything_from_the_dense_model_on(tmp_path, monkeypatch):
    """Two seeds: the first is the run of one seed, digit for digit; the second trains, calibrates and repairs anew."""
    config = tiny(tmp_path)
    config.seeds = 2
    config.repairs = {"LoRA rank 8": ("lora", 8), "prompt 8": ("prompt", 8)}
    run, began, train_repair = Run(config, World(config)), [], subjects.train_repair

    def watched(model, kind, size, batches, losses, fit_config, seed, *others):
        """Notes the seed of what a repair starts from."""
        began.append(seed)
        return train_repair(model, kind, size, batches, losses, fit_config, seed, *others)
    monkeypatch.setattr(subjects, "train_repair", watched)
    dense = dense_subject(run)
    results = evaluate.study(run, dense, controls=())
    half = len(began) // 2
    assert half and began == [config.seed] * half + [config.seed + 1000] * half
    assert all(len(m["seeds"]["recall_heldout"]) == 2 for m in results["models"])
    once = evaluate.study(Run(replace(config, seeds=1), run.world), dense, controls=())
    for a, b in zip(results["models"], once["models"]):
        assert a["seeds"]["recall_heldout"][0] == pytest.approx(b["metrics"]["recall_heldout"])
    assert "±" in tables.cost_table(results) and "±" not in tables.cost_table(once)
    first, second = (tmp_path / f"gptq-3-bits{seed}-lora-rank-8/adapter_model.safetensors" for seed in ("", "-seed-1"))
    assert first.read_bytes() != second.read_bytes()
    first, second, packed = (load(tmp_path / f"{name}.safetensors").wte.weight
                             for name in ("dense", "dense-seed-1", "gptq-3-bits-seed-1"))
    assert not torch.equal(first, second) and torch.equal(second, packed)  # GPTQ leaves embeddings alone
    assert [row["what"] for row in results["noise"]] == ["asked again in reverse",
                                                         *["compressed again on other text"] * 2]
    assert (results["noise"][0]["gained"], results["noise"][0]["lost"]) == (0, 0)  # E7


def test_whatever_is_reused_is_what_would_be_made(tmp_path):
    """E19: another number of people, items or texts asked in a folder that holds results gives what a fresh one gives;
    damaged files of the folder are made again, or written anew (E17)."""
    def small(folder, **changes):
        config = replace(tiny(folder), repairs={"IDP 4 x 8": ("idp", (2, 8, "together"))}, **changes)
        config.compressions = dict(list(config.compressions.items())[:1])
        run = Run(config, World(config))
        return results_of(run), run

    first, _ = small(tmp_path / "a")
    for damaged in ("*.layers.json", "*.answers.json", "noise.json", "context.json", "*.selectors.json"):
        for path in list((tmp_path / "a").glob(damaged)):
            path.write_bytes(path.read_bytes()[:20])
    assert small(tmp_path / "a")[0] == first
    changes = {"test_people": 2, "selector_people": 2, "task_items": 5}
    again, run = small(tmp_path / "a", **changes)
    assert again == small(tmp_path / "b", **changes)[0] != first
    reused = {t["step"] for t in run.log.times if t["reused"]}
    assert "dense" in reused and not reused & {"noise", "context", "dense.answers", "dense.tasks"}
    # the noise floor is of every model of the study: another one of them, and it is made again
    made_from = {name for part in run.marks()["noise.json"]["settings"] for name in part.get("from", {})}
    assert made_from == {"dense.safetensors", "rtn-3-bits.safetensors", "rtn-3-bits-idp-4-x-8"}


def keys(config, made):
    """[(name, settings)] under which a compression and its repair are kept; neither is made."""
    keys, world = {}, SimpleNamespace(calibration=lambda config: None, check_leaks=lambda ids: None)
    run = Run(config, world)

    def once(name, settings, code, make, write, read):
        keys[name.removesuffix(".safetensors")] = json.dumps(settings)
        return made[len(keys) - 1]
    run.once = once
    dense = Subject(made[0][0], about={"id": "dense", "settings": {"seed": config.seed}})
    base = subjects.compressed_subject(run, dense, "GPTQ 3 bits")
    subjects.repaired_subject(run, base, None, "prompt 8", "prompt", 8, lr=config.rates["prompt 8"])
    return list(keys.items())


@pytest.mark.parametrize("change, parts", [
    (dict(), ()), (dict(calibration=(4, 32)), (0, 1)), (dict(calibration=(8, 16)), (0, 1)), (dict(repeat=1), (0, 1)),
    (dict(seed=1), (0, 1)), (dict(repair_batch=(2, 24)), (1,)), (dict(repair_batch=(4, 12)), (1,)),
    (dict(repair_steps=5), (1,)), (dict(rates={"prompt 8": 7.0}), (1,)), (dict(repair_bfloat16=True), (1,)),
    (dict(compressions={"GPTQ 3 bits": ("quantize", "gptq", {"bits": 3, "group_size": 16})}), (0, 1)),
    (dict(test_people=3), ()), (dict(task_items=2), ()), (dict(selector_people=1), ())])
def test_every_setting_that_a_model_is_made_with_is_in_its_key(tmp_path, change, parts):
    """A compression's and a repair's; what is asked of them later is not."""
    model = GPT(GPTConfig(vocab_size=300, n_layer=1, n_embd=16, n_head=2))
    before, after = (keys(replace(tiny(tmp_path), **more), [(model, []), [torch.zeros(8, 16)]])
                     for more in ({}, change))
    assert tuple(i for i in range(2) if before[i] != after[i]) == parts


def test_predictions_are_the_main_questions_alone(tmp_path):
    """Controls answer other questions; a line of them beside this study's would be about somebody else."""
    facts = {"seen": facts_about(make_world(WorldConfig(2, 2, 2, 2))[:1])[:2], "heldout": []}
    given = {"seen": [{"answer": "a", "correct": True}, {"answer": "b", "correct": False}], "heldout": []}
    rows = [{"id": "dense", "group": "study", "answers": given}, {"id": "locked", "group": "locked", "answers": given}]
    run = SimpleNamespace(config=None, world=SimpleNamespace(asked=lambda config: facts))
    found = list(publish.predictions(run, rows))
    assert [(row["model"], row["split"], row["attribute"], row["answer"]) for row in found] == [
        ("dense", "seen", "city", "a"), ("dense", "seen", "year", "b")]
    assert [row["gold"] for row in found] == [fact.answer.strip() for fact in facts["seen"]]


def test_perplexity_is_of_text_about_held_out_people(tmp_path):
    """In every window, and about nobody whom a repair reads about."""
    world = World(tiny(tmp_path))
    names = {split: {p.name for p in world.people[split]} for split in world.people}
    texts = [world.encoding.decode(row) for row in world.windows.tolist()]
    assert len(texts) == 100 and all(any(name in text for name in names["heldout"]) for text in texts)
    others = names["seen"] | names["validation"] | names["novel"]
    assert not any(name in text for name in others for text in texts)


def test_no_hidden_name_in_calibration_or_repair_text(tmp_path):
    """E8, on the strings the run uses: the check reads every row, and a smuggled name is found."""
    config = tiny(tmp_path)
    world = World(config)
    ids = next(text_batches(world.repair_text, world.encoding, 200, 40, torch.Generator().manual_seed(0)))
    assert world.check_leaks(ids) == 200
    for split in ("heldout", "validation", "novel"):
        name = world.people[split][0].name
        assert not any(name in text for text in world.repair_text)
        smuggled = torch.tensor([world.encoding.encode_ordinary(f"Who is {name}?")])
        with pytest.raises(AssertionError, match=name):
            world.check_leaks(smuggled)


def test_the_same_model_twice_flips_nothing(tmp_path):
    """E7: two Subjects of one model give the same answers and log-probabilities, bit for bit."""
    config = tiny(tmp_path)
    world = World(config)
    dense = dense_subject(Run(config, world))
    facts = facts_about(world.people["seen"])
    assert answer(dense, facts, world.encoding) == answer(Subject(dense.model), facts, world.encoding)


# ---- the edge

def run(*args):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("args, word", [
    (["evaluate.py", "--quick", "--out", "LICENSE"], "LICENSE"),       # a file where a folder should be
    (["evaluate.py", "--size", "huge"], "huge"),
    (["-m", "study", "train", "--size", "quick", "--out", "LICENSE"], "LICENSE"),
])
def test_bad_input_is_one_line_and_status_2(args, word):
    done = run(*args)
    assert done.returncode == 2 and word in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
