"""The checklist's rules on results made up so that the answer is known."""
import copy
import json

import numpy as np
import pytest

from invented import with_everything
from study import claims, findings
from study.statistics import Estimate
from test_evaluate import tiny
from world.score import CONTEXT
from world.small import World


def model(tag, base, operation, heldout, displaced=None, **metrics):
    """One row, with an interval of 4 points around its recall."""
    return {"id": tag, "tag": tag, "base": base,
            "operation": operation and {"name": operation, "parameters": {"size": [4]}},
            "metrics": {"recall_heldout": heldout, "perplexity": 3.0, "bytes": 1000, "extra_parameters": 10,
                        "ms_per_question": 5, **metrics},
            "intervals": {"recall_heldout": [heldout - 0.02, heldout + 0.02], "displaced": displaced}}


RESULTS = {"models": [
    model("dense", None, None, 0.9), model("RTN", "dense", "quantize", 0.7, perplexity=3.2, bytes=500),
    model("GPTQ", "dense", "quantize", 0.8, perplexity=3.1, bytes=500),
    model("pruned", "dense", "prune", 0.6, perplexity=4),
    model("LoRA", "GPTQ", "LoRA", 0.85, [0.4, 0.6]), model("IDP", "GPTQ", "IDP", 0.82, [0.1, 0.3])]}
SWEEPS = {
    "sparsity": {"points": [{"series": series, "x": x, "recall_heldout": [r, r - 0.01, r + 0.01]} for series, x, r in (
        ("SparseGPT", 0.25, 0.88), ("SparseGPT", 0.3, 0.8), ("SparseGPT", 0.5, 0.6), ("SparseGPT 2:4", 0.5, 0.5),
        ("magnitude", 0.5, 0.4), ("magnitude 2:4", 0.5, 0.3), ("Wanda", 0.5, 0.4), ("Wanda 2:4", 0.5, 0.3))]}}


def nearer(models, lora, pool):
    """Give LoRA and the pool an interval of what they changed in the outputs' similarity."""
    for m, bounds in zip(models[4:], (lora, pool)):
        m["similarity"] = {"nearer": {"output": bounds}}


def found(results):
    return {rule.__name__: findings.checklist(results)[i][1] for i, (_, rule) in enumerate(findings.FINDINGS)}


def test_what_was_not_measured_is_open():
    assert found(RESULTS) == {
        "displaced": None, "perplexity_hides": True, "early_sparsity_hurts": None, "n_m_is_worse": None,
        "quantization_is_gentler": True, "retrieval_survives": None, "prompts_match_lora": None,
        "longer_prompts_read_better": None, "fewer_parameters": False, "two_regimes": None}
    assert "python -m study sweep sparsity" in findings.show(RESULTS)


def test_without_intervals_nothing_follows():
    results = copy.deepcopy(RESULTS)
    for m in results["models"]:
        m.pop("intervals")
    results["models"][2]["intervals"] = {"recall_heldout": [None, None]}
    holds = found(results)
    assert holds["perplexity_hides"] is holds["quantization_is_gentler"] is holds["displaced"] is None


def test_sweeps_close_what_was_open():
    results = {**RESULTS, "sweeps": copy.deepcopy(SWEEPS)}
    holds = found(results)
    assert holds["early_sparsity_hurts"] and holds["n_m_is_worse"]
    sweep = results["sweeps"]["sparsity"]["points"]
    sweep[1]["recall_heldout"] = [0.86, 0.84, 0.88]  # 4 % of 0.9, and 0 to 8: below and above what hurts
    sweep[5]["recall_heldout"] = [0.395, 0.385, 0.405]  # 2:4 as good as anywhere
    assert found(results)["early_sparsity_hurts"] is found(results)["n_m_is_worse"] is None
    sweep[5]["recall_heldout"] = [0.5, 0.49, 0.51]
    assert found(results)["n_m_is_worse"] is False


