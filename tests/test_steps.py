"""Steps are done once, and again when settings, code or their own bytes change."""
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from study import steps
from study.steps import Run

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


@pytest.mark.parametrize("damage", ["", "[1, 2", "null"])
def test_a_damaged_result_or_mark_is_made_again(tmp_path, damage):
    run = tiny_run(tmp_path)
    for name in ("x.json", "x.json" + steps.MARK):
        run.once_json("x", {}, (), lambda: [1, 2, 3])
        (tmp_path / name).write_text(damage)
        assert run.once_json("x", {}, (), lambda: "again") == "again"
        assert run.once_json("x", {}, (), lambda: "never") == "again"


def test_a_step_knows_the_files_that_its_code_imports():
    found = steps.sources("idp")
    assert {"idp.py", "recover.py", "model.py"} <= found.keys() and "evaluate.py" not in found
    assert "world/score.py" in steps.sources("world.score") and all(found.values())


def test_edited_code_is_run_and_edited_comments_are_not(tmp_path):
    """A copy of the code whose rule changes: the step is made again; a comment or docstring changes nothing."""
    for name in ("engine", "study"):
        (tmp_path / name).mkdir()
        shutil.copy(os.path.join(ROOT, name, "__init__.py"), tmp_path / name)
    for name in ("engine/script.py", "engine/safetensors.py", "study/steps.py"):
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    script = tmp_path / "job.py"
    script.write_text("from types import SimpleNamespace\nimport rule\nfrom study.steps import Run\n"
                      "run = Run(SimpleNamespace(out='out'), None)\nrun.describe_reuse()\n"
                      "print(run.once_json('x', {}, ('rule',), rule.value))\n")
    said = []
    for rule in ("def value():\n    return 1\n", "# why\ndef value():\n    \"\"\"One.\"\"\"\n    return 1\n",
                 "def value():\n    return 2\n"):
        (tmp_path / "rule.py").write_text(rule)
        done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
        said.append((done.stdout.strip(), "rule.py" in done.stderr))
    assert said == [("1", False), ("1", False), ("2", True)]
