"""Progress in the terminal: every step of the study is announced, and the time left is never 0 before the end."""
import re
import sys
from types import SimpleNamespace

import pytest

import evaluate
from study import controls, steps
from study.progress import planned
from study.settings import MORE, sized
from study.steps import Log, Run, duration
from study.subjects import dense_subject
from test_evaluate import tiny
from world.small import World


def test_what_is_announced_is_what_is_made(tmp_path, capsys, monkeypatch):
    """A whole study with two draws, two pools, a next-token twin and the controls: file by file, in the order said."""
    for slow in ("train_lock", "tell"):
        monkeypatch.setattr(controls, slow, lambda dense, *_: dense)
    config = tiny(tmp_path)
    config.seeds, config.selector_people, config.task_items = 2, 2, 2
    config.repair_steps, config.full = 1, True
    config.compressions = {"GPTQ 3 bits": config.compressions["GPTQ 3 bits"]}
    config.repairs = {tag: {**config.repairs, **MORE}[tag]
                      for tag in ("bias correction", "IDP 4 x 8", "IDP 4 x 8 joint", "prompt 8, next token")}
    config.rates = {"prompt 8": 0.1, "biases": 0.03, "LoRA rank 8": 0.003}
    run = Run(config, World(config))
    plan = planned(run)
    run.expect(plan)
    results = evaluate.study(run, dense_subject(run))
    objectives = {m["tag"]: m["operation"]["parameters"].get("objective") for m in results["models"] if m["operation"]}
    assert (objectives["prompt 8, next token"], objectives["IDP 4 x 8"]) == ("next_token", "distillation")
    assert [m["tag"] for m in results["models"]].count("biases") == 4  # with --full, of each control
    assert results["models"][0]["similarity"]["output"] == pytest.approx([1.0])  # the dense model beside itself
    announced = [file for files in plan.values() for file in files if file]
    made = list(dict.fromkeys(t["step"] for t in run.log.times))
    noise = {"gptq-3-bits-seed-99", "gptq-3-bits-seed-99.noise"}  # on other text, a part of the noise floor's step
    assert len(announced) == len(set(announced)) and {*announced, *noise} == set(made)
    shown = [re.match(r"step (\d+) of (\d+), (\d+) (?:s|min) left of about \d+ (?:s|min)", line).groups()
             for line in capsys.readouterr().err.splitlines() if not line.startswith("dense:")]
    numbers = [int(n) for n, _, _ in shown]
    assert numbers == sorted(numbers) and {int(of) for _, of, _ in shown} == {len(plan) - 1}
    assert set(numbers) == set(range(1, len(plan)))
    assert all(int(left) > 0 for _, _, left in shown)

    again = Run(config, run.world)
    again.expect(planned(again))
    left = {file: s for files in again.log.plan.values() for file, s in files.items() if s}
    assert left == {"": 20.0}  # all is reused


def test_one_draw_too(tmp_path):
    """The noise floor then compresses anew what several draws have already: part of its step."""
    run = Run(tiny(tmp_path), None)
    run.world = World(run.config)
    plan = planned(run)
    assert len(plan) - 1 == 1 + 4 * 7 + 4 + 2 and list(plan)[:2] == ["dense", "RTN 3 bits"]
    assert "gptq-3-bits-seed-1" not in {file for files in plan.values() for file in files}


