"""tests/golden/compress.json, compress_edges.json and calibrate.json against the code of the day; and that they would
notice a mistake: each of the edits in mutants_compress.json makes one.

    python -m pytest tests/test_golden_compress.py
    python -m pytest -m slow tests/test_golden_compress.py      # the mistakes, a minute or two
"""
import pytest
import torch

from golden import make_compress
from golden.mutation import check_edits, edited, mistakes

CHANGED = ("compress", "kernels", "engine.grids", "engine.columns", "engine.refit", "engine.layers", "engine.settings",
           "engine.packing", "engine.decode", "engine.compiling")
MUTANTS = mistakes("mutants_compress.json")


def test_golden():
    files = make_compress.read()
    called = {case["call"] for case in files["compress.json"]["cases"]}
    assert called >= {"rtn", "gptq", "magnitude", "wanda", "sparsegpt"}
    assert make_compress.differences(make_compress.Code(), files) == []


def test_the_files_are_those_that_the_script_writes():
    """What is given and asked for; the results are compared above, as their last digits differ between machines."""
    files = make_compress.read()
    for name, given, cases in (("compress.json", make_compress.problems(), make_compress.CASES),
                               ("compress_edges.json", make_compress.edges(), make_compress.EDGES)):
        assert [(c["call"], c["settings"], c["problem"]) for c in files[name]["cases"]] == [tuple(c) for c in cases]
        for key, problem in given.items():
            for letter, t in problem.items():
                stored = torch.tensor(files[name]["problems"][key][letter], dtype=torch.float64)
                torch.testing.assert_close(stored, t.double(), rtol=1e-12, atol=0)


def test_a_difference_is_seen():
    """The comparison itself: one code, one digit of a scale, a missing key, an exception."""
    files, code = make_compress.read(), make_compress.Code()
    case = files["compress.json"]["cases"][3]
    case["result"]["codes"][0][0] ^= 1
    files["compress_edges.json"]["cases"][0]["result"]["R"][0][0] *= 1 + 1e-5
    files["calibrate.json"]["compressed"][0]["report"]["damp"][0] *= 2
    del files["calibrate.json"]["walk"]["H"]["blocks.0.attn.q"]
    files["compress.json"]["cases"][0]["settings"]["bits"] = 1
    found = make_compress.differences(code, files)
    assert len(found) == 5 and sum("ValueError" in what for what in found) == 1


def caught(mutant, files):
    """Whether the golden files differ from what the code with this edit computes."""
    with edited(mutant, CHANGED):
        return bool(make_compress.differences(make_compress.Code(), files))


def test_every_edit_has_its_line():
    check_edits(MUTANTS, 70)


def test_a_mistake_in_any_file_is_tried():
    """The first two of each file are caught: whichever module they stand in, it is imported anew for each."""
    files, first = make_compress.read(), {}
    for mutant in MUTANTS:
        first.setdefault(mutant["file"], []).append(mutant)
    assert [m["mistake"] for few in first.values() for m in few[:2] if not caught(m, files)] == []


@pytest.mark.slow
def test_mistakes_are_caught():
    """Of each of 90 plausible mistakes, one line each, some number in the golden files must tell."""
    files = make_compress.read()
    assert not caught({"file": "engine/grids.py", "old": "class Quantized", "new": "class  Quantized"}, files)
    survived = [mutant["mistake"] for mutant in MUTANTS if not caught(mutant, files)]
    assert survived == []