def prompted(base, P, perplexity, objective="distillation"):
    """A row repaired by a prompt of P tokens."""
    row = model(f"{base} prompt {P} {objective}", base, "prompt", 0.7, perplexity=perplexity)
    row["operation"]["parameters"] = {"size": P, "objective": objective}
    return row


@pytest.mark.parametrize("rows, now", [
    ([("GPTQ", 8, 3.05), ("GPTQ", 100, 3.05)], False), ([("GPTQ", 8, 3.05), ("GPTQ", 100, 3.04)], True),
    ([("GPTQ", 8, 3.05), ("GPTQ", 100, 3.04), ("RTN", 8, 3.05), ("RTN", 100, 3.05)], False),
    ([("GPTQ", 8, 3.05), ("GPTQ", 100, 3.04), ("GPTQ", 100, 9, "next_token")], True), ([("GPTQ", 8, 3.05)], None)])
def test_the_wrong_divisor_flatters_longer_prompts(rows, now):
    """P2: a loss of ln 7 on 47 text tokens a window prints as exp(ln 7 * 47 / 147) = 1.86 behind 100 prompt tokens."""
    results = {"models": [*RESULTS["models"], *(prompted(*row) for row in rows)]}
    assert found(results)["longer_prompts_read_better"] is now
    held = {"models": [*RESULTS["models"], prompted("RTN", 100, 7.0), prompted("RTN", 0, 7.0)]}
    assert "RTN, 0 to 100 tokens: 7.00 to 7.00, by the wrong divisor 7.00 to 1.86" in findings.show(held)


def test_perplexity_is_over_so_many_text_tokens(tmp_path):
    assert World(tiny(tmp_path)).windows[:, CONTEXT + 1:].shape[1] == findings.SCORED


@pytest.mark.parametrize("change, now", [
    (dict(), None), (dict(confirmed=True), True), (dict(confirmed=False), None),
    (dict(confirmed=True, intervals={"displaced": [-0.1, 0.6]}), None)])
def test_displaced_needs_test_and_interval(change, now):
    results = copy.deepcopy(RESULTS)
    results["models"][4] |= change
    assert found(results)["displaced"] is now
    text = findings.show(results)
    assert ("GPTQ: at least 40.0 % of what was lost (LoRA)" in text) == (now is True)
    results["models"][2]["kind"] = "control"  # its answer is known
    assert found(results)["displaced"] is None


@pytest.mark.parametrize("a, b, interval, now", [
    ("IDP", "LoRA", [0.01, 0.2], True), ("IDP", "LoRA", [-0.04, 0.2], True), ("IDP", "LoRA", [-0.06, 0.2], None),
    ("IDP", "LoRA", [-0.3, -0.2], False), ("LoRA", "IDP", [0.2, 0.3], False), ("LoRA", "IDP", [-0.2, 0.04], True),
    ("IDP", "LoRA", [None, None], None), ("IDP", "prompt", [0.1, 0.2], None)])
def test_prompts_beside_lora_by_the_named_pairs(a, b, interval, now):
    """Pairs are named by tags, which other bases share; ids are others."""
    results = copy.deepcopy(RESULTS)
    results["models"] += [model("LoRA", "pruned", "prompt", 0.8), model("IDP", "pruned", "LoRA", 0.8)]
    for m in results["models"]:
        m |= {"id": f"id of {m['tag']} on {m['base']}", "base": m["base"] and f"id of {m['base']} on " + (
            "None" if m["base"] == "dense" else "dense")}
    results["pairs"] = [{"base": "GPTQ", "a": a, "b": b, "interval": interval, "verdict": "whatever"}]
    holds, said = findings.prompts_match_lora(results)
    assert holds is now and ("not measured" in said) == (b == "prompt")
    assert b == "prompt" or said.startswith("IDP (10 parameters) beside LoRA (10 parameters) on GPTQ: ")


