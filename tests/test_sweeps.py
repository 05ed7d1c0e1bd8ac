"""Sweeps: the plan, the two divisors, and the same points from one process and from two."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from study import settings, sweeps
from study.subjects import dense_subject
from study.steps import Run
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
sweeps.BITS, sweeps.RANKS = (2, 4), (1, 2)
from study.steps import Run
from world.small import World
config = tiny({out!r})
run = Run(config, World(config))
dense = dense_subject(run)
for name in ("bits", "rank"):
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
    assert [p["series"] for p in one["rank"]["points"]] == ["GPTQ 3 bits"] * 2 + ["SparseGPT 50 %"] * 2


def test_each_process_makes_its_share_and_the_first_returns_all(tmp_path, monkeypatch):
    """The second of two processes first; the first one finds its points, and makes those of a third that never came."""
    made, run = [], Run(tiny(tmp_path), None)
    dense = SimpleNamespace(about={"settings": {}})
    monkeypatch.setattr(sweeps, "runs_of", lambda name, config: [{"series": "S", "x": x} for x in range(7)])
    monkeypatch.setattr(sweeps, "make", lambda run, point, dense, batches: (made.append(point["x"]) or point["x"],))
    monkeypatch.setattr(sweeps, "measure", lambda run, x: {"y": 10 * x})
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, share in ((1, [1, 4]), (0, [0, 3, 6, 2, 5])):
        made.clear()
        monkeypatch.setenv("RANK", str(rank))
        points = sweeps.run_sweep(run, "bits", dense)
        assert made == share and (points is None) == (rank == 1)
    assert points == [{"series": "S", "x": x, "y": 10 * x} for x in range(7)]


def test_plans_are_the_sweeps():
    config = settings.sized("default")
    assert [len(sweeps.runs_of(name, config)) for name in sweeps.SWEEPS] == [18, 36, 14, 12, 16]
    first = sweeps.runs_of("bits", config)[0]
    assert first == {"series": "RTN", "x": 2, "method": "rtn", "how": {"bits": 2, "group_size": 96}}
    assert sweeps.runs_of("sparsity", config)[-1] == {"series": "SparseGPT, refit 2:4", "x": 0.5, "method": "sparsegpt",
                                                   "how": {"n_m": (2, 4), "refit": True}}


@pytest.mark.parametrize("size, rate", [(1, 0.3), (8, 0.3), (13, 0.3), (16, 0.1), (32, 0.1)])
def test_the_nearest_length_lends_its_learning_rate(size, rate):
    """8 and 24 are known: 13 is 1.6 times 8 and 1.8 times fewer than 24; 16 is twice 8 and two thirds of 24."""
    config = settings.sized("default")
    config.repairs = {"prompt 8": ("prompt", 8), "prompt 24": ("prompt", 24), "LoRA rank 1": ("lora", 1)}
    config.rates = {"prompt 8": 0.3, "prompt 24": 0.1, "LoRA rank 1": 7}
    assert sweeps.nearest_rate(config, "GPTQ 3 bits", "prompt", size) == rate
    with pytest.raises(ValueError, match="prefix"):
        sweeps.nearest_rate(config, "GPTQ 3 bits", "prefix", 8)


def test_the_wrong_divisor_flatters_longer_prompts(tmp_path, monkeypatch):
    """P2: a loss of ln 7 on 47 text tokens a window prints as exp(ln 7 * 47 / 147) = 1.86 behind 100 prompt tokens."""
    monkeypatch.setattr(sweeps, "perplexity", lambda subject, windows: 7.0)
    run = Run(tiny(tmp_path), SimpleNamespace(windows=torch.zeros(2, 64), asked=lambda config: {}))
    right, wrong = (sweeps.measure(run, None, P) for P in (0, 100))
    assert right == {"perplexity": 7.0, "perplexity_wrong_divisor": 7.0}
    assert wrong["perplexity"] == 7.0 and wrong["perplexity_wrong_divisor"] == pytest.approx(7 ** (47 / 147))


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


def test_a_prompt_length_is_trained_and_measured(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    run = Run(config, World(config))
    monkeypatch.setattr(sweeps, "LENGTHS", (1, 3))
    points = sweeps.run_sweep(run, "prompt-length", dense_subject(run))
    assert [p["x"] for p in points] == [1, 3, 1, 3]
    assert all(p["perplexity_wrong_divisor"] < p["perplexity"] for p in points)
    lines = sweeps.sweep_table("prompt-length", points).splitlines()
    assert cells(lines[0])[-3:] == ["seen %", "held-out %", "novel %"] and len(lines) == 6


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
    monkeypatch.setattr(sweeps, "answer", answered)
    monkeypatch.setattr(sweeps, "DOSES", ("prompt 8", "biases"))
    monkeypatch.setattr(sweeps, "DAMAGE", {"RTN": sweeps.quantized("RTN", (3, 16))})
    prompt, biases = sweeps.run_sweep(run, "damage", dense)
    facts = len(run.world.asked(config)["heldout"])
    assert prompt["lost"] == biases["lost"] == 1 and (prompt["repair"], biases["repair"]) == ("prompt 8", "biases")
    assert prompt["displaced"][0] == pytest.approx(-(-facts // 2) / facts)
    assert biases["displaced"][0] == pytest.approx(-(-facts // 4) / facts)
    assert prompt["relearned"][0] == pytest.approx(1 - prompt["displaced"][0])
    assert len(sweeps.sweep_table("damage", [prompt, biases]).splitlines()) == 3
