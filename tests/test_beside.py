"""The second process of a study makes what the study would make, and nothing is made twice."""
import os
import time

import pytest
import torch

import evaluate
from study import beside, controls, steps
from study.steps import Run
from study.subjects import dense_subject
from test_evaluate import tiny
from world.small import World


def test_what_is_made_backwards_is_what_the_study_asks_for(tmp_path, monkeypatch):
    """All but the two checks at the end; in two draws, of two compressions and the controls."""
    for slow in ("train_lock", "tell"):
        monkeypatch.setattr(controls, slow, lambda dense, *_: dense)
    config = tiny(tmp_path)
    config.seeds, config.selector_people, config.task_items, config.repair_steps = 2, 2, 2, 1
    config.compressions = {tag: config.compressions[tag] for tag in ("GPTQ 3 bits", "magnitude 50 %")}
    config.repairs = {tag: config.repairs[tag] for tag in ("bias correction", "IDP 4 x 8")}
    config.rates = {"prompt 8": 0.1, "LoRA rank 8": 0.003}
    run = Run(config, World(config))
    evaluate.backwards(run)
    made = [t["step"] for t in run.log.times if not t["reused"]]
    order = [made.index(name) for name in ("control-locked", "magnitude-50", "gptq-3-bits")]
    assert order[0] < order[1] < order[2] and "magnitude-50-seed-1-idp-4-x-8" in made
    assert made.index("dense-seed-1") < made.index("control-locked-seed-1") < made.index("dense") < order[0]

    again = Run(config, run.world)
    evaluate.study(again, dense_subject(again))
    assert {t["step"] for t in again.log.times if not t["reused"]} == {"noise"}


def test_the_second_process_lives_as_long_as_the_study(tmp_path, monkeypatch):
    """It gets the study's arguments and half of the threads; it ends, and the threads come back, also on an error."""
    (tmp_path / "evaluate.py").write_text(
        "import os, pathlib, sys, time\n"
        "told = ' '.join([*sys.argv[1:], os.environ['OMP_NUM_THREADS']])\n"
        "path = pathlib.Path(__file__).with_name('part')\n"
        "path.write_text(told)\n"
        "path.rename(path.with_name('told'))\n"
        "time.sleep(60)\n")
    monkeypatch.setattr(steps, "ROOT", str(tmp_path))
    monkeypatch.setattr(beside.subprocess, "Popen", lambda *a, popen=beside.subprocess.Popen, **k:
                        began.append(popen(*a, **k)) or began[-1])
    began, run, threads = [], Run(tiny(tmp_path), None), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises(RuntimeError), beside.second_process(run, ["--seeds", "3"]) as share:
            assert torch.get_num_threads() == 4  # until the one dense model is there
            share()
            assert torch.get_num_threads() == 2 and run.log.hands == 2
            while not (tmp_path / "told").exists():
                assert began[0].poll() is None
                time.sleep(0.02)
            raise RuntimeError
        assert began[0].poll() is not None and torch.get_num_threads() == 4 and run.log.hands == 1
        assert (tmp_path / "told").read_text() == f"--seeds 3 --backwards {os.getpid()} 2"
        run.config.seeds = 2  # each process then trains a dense model of its own: half of the threads from the start
        with beside.second_process(run, []):
            assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        with beside.second_process(run, []):
            assert run.log.hands == 1
        assert len(began) == 2
    finally:
        torch.set_num_threads(threads)


def test_it_ends_with_the_process_that_began_it(monkeypatch):
    log = beside.Unheard(os.getppid())
    log.begin("a step")
    monkeypatch.setattr(os, "getppid", lambda: log.parent + 1)
    with pytest.raises(SystemExit):
        log.begin("another")
    monkeypatch.undo()
    with pytest.raises(SystemExit):  # a study that was gone before this process began
        beside.Unheard(os.getppid() + 1).begin("a step")


def test_what_another_process_makes_is_no_time_left(tmp_path):
    run = Run(tiny(tmp_path), None)
    run.expect({"a step": {"one": 30.0, "two": 30.0, "three": 30.0}})
    assert run.log.left() == pytest.approx(90, abs=1)
    run.log.hands = 2
    assert run.log.left() == pytest.approx(45, abs=1)
    (tmp_path / ("two.safetensors" + steps.MARK)).write_text("{}")
    assert run.log.left() == pytest.approx(30, abs=1)
    old = tmp_path / ("three.json" + steps.MARK)  # of an earlier study: it was announced, so it is made again
    old.write_text("{}")
    os.utime(old, (run.log.began - 100,) * 2)
    assert run.log.left() == pytest.approx(30, abs=1)
