"""Steps are done once, and again when settings, code or their own bytes change."""
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from checkpoints.adapters import load_tensors, save_tensors
from model import GPT, GPTConfig
from study import steps
from study.steps import Run
from test_script import room

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def tiny_run(path):
    return Run(SimpleNamespace(out=str(path)), None)


def test_other_settings_are_computed_anew(tmp_path):
    made, run = [], tiny_run(tmp_path)
    for settings in ({"lr": 1}, {"lr": 1}, {"lr": 2}):
        run.once_json("x", settings, (), lambda: made.append(settings))
    assert made == [{"lr": 1}, {"lr": 2}]
    assert [t["reused"] for t in run.log.times] == [False, True, False]


def test_an_interrupted_step_is_made_again(tmp_path):
    """What was written before the interruption has no mark beside it, so nobody takes it for finished."""
    run = tiny_run(tmp_path)

    def interrupted(result, path):
        steps.write_text(path, "half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run.once("x.json", {}, (), lambda: 1, interrupted, None)
    assert run.once_json("x", {}, (), lambda: "whole") == "whole"


@pytest.mark.filterwarnings("ignore:soon:FutureWarning")
def test_a_training_that_ended_early_says_so_whenever_its_result_is_used(tmp_path, capsys):
    """A warning is shown when it comes, the same one of another step too; and said again where the step is reused."""
    def diverges():
        """As `recover.fit` does; what others warn of is not the result's."""
        warnings.warn("the loss is nan at step 3")
        warnings.warn("soon it will be otherwise", FutureWarning)
        return 1
    for name in ("x", "y"):
        with pytest.warns(UserWarning, match="the loss is nan"):
            tiny_run(tmp_path).once_json(name, {}, (), diverges)
    assert "nan" not in capsys.readouterr().err
    run = tiny_run(tmp_path)
    for name in ("x", "y"):
        run.once_json(name, {}, (), diverges)
    said = capsys.readouterr().err
    assert said.splitlines() == ["x: the loss is nan at step 3", "y: the loss is nan at step 3"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as where the same text was shown before
        run.once_json("w", {}, (), diverges)
    assert steps.read_mark(str(tmp_path / "w.json"))["warned"] == ["the loss is nan at step 3"]
    run.once_json("z", {}, (), lambda: 1)
    assert "warned" not in steps.read_mark(str(tmp_path / "z.json"))


@pytest.mark.parametrize("damage", ["", "[1, 2", "null"])
def test_a_damaged_result_or_mark_is_made_again(tmp_path, damage):
    run = tiny_run(tmp_path)
    for name in ("x.json", "x.json" + steps.MARK):
        run.once_json("x", {}, (), lambda: [1, 2, 3])
        (tmp_path / name).write_text(damage)
        assert run.once_json("x", {}, (), lambda: "again") == "again"
        assert run.once_json("x", {}, (), lambda: "never") == "again"


@pytest.mark.parametrize("change", [{"seconds": "y"}, {"code": {"../../etc/passwd": 1}}, {"code": ["a"]}, {"code": 1},
                                    {"warned": "diverged"}, {"warned": None}])
def test_a_mark_that_was_edited_is_none(tmp_path, change):
    run = tiny_run(tmp_path)
    run.once_json("x", {}, (), lambda: 1)
    mark = tmp_path / ("x.json" + steps.MARK)
    whole = json.loads(mark.read_text())
    mark.write_text(json.dumps({**whole, **change}))
    assert steps.read_mark(str(tmp_path / "x.json")) is None and run.marks() == {}
    run.describe_reuse()
    mark.write_text(json.dumps(whole))
    assert run.marks().keys() == {"x.json"}
    (tmp_path / "x.json").unlink()  # what is gone is not said to be reused
    assert run.marks() == {}


def test_a_step_knows_the_files_that_its_code_imports():
    found = steps.sources("idp")
    assert {"idp.py", "model.py", "engine/rotary.py"} <= found.keys() and "evaluate.py" not in found
    assert "world/score.py" in steps.sources("world.score") and all(found.values())
    assert "engine/refit.py" in steps.sources("compress")  # imported in a function
    assert "checkpoints/compression.py" not in steps.sources("compress")  # in `main`, which no step calls


@pytest.mark.parametrize("module", ["evaluate", "study.sweeps", "checkpoints.adapters", "real.lock"])
def test_a_step_knows_every_file_that_python_loads_for_its_code(module):
    """Another process imports the module, and says which of our files it then has: however they are imported, `import
    a.b as c` and `from a import b` too. A package's own file says nothing but what it is."""
    script = (f"import sys, {module}\n"
              "print(*[m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)], sep='\\n')")
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = {os.path.relpath(file, ROOT) for file in loaded.splitlines() if file.startswith(ROOT + os.sep)}
    ours = {file for file in ours if not file.startswith(".") and not file.endswith("__init__.py")}  # nor in a .venv
    assert len(ours) > 10 and ours <= steps.sources(module).keys(), ours - steps.sources(module).keys()


def test_edited_code_is_run_and_edited_comments_are_not(tmp_path):
    """A copy of the code whose rule changes, in a file that the step's own imports through another: the step is made
    again; a comment or docstring changes nothing."""
    for name in ("engine", "study"):
        (tmp_path / name).mkdir()
        shutil.copy(os.path.join(ROOT, name, "__init__.py"), tmp_path / name)
    for name in ("engine/files.py", "engine/memory.py", "engine/script.py", "engine/safetensors.py", "study/steps.py"):
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    script = tmp_path / "job.py"
    script.write_text("from types import SimpleNamespace\nimport user\nfrom study.steps import Run\n"
                      "run = Run(SimpleNamespace(out='out'), None)\nrun.describe_reuse()\n"
                      "print(run.once_json('x', {}, ('user',), user.value))\n")
    (tmp_path / "user.py").write_text("import between\nvalue = between.value\n")
    (tmp_path / "between.py").write_text("from rule import value\n")
    said = []
    for rule in ("def value():\n    return 1\n", "# why\ndef value():\n    \"\"\"One.\"\"\"\n    return 1\n",
                 "def value():\n    return 2\n"):
        (tmp_path / "rule.py").write_text(rule)
        done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
        said.append((done.stdout.strip(), "rule.py" in done.stderr))
    assert said == [("1", False), ("1", False), ("2", True)]


JOB = """
from study.settings import StudyConfig
from study.steps import Run
from study.ask import facts_by_split, read_world, recall
from checkpoints import read_model
from world.score import Subject, answer
from world.small import World

model, encoding = read_model("trained/dense.safetensors")
config = StudyConfig(world=read_world("trained/dense.safetensors"), out="out")
run = Run(config, World(config))
facts = facts_by_split(config.world, 4)["heldout"]
run.describe_reuse()
table = run.once_json("table", {}, ("world.score",),
                      lambda: recall(answer(Subject(model.float()), facts, encoding), facts))
print(table[0], run.log.times[0]["reused"])
"""


def test_an_edited_rule_of_the_study_changes_its_table(tmp_path):
    """A copy of the project: the rule that counts an answer as right is edited, then the texts of the world."""
    for folder in ("engine", "checkpoints", "world", "study"):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for card in ("model", "kernels", "recover", "compress", "idp"):
        shutil.copy(os.path.join(ROOT, card + ".py"), tmp_path)
    shutil.copytree(os.path.join(ROOT, "tests", "golden", "trained"), tmp_path / "trained")
    (tmp_path / "job.py").write_text(JOB)

    def table():
        done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
        recalled, reused = done.stdout.split()
        return float(recalled), reused == "True", done.stderr
    assert table()[:2] == (1.0, False)
    assert table()[:2] == (1.0, True)
    for file, old, new in (("world/score.py", 'gold.strip().rstrip(".") != ""', 'gold.strip().rstrip(".") == ""'),
                           ("world/small.py", 'text_about(self.people["seen"])', 'text_about(self.people["heldout"])')):
        source = (tmp_path / file).read_text()
        assert source.count(old) == 1
        (tmp_path / file).write_text(source.replace(old, new))
        recalled, reused, said = table()
        assert (recalled, reused) == (0.0, False) and file in said  # the first edit still counts nothing as right


def test_a_step_depends_on_the_code_of_its_world(tmp_path):
    """What the small world's World tells, or a real one's, is in no module that the algorithms import."""
    for module, file in (("world.small", "world/small.py"), ("real.world", "real/text.py")):
        run = Run(SimpleNamespace(out=str(tmp_path)), type("AnyWorld", (), {"__module__": module})())
        run.once_json("x", {}, ("model",), lambda: module)
        assert {"model.py", file} <= steps.read_mark(str(tmp_path / "x.json"))["code"].keys()


def test_what_is_made_from_a_result_is_made_again_with_it(tmp_path):
    """Also where only code changed that the second step does not import: the digest of what it is made from is in its
    settings, a compressed model's report included."""
    run, seen, digests = tiny_run(tmp_path), [], []
    for first, report, second in (("a", "", 1), ("b", "", 2), ("b", "[]", 3), ("a", "[]", 4), ("a", "", 1)):
        (tmp_path / "first.json").write_text(first)
        (tmp_path / f"first.json{steps.LAYERS}").write_text(report) if report else (
            tmp_path / f"first.json{steps.LAYERS}").unlink(missing_ok=True)
        settings = steps.with_result({"seed": 0, "from": {"zero.json": "f"}}, str(tmp_path / "first.json"))
        assert settings["seed"] == 0 and settings["from"].keys() == {"zero.json", "first.json"}
        assert run.once_json(f"second-{second}", settings, (), lambda: seen.append(second) or second) == second
        digests.append(settings["from"]["first.json"])
    assert seen == [1, 2, 3, 4] and len(set(digests)) == 4 and digests[0] == digests[4]


def test_a_step_interrupted_before_its_mark_is_not_taken_for_anothers(tmp_path):
    """E20: a result without its mark, another step's mark beside it, and the other way round."""
    run = tiny_run(tmp_path)

    def interrupted(result, path):
        steps.write_text(path, json.dumps(result))
        raise KeyboardInterrupt
    for other in ("first", "second"):
        assert run.once_json("x", {"lr": other}, (), lambda: other) == other
        with pytest.raises(KeyboardInterrupt):
            run.once("x.json", {"lr": 3}, (), lambda: "third", interrupted, None)
        assert run.once_json("x", {"lr": other}, (), lambda: other + " again") == other + " again"
        with pytest.raises(KeyboardInterrupt):
            run.once("x.json", {"lr": 3}, (), lambda: "third", interrupted, None)
        assert run.once_json("x", {"lr": 3}, (), lambda: "third again") == "third again"


@pytest.mark.parametrize("what", ["json", "adapter"])
def test_a_step_on_a_full_disk_leaves_nothing_and_the_next_run_goes_on(tmp_path, what):
    run, model = tiny_run(tmp_path), GPT(GPTConfig(vocab_size=300, context=16, n_layer=1, n_head=2, n_embd=8))
    step = {"json": lambda: run.once_json("x", {}, (), lambda: ["a word"] * 500),
            "adapter": lambda: run.once("x", {}, (), lambda: [torch.ones(12, 8)],
                                        lambda tensors, path: save_tensors(path, model, "prompt", tensors),
                                        lambda path: load_tensors(path, model, "prompt"))}[what]
    for size in (50, 400, 550):
        with room(size), pytest.raises(OSError) as error:
            step()
        assert error.value.errno == errno.EFBIG and str(error.value.filename).startswith(str(tmp_path))
        assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [steps.LOCK]
    made, again = step(), step()
    assert [t["reused"] for t in run.log.times] == [False, True] and str(made) == str(again)


# ---- two processes in one folder

WORKER = """
import pathlib, sys, time
sys.path.insert(0, {root!r})
from types import SimpleNamespace
from engine.script import guard
from study import steps
from study.steps import Run
out, (what, *words) = {out!r}, sys.argv[1:]
def main():
    run = Run(SimpleNamespace(out=out), None)
    if what == "study":
        run.alone()
        print("at work", flush=True)
        sys.stdin.read()
    for word in words:
        print(run.once_json(word, {{}}, (), lambda: make(run, word)), flush=True)
def make(run, word):
    with open(run.path(word + ".log"), "a") as f:
        f.write(what)
    print("making", flush=True)
    if sys.stdin.read():
        return what
    time.sleep(0.2)
    return what
guard(main, "worker")
"""


def worker(folder, *arguments):
    """Another process at work in `folder`: a study, or a job that makes the steps it is given."""
    script = WORKER.format(root=ROOT, out=str(folder))
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_a_second_study_in_one_folder_is_refused_until_the_first_ends_or_dies(tmp_path):
    first = worker(tmp_path, "study")
    assert first.stdout.readline() == "at work\n"
    for end in ("waits", "dies"):
        out, said = worker(tmp_path, "study").communicate("", timeout=60)
        assert out == "" and said == (f"worker: {tmp_path}: another study is at work in this folder; "
                                      "wait for it, or name another one with --out\n")
        elsewhere = worker(tmp_path / "other", "study")
        assert elsewhere.communicate("", timeout=60)[0] == "at work\n"
        if end == "dies":
            first.kill()
            first.wait()
    after = worker(tmp_path, "study")
    assert after.communicate("", timeout=60)[0] == "at work\n" and after.returncode == 0


def test_a_step_that_two_processes_want_is_made_once(tmp_path):
    """The second waits and reuses it, whether or not a study is at work there; other steps are made meanwhile."""
    study = worker(tmp_path, "study")
    assert study.stdout.readline() == "at work\n"
    first = worker(tmp_path, "first", "x")
    assert first.stdout.readline() == "making\n"
    second, third = worker(tmp_path, "second", "x"), worker(tmp_path, "third", "y")
    assert third.communicate("", timeout=60)[0] == "making\nthird\n"
    assert "x.json: waiting for another process" in second.stderr.readline()
    first.stdin.close()
    assert first.stdout.read() == "first\n" and second.communicate("", timeout=60)[0] == "first\n"
    assert (tmp_path / "x.log").read_text() == "first"
    study.communicate("", timeout=60)


def test_a_step_whose_maker_is_killed_is_made_by_the_next(tmp_path):
    first = worker(tmp_path, "first", "x")
    assert first.stdout.readline() == "making\n"
    second = worker(tmp_path, "second", "x")
    assert "waiting" in second.stderr.readline()
    first.kill()
    first.wait()
    assert second.communicate("", timeout=60)[0] == "making\nsecond\n"


def test_a_folder_is_known_by_the_files_in_it(tmp_path):
    """A checkpoint's folder may hold folders: .cache of a download, other formats. A report beside it is none of it."""
    (tmp_path / "m" / ".cache").mkdir(parents=True)
    (tmp_path / "m" / "config.json").write_text("{}")
    first = steps.digest_of(tmp_path / "m")
    (tmp_path / "m" / ".cache" / "x").write_text("1")
    (tmp_path / "m" / "broken").symlink_to(tmp_path / "nowhere")
    assert steps.digest_of(tmp_path / "m") == first is not None
    (tmp_path / "m" / "config.json").write_text("{ }")
    second = steps.digest_of(tmp_path / "m")
    (tmp_path / "m" / "weights").write_text("2")
    assert len({first, second, steps.digest_of(tmp_path / "m")}) == 3 and steps.digest_of(tmp_path / "n") is None


def test_where_there_are_no_locks_everything_else_works(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    for lacking in (None, SimpleNamespace(lockf=refuse, LOCK_EX=2, LOCK_NB=4, LOCK_UN=8)):
        monkeypatch.setattr(steps, "fcntl", lacking)
        run = tiny_run(tmp_path)
        run.alone()
        assert run.once_json("x", {"a": lacking is None}, (), lambda: "made") == "made"


def test_a_run_keeps_the_memory_that_it_frees(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(steps, "keep_memory", lambda: kept.append(True))
    steps.Run(SimpleNamespace(out=str(tmp_path)), None)
    assert kept
