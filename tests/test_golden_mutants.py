"""model.json, idp.json, repair.json, kernels.json and world.json would notice a mistake: each of the edits in
golden/mutants.json makes one. Those of the compressors are in test_golden_compress.py.

    python -m pytest -m slow tests/test_golden_mutants.py      # half a minute
"""
import json

import pytest

from golden import make_idp, make_kernels, make_model, make_repair, make_world
from golden.files import differing, read
from golden.mutation import ROOT, check_edits, edited, mistakes

MUTANTS = mistakes("mutants.json")
CHANGED = ("model", "idp", "recover", "kernels", "engine.cache", "engine.compiling", "engine.grids", "engine.losses",
           "engine.muon", "engine.packing", "engine.rotary", "world", "world.facts", "world.items", "world.score")


def different():
    """The cases of the five files that the code, imported anew, does not reproduce."""
    file = {name: read(f"{name}.json") for name in ("model", "idp", "repair", "kernels", "world")}
    models, world = file["model"]["models"], make_world.Code()
    people = world.facts.make_world(world.facts.WorldConfig(**make_world.WORLD))
    found = [] if [p._asdict() for p in people] == file["world"]["world"]["people"] else ["people"]
    code = make_kernels.Code()
    found += differing(lambda case: make_kernels.result(code, case), file["kernels"])
    found += differing(lambda case: make_world.result(world, file["world"], case), file["world"],
                       **make_world.TOLERANCE)
    for maker, name, tolerance in ((make_model, "model", {}), (make_idp, "idp", {}),
                                   (make_repair, "repair", make_repair.TOLERANCE)):
        code = maker.Code()
        found += differing(lambda case: maker.result(code, models, case), file[name], **tolerance)
    return found


def caught(mutant):
    """Whether the golden files differ from what the code with this edit computes; one that raises is caught, too."""
    with edited(mutant, CHANGED):
        try:
            return bool(different())
        except Exception:  # whatever a changed code may raise when it is imported
            return True


def test_every_edit_has_its_line():
    check_edits(MUTANTS, 90)
    assert {m["file"].removesuffix(".py").replace("/", ".") for m in MUTANTS} <= set(CHANGED)  # it is imported anew


def test_every_mutant_of_the_whole_code_has_its_line_and_its_tests():
    """Those of tests/mutants.py, which runs them one by one."""
    mutants = json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))
    check_edits(mutants, 165)
    assert [m for m in mutants if not all((ROOT / test).exists() for test in m["test"].split())] == []


def test_a_mistake_in_any_file_is_tried():
    """The first one of each file is caught: whichever module it stands in, it is imported anew."""
    assert [file for file, mutant in {m["file"]: m for m in MUTANTS[::-1]}.items() if not caught(mutant)] == []


@pytest.mark.slow
def test_mistakes_are_caught():
    """Of each of about a hundred plausible mistakes, one line each, some number in the golden files must tell."""
    assert not caught({"file": "idp.py", "old": "class PromptPool", "new": "class  PromptPool"})
    assert [mutant["mistake"] for mutant in MUTANTS if not caught(mutant)] == []
