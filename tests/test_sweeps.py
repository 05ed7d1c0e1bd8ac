"""Sweeps: the plan, what a dose measures, and the same points from one process and from two."""
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from study import publish, settings, sweeps
from study.subjects import dense_subject
from study.steps import Log, Run
from world.score import Subject
from world.small import World
from test_tables import cells
from test_evaluate import ROOT, tiny

TINY = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from study import sweeps
from study.subjects import dense_subject
from test_tables import cells
from test_evaluate import tiny
torch.set_num_threads(1)
sweeps.BITS, sweeps.REPAIRED["size"] = (2, 4), ("prompt 1", "biases", "LoRA rank 2")
from study.steps import Run
from world.small import World
config = tiny({out!r})
run = Run(config, World(config))
dense = dense_subject(run)
for name in ("bits", "size"):
    points = sweeps.run_sweep(run, name, dense)
    if points:
        sweeps.keep(run, name, points, dense)
"""


def run_tiny(out, *launcher):
    script = out / "script.py"
    script.write_text(TINY.format(root=ROOT, tests=os.path.join(ROOT, "tests"), out=str(out)))
    done = subprocess.run([sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    with open(out / "results.json") as f:
        return json.load(f)["sweeps"]


def test_two_processes_give_the_points_of_one(tmp_path):
    """Digit for digit, in the same order."""
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one = run_tiny(tmp_path / "one")
    two = run_tiny(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert one == two and [p["x"] for p in one["bits"]["points"]] == [2, 4] * 3
    assert [p["base"] for p in one["size"]["points"]] == ["RTN 3 bits"] * 3 + ["GPTQ 3 bits"] * 3


def test_each_process_makes_its_share_and_the_first_returns_all(tmp_path, monkeypatch):
    """The second of two processes first; the first one finds its points, and makes those of a third that never came."""
    made, run = [], Run(tiny(tmp_path), None)
    dense = SimpleNamespace(about={"settings": {}})
    monkeypatch.setattr(sweeps, "runs_of", lambda name, config, times: [{"series": "S", "x": x} for x in range(7)])
    monkeypatch.setattr(sweeps, "measure", lambda run, point, dense: made.append(point["x"]) or point)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, share in ((1, [1, 4]), (0, [0, 3, 6, 2, 5])):
        made.clear()
        monkeypatch.setenv("RANK", str(rank))
        points = sweeps.run_sweep(run, "bits", dense)
        assert made == share and (points is None) == (rank == 1)
    assert points == [{"series": "S", "x": x} for x in range(7)]


def test_plans_are_the_sweeps():
    config = settings.sized("default")
    assert [len(sweeps.runs_of(name, config)) for name in sweeps.SWEEPS] == [18, 36, 16, 2, 10]
    first = sweeps.runs_of("bits", config)[0]
    assert first == {"series": "RTN", "x": 2, "method": "rtn", "how": {"bits": 2, "group_size": 96}}
    assert sweeps.runs_of("sparsity", config)[-1] == {"series": "SparseGPT, refit 2:4", "x": 0.5, "method": "sparsegpt",
                                                   "how": {"n_m": (2, 4), "refit": True}}


@pytest.mark.parametrize("size, bases", [("default", ["RTN 3 bits", "GPTQ 3 bits"]),
                                         ("quick", ["RTN 2 bits", "GPTQ 2 bits"])])
def test_sizes_and_steps_begin_from_what_the_study_rounds(size, bases):
    config = settings.sized(size)
    runs, n = {name: sweeps.runs_of(name, config) for name in ("size", "steps")}, config.repair_steps
    assert [(run["base"], run["steps"]) for run in runs["size"]] == [(base, n) for base in bases]
    assert [(run["base"], run["steps"]) for run in runs["steps"]] == [
        (base, k) for base in bases for k in (n // 2, n, 2 * n, 4 * n, 8 * n)]
    assert all(run["operation"] == config.compressions[run["base"]] for of in runs.values() for run in of)
    assert [run["steps"] for run in sweeps.runs_of("steps", config, [0.5, 3.0])] == [n // 2, 3 * n] * 2


@pytest.mark.parametrize("size", settings.SIZES)
def test_full_adds_rivals_that_have_a_rate(size):
    plain, full = settings.sized(size), settings.sized(size, full=True)
    assert full.repairs == {**plain.repairs, **settings.MORE} and not set(plain.repairs) & set(settings.MORE)
    for tag, (kind, how, *objective) in full.repairs.items():
        assert kind == "correction" or settings.rate(full, "RTN 3 bits", tag, kind, how) > 0
        assert (objective == ["next_token"]) == tag.endswith(", next token")
        assert not objective or full.repairs[tag.removesuffix(", next token")] == (kind, how)


def test_what_a_size_learns_at_and_on_what(tmp_path, monkeypatch):
    """Its own rate, or that of its kind; n steps on the first n batches, whatever else runs."""
    config, asked = tiny(tmp_path), []
    config.rates = {"prompt 8": 1, "prompt 32": 2, "LoRA rank 1 on o": 3, "LoRA rank 8": 4, "biases": 5}
    run = Run(config, World(config))
    dense = dense_subject(run)

    def repaired(run, base, batches, tag, kind, size, lr):
        asked.append((tag, lr, run.config.repair_steps, [ids.sum().item() for ids, *_ in batches()]))
        return Subject(base.model, about={**base.about, "id": tag, "base": base.about["id"], "extra": len(asked)})
    monkeypatch.setattr(sweeps, "repaired_subject", repaired)
    sweeps.run_sweep(run, "size", dense)
    rates = {tag.removesuffix(", 4 steps"): lr for tag, lr, _, _ in asked}
    assert rates == {**{f"prompt {n}": 0.1 for n in (1, 2, 4, 16)}, **{f"LoRA rank {n}": 3e-3 for n in (1, 2, 4, 16)},
                     "prompt 8": 1, "prompt 32": 2, "LoRA rank 1 on o": 3, "LoRA rank 8": 4, "biases": 5}
    text = [ids.sum().item() for ids in run.world.repair_rows(replace(config, repair_steps=32))]
    asked.clear()
    points = sweeps.run_sweep(run, "steps", dense)
    assert [(tag, steps) for tag, _, steps, _ in asked[:6:3]] == [("prompt 8, 2 steps", 2), ("prompt 8, 4 steps", 4)]
    assert all(read == text[:steps] for _, _, steps, read in asked) and len(asked) == 2 * 5 * 3
    assert [(p["series"], p["x"]) for p in points[:4]] == [
        ("prompt 8", 2), ("prompt 32", 2), ("biases", 2), ("prompt 8", 4)]


def test_sweeps_stay_in_the_results_of_the_same_dense_model(tmp_path):
    run = Run(tiny(tmp_path), None)
    (tmp_path / "results.json").write_text(json.dumps({"models": [1]}))
    a, b = (SimpleNamespace(about={"settings": {"seed": seed, "batch": (1, 2)}}) for seed in (0, 1))
    sweeps.keep(run, "bits", [{"x": 1}], a)
    sweeps.keep(run, "rank", [{"x": 2}], a)
    kept = sweeps.kept(tmp_path / "results.json", a.about["settings"])
    assert {name: s["points"] for name, s in kept.items()} == {"bits": [{"x": 1}], "rank": [{"x": 2}]}
    assert json.loads((tmp_path / "results.json").read_text())["models"] == [1]
    assert sweeps.kept(tmp_path / "results.json", b.about["settings"]) == {}
    assert sweeps.kept(tmp_path / "nothing.json", a.about["settings"]) == {}


@pytest.mark.parametrize("damage", ['{"sweeps": {"bi', "[1]", '{"sweeps": [1]}', '{"sweeps": {"rank": 1}}'])
def test_a_damaged_results_file_is_said_and_written_anew(tmp_path, damage, capsys):
    """It must not cost the study that has just been made, nor the sweep."""
    path, dense = tmp_path / "results.json", SimpleNamespace(about={"settings": {}})
    path.write_text(damage)
    assert sweeps.kept(path, {}) == {}
    assert ("results.json: not" in capsys.readouterr().err) == ("sweeps\": " not in damage or "bi" in damage)
    sweeps.keep(Run(tiny(tmp_path), None), "bits", [{"x": 1}], dense)
    assert json.loads(path.read_text())["sweeps"]["bits"]["points"] == [{"x": 1}]


def test_a_dose_is_displaced_by_hand(tmp_path, monkeypatch):
    """Dense all right, damaged all wrong; the prompt brings back every second held-out fact, biases every fourth."""
    right = iter([(1, 1, 1), (0, 0, 0), (1, 2, 0), (2, 4, 0)])  # every nth fact of seen, held-out, novel; 0: none

    def answered(subject, facts, encoding):
        if not state:
            state.extend(next(right))
        every = state.pop(0)
        return [{key: float(every > 0 and i % every == 0) for key in ("correct", "knowledge", "logprob")}
                for i in range(len(facts))]
    state, config = [], tiny(tmp_path)
    run = Run(config, World(config))
    dense = dense_subject(run)
    monkeypatch.setattr("study.repairs.answer", answered)
    monkeypatch.setitem(sweeps.REPAIRED, "damage", ("prompt 8", "biases"))
    monkeypatch.setattr(sweeps, "DAMAGE", sweeps.quantized("RTN", (3, 16)))
    prompt, biases = sweeps.run_sweep(run, "damage", dense)
    facts = len(run.world.asked(config)["heldout"])
    assert prompt["lost"] == biases["lost"] == 1 and (prompt["repair"], biases["repair"]) == ("prompt 8", "biases")
    assert prompt["displaced"][0] == pytest.approx(-(-facts // 2) / facts)
    assert biases["displaced"][0] == pytest.approx(-(-facts // 4) / facts)
    assert prompt["relearned"][0] == pytest.approx(1 - prompt["displaced"][0])
    assert (prompt["series"], prompt["x"], prompt["parameters"]) == ("RTN", "RTN 3 bits, groups of 16", 8 * 32)
    assert len(sweeps.sweep_table("damage", [prompt, biases]).splitlines()) == 3


def test_a_dose_of_two_dense_models_is_the_share_of_both(tmp_path, monkeypatch):
    """Each draw has a dense GPT, a compression and repair text of its own. In the second the prompt brings back all of
    what was lost, in the first half: three quarters, with an interval that two models leave wide."""
    asked, config = [], replace(tiny(tmp_path), seeds=2)
    every = {("dense", 0): 1, ("dense", 1): 1, ("prompt 8, 4 steps", 0): 2, ("prompt 8, 4 steps", 1): 1}

    def answered(subject, facts, encoding):
        draw, tag = "seed-1" in subject.about["id"], subject.about["tag"]
        asked.append((draw, tag, subject.model.wte.weight.sum().item()))
        right = every.get((tag, draw), 0)  # the damaged model knows nothing
        return [{key: float(right > 0 and i % right == 0) for key in ("correct", "knowledge", "logprob")}
                for i in range(len(facts))]
    run, read, batches = Run(config, World(config)), [], sweeps.repair_batches

    def noted(run, dense):
        """Which draw's text, with whose targets, is read."""
        read.append((run.config.repeat, dense.about["id"]))
        return batches(run, dense)
    monkeypatch.setattr(sweeps, "repair_batches", noted)
    monkeypatch.setattr("study.repairs.answer", answered)
    monkeypatch.setitem(sweeps.REPAIRED, "damage", ("prompt 8",))
    monkeypatch.setattr(sweeps, "DAMAGE", sweeps.quantized("RTN", (3, 16)))
    point, = sweeps.run_sweep(run, "damage", dense_subject(run))
    facts = len(run.world.asked(config)["heldout"])
    value, low, high = point["displaced"]
    assert point["lost"] == 1 and value == pytest.approx((1 + -(-facts // 2) / facts) / 2) and high - low > 0.5
    embeddings = [{weights for draw, _, weights in asked if draw == k} for k in (False, True)]
    assert [len(e) for e in embeddings] == [1, 1] and embeddings[0] != embeddings[1]
    assert read == [(0, "dense"), (1, "dense-seed-1")]


@pytest.mark.parametrize("option, word", [(["--seeds", "0"], "--seeds must be"),
                                          (["--times", "2", "0"], "--times above"),
                                          (["--times", "inf"], "--times above"), (["--times", "nan"], "--times above"),
                                          (["--times", "0.001"], "0.001 of 200 steps is less than one step")])
def test_impossible_draws_and_multiples_are_refused(option, word):
    with pytest.raises(ValueError, match=word):
        sweeps.main(["steps", *option])


def test_tables_of_shares():
    """A row a repair; or a column a number of steps. What cannot be divided is said."""
    points = [{"series": "biases", "x": x, "base": base, "repair": "biases", "parameters": 1536, "lost": 0.2,
               "displaced": [x / 1000, 0, 1] if base == "RTN" else None, "relearned": [0.5, 0.25, 0.75]}
              for base in ("RTN", "GPTQ") for x in (100, 200)]
    rows = [cells(line) for line in sweeps.sweep_table("steps", points).splitlines()]
    few = "too little was lost"
    assert rows[0] == ["model", "repair", "100 steps: displaced %", "200 steps: displaced %"]
    assert rows[2:] == [["RTN", "biases", "10.0 [0.0, 100.0]", "20.0 [0.0, 100.0]"], ["GPTQ", "biases", few, few]]
    rows = [cells(line) for line in sweeps.sweep_table("size", points[1:3]).splitlines()]
    assert rows[0] == ["model", "repair", "parameters", "displaced %", "re-learned %"]
    assert rows[2:] == [["RTN", "biases", "1,536", "20.0 [0.0, 100.0]", "50.0 [25.0, 75.0]"],
                        ["GPTQ", "biases", "1,536", few, "50.0 [25.0, 75.0]"]]


def test_a_study_that_publishes_keeps_the_points_of_a_sweep_that_ends_meanwhile(tmp_path, monkeypatch):
    """Both write results.json: what a sweep adds is read, and the file written, while no other process may."""
    held, seen = [], []

    @contextlib.contextmanager
    def holding(name):
        held.append(name)
        yield
        held.pop()
    run = SimpleNamespace(path=lambda name: str(tmp_path / name), holding=holding, config=None, log=Log(),
                          world=SimpleNamespace(asked=lambda config: {}))
    for table in ("main_table", "all_tables"):
        monkeypatch.setattr(publish.tables, table, lambda results: "")
    monkeypatch.setattr(publish.page, "page", lambda results, told: "")
    monkeypatch.setattr(publish.sweeps, "kept", lambda *_: seen.append(list(held)) or {"bits": {"points": []}})
    monkeypatch.setattr(publish, "write_text", lambda path, text: seen.append(
        (os.path.basename(path), list(held), "points" in text)))
    publish.publish(run, SimpleNamespace(about={"settings": {}}), {
        "models": [], "context": {"alone": 1.0, "behind_24_tokens": 1.0}, "headline": "", "claims": []})
    assert seen[:2] == [["results.json"], ("results.json", ["results.json"], True)] and not held