class Clock:
    """A time that a test sets."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(steps.time, "time", lambda: self.now)


def made(log, clock, name, seconds):
    """A file that took so long."""
    log.begin(name)
    clock.now += seconds
    log.done(name, seconds, False)


def test_the_pace_of_what_was_made_counts(monkeypatch):
    """Ten steps of 20 s each are announced; the machine takes 40 s for each: 5 are done, 200 and not 100 s are left."""
    clock, log = Clock(monkeypatch), Log()
    log.expect({f"step {i}": {f"file {i}": 20.0} for i in range(10)})
    assert log.left() == 200
    for i in range(5):
        made(log, clock, f"file {i}", 40)
    assert log.left() == pytest.approx(100 * 210 / 110)  # 10 s at the pace that was expected count with them
    assert log.where() == "step 5 of 10, 3 min left of about 7 min"


def test_what_is_reused_takes_no_time(monkeypatch):
    clock, log = Clock(monkeypatch), Log()
    log.expect({"a": {"a": 50.0}, "b": {"b": 50.0}})
    log.done("a", 0.1, True)
    assert log.left() == 50 and clock.now == 1000


def test_the_time_left_is_never_zero_and_falls_while_a_step_runs(monkeypatch):
    """A step announced with 10 s that takes 255 s, as the noise floor did: before its end something is left."""
    clock, log, left = Clock(monkeypatch), Log(), []
    log.expect({"noise": {"noise": 10.0}})
    log.begin("noise")
    for _ in range(255):
        left.append(log.left())
        clock.now += 1
    assert left[0] == 10 and left[5] == 5 and min(left) >= 1
    shown = [duration(s) for s in left]
    assert "0 s" not in shown
    log.under_way[-1][2] = 0.5  # it says itself that it is half done
    assert log.left() == pytest.approx(255)


def test_time_between_the_steps_counts(monkeypatch):
    """30 s of intervals and tables belong to no file; 10 of them have passed."""
    clock, log = Clock(monkeypatch), Log()
    log.expect({"a": {"a": 20.0}, "": {"": 30.0}})
    made(log, clock, "a", 20)
    clock.now += 10
    assert log.left() == pytest.approx(20)
    assert log.where().startswith("step 1 of 1, ")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_a_step_and_none_a_file(monkeypatch, capsys, terminal):
    """Elsewhere than in a terminal each step is one line, with another where it takes long; there they are one line."""
    clock, log = Clock(monkeypatch), Log()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    log.expect({"dense": {"dense": 60.0, "dense.answers": 2.0}, "small": {"small": 2.0, "small.answers": 2.0}})
    log.begin("dense")
    show = log.progress("dense", 60)
    for step in range(60):
        clock.now += 1
        show(step, 0.5)
    log.done("dense", 60, False)
    for name in ("dense.answers", "small", "small.answers"):
        made(log, clock, name, 2)
    log.say("the end")
    text = capsys.readouterr().err
    if terminal:
        assert text.count("\n") == 1 and text.split("\r")[-1].rstrip(" \n") == "the end"
        widths = [len(line) for line in text.rstrip("\n").split("\r")]
        assert all(b >= a for a, b in zip(widths, widths[1:]) if b < 40)  # a shorter line covers the longer before it
        assert max(widths) == 49  # a longer line would take two rows
    else:
        lines = text.splitlines()
        assert [line.split(": ")[1] for line in lines[:-1]] == ["dense", *[f"dense, {n} of 60, loss 0.5"
                                                                          for n in (15, 30, 45, 60)], "small"]
        assert lines[0] == "step 1 of 2, 66 s left of about 66 s: dense" and max(map(len, lines)) <= 100


def test_single_jobs_announce_nothing_and_say_what_took_long(monkeypatch, capsys):
    clock, log = Clock(monkeypatch), Log()
    made(log, clock, "dense", 12)
    made(log, clock, "dense.answers", 0.5)
    assert capsys.readouterr().err == "dense: 12 s\n"


def test_what_a_file_took_is_kept_for_the_next_run(tmp_path):
    """It is expected again where the code that it depends on has changed."""
    run = Run(SimpleNamespace(out=str(tmp_path)), None)
    run.once_json("x", {}, ("idp",), lambda: 1)
    run.expect({"x": {"x": 7.0}, "y": {"y": 3.0}})
    assert run.log.plan == {"x": {"x": 0.0}, "y": {"y": 3.0}}
    mark = tmp_path / ("x.json" + steps.MARK)
    kept = steps.json.loads(mark.read_text())
    assert 0 <= kept["seconds"] < 5
    mark.write_text(steps.json.dumps({**kept, "seconds": 42.0, "code": {"idp.py": "other"}}))
    run.expect({"x": {"x": 7.0}})
    assert run.log.plan == {"x": {"x": 42.0}}
    mark.write_text(steps.json.dumps({**{k: v for k, v in kept.items() if k != "seconds"}}))  # of an earlier version
    assert run.once_json("x", {}, ("idp",), lambda: 2) == 1


def test_words_for_seconds():
    assert [duration(s) for s in (0.2, 45, 99.5, 100, 170, 5940, 6000, 7530)] == [
        "1 s", "45 s", "100 s", "2 min", "3 min", "99 min", "1 h 40 min", "2 h 6 min"]


def test_the_study_is_announced_as_minutes():
    """The default study takes five to eight minutes on two cores, the quick one about one."""
    for size, low, high in (("default", 300, 480), ("quick", 40, 110)):
        config = sized(size)
        world = SimpleNamespace(asked=lambda _: {"all": [0] * (5010 if config.size == "default" else 500)},
                                tasks=lambda _: {"some": []})
        seconds = sum(s for files in planned(Run(config, world)).values() for s in files.values())
        assert low < seconds < high, (size, seconds)