def test_the_studys_own_pairs_are_found():
    """Of every compressed model the prompt beside LoRA, and of all but one the pool, which stands on four of five."""
    study, _ = with_everything(people=2)
    equal = {m["id"]: Estimate(0.1, np.full((50, 1), 0.1)) for m in study["models"]}
    rows = [m for m in study["models"] if m["kind"] != "control"]
    study["pairs"] = claims.pairs(rows, equal, ("prompt 8", "prompt 32", "IDP 4 x 8", "biases"))
    holds, said = findings.prompts_match_lora(study)
    assert holds is True and said.count("non-inferior") == 5 + 4
    assert "prompt 8 (768 parameters) beside LoRA rank 8 (55,296 parameters) on GPTQ 3 bits: " in said


def test_claims_stand_first():
    text = findings.show({**RESULTS, "claims": [{"statement": "displaced(prompt) > 0", "verdict": "holds"}]})
    assert text.startswith("stated before the run:\ndisplaced(prompt) > 0: holds\nexploratory:\n")


@pytest.mark.parametrize("name, change, now", [
    ("perplexity_hides", lambda m: [x["metrics"].update(perplexity=9) for x in m[1:]], False),
    ("perplexity_hides", lambda m: [x["intervals"].update(recall_heldout=[0.79, 0.83]) for x in m[1:4]], None),
    ("quantization_is_gentler", lambda m: m[2]["metrics"].update(bytes=2000), False),
    ("quantization_is_gentler", lambda m: m[3]["intervals"].update(recall_heldout=[0.83, 0.86]), False),
    ("quantization_is_gentler", lambda m: m[3]["intervals"].update(recall_heldout=[0.77, 0.79]), None),
    ("fewer_parameters", lambda m: m[4]["metrics"].update(extra_parameters=210), True),
    ("fewer_parameters", lambda m: m[4]["metrics"].update(extra_parameters=209), False),
    ("fewer_parameters", lambda m: m.pop(), None),
    ("two_regimes", lambda m: nearer(m, [0.1, 0.2], [-0.2, 0.05]), True),
    ("two_regimes", lambda m: nearer(m, [0.1, 0.2], [-0.2, 0.15]), None),
    ("two_regimes", lambda m: nearer(m, [0.1, 0.2], [0.2, 0.3]), False)])
def test_a_rule_follows_the_intervals(name, change, now):
    results = copy.deepcopy(RESULTS)
    change(results["models"])
    assert found(results)[name] is now


@pytest.mark.parametrize("read, recall, holds", [  # dense: 0.95 read, 0.9 recalled, each within a point
    (0.93, 0.6, True), (0.80, 0.1, False), (0.93, 0.86, None), (0.86, 0.6, None), (0.60, 0.86, False)])
def test_retrieval(read, recall, holds):
    results = copy.deepcopy(RESULTS)
    dense, _, _, pruned = results["models"][:4]
    for m, know, r in ((dense, 0.9, 0.95), (pruned, recall, read)):
        m["intervals"]["recall_heldout"] = [know - 0.01, know + 0.01]
        m["tasks"] = {"retrieval": {"novel": {"exact": [r, r - 0.01, r + 0.01]}}}
    assert found(results)["retrieval_survives"] is holds


def test_main(tmp_path, capsys):
    path = tmp_path / "results.json"
    for content, error, word in ((None, OSError, "results.json"), ("{}", ValueError, "no study"),
                                 ("{", ValueError, "results.json")):
        if content:
            path.write_text(content)
        with pytest.raises(error, match=word):
            findings.main(["--results", str(path)])
    for elsewhere in ({"models": []}, {"models": 3}, {"models": [{"id": "a", "metrics": {}}]}):
        path.write_text(json.dumps(elsewhere))
        with pytest.raises(ValueError, match="results.json is not as python evaluate.py writes it"):
            findings.main(["--results", str(path)])
    path.write_text(json.dumps(RESULTS))
    findings.main(["--results", str(path)])
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(findings.FINDINGS)
