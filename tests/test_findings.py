"""The checklist's rules on results made up so that the answer is known."""
import copy
import json

import pytest

from study import findings


def model(tag, base, operation, heldout, **metrics):
    return {"id": tag, "tag": tag, "base": base,
            "operation": operation and {"name": operation, "parameters": {"size": [4]}},
            "metrics": {"recall_heldout": heldout, "perplexity": 3.0, "bytes": 1000, "extra_parameters": 10,
                        "ms_per_question": 5, **metrics}}


RESULTS = {"models": [
    model("dense", None, None, 0.9), model("RTN", "dense", "quantize", 0.7, perplexity=3.2, bytes=500),
    model("GPTQ", "dense", "quantize", 0.8, perplexity=3.1, bytes=500),
    model("pruned", "dense", "prune", 0.6, perplexity=4),
    model("LoRA", "GPTQ", "LoRA", 0.85, displaced=0.5), model("IDP", "GPTQ", "IDP", 0.82, displaced=0.2)]}
SWEEPS = {
    "sparsity": {"points": [{"series": series, "x": x, "recall_heldout": [r, r, r]} for series, x, r in (
        ("SparseGPT", 0.25, 0.88), ("SparseGPT", 0.3, 0.8), ("SparseGPT", 0.5, 0.6), ("SparseGPT 2:4", 0.5, 0.5),
        ("magnitude", 0.5, 0.4), ("magnitude 2:4", 0.5, 0.3), ("Wanda", 0.5, 0.4), ("Wanda 2:4", 0.5, 0.3))]},
    "prompt-length": {"points": [{"series": "GPTQ", "x": x, "perplexity": 3.05,
                                  "perplexity_wrong_divisor": 3.05 - x / 99} for x in (1, 32)]}}


def nearer(models, lora, pool):
    """Give LoRA and the pool an interval of what they changed in the outputs' similarity."""
    for m, bounds in zip(models[4:], (lora, pool)):
        m["similarity"] = {"nearer": {"output": bounds}}


def found(results):
    return {rule.__name__: findings.checklist(results)[i][1] for i, (_, rule) in enumerate(findings.FINDINGS)}


def test_what_was_not_measured_is_open():
    assert found(RESULTS) == {
        "perplexity_hides": True, "early_sparsity_hurts": None, "n_m_is_worse": None, "quantization_is_gentler": True,
        "retrieval_survives": None, "prompts_match_lora": False, "longer_prompts_read_better": None,
        "fewer_parameters": False, "less_latency": False, "two_regimes": None}
    assert "python evaluate.py --sweep sparsity" in findings.show(RESULTS)


def test_sweeps_close_what_was_open():
    results = {**RESULTS, "sweeps": SWEEPS}
    holds = found(results)
    assert holds["early_sparsity_hurts"] and holds["n_m_is_worse"] and holds["longer_prompts_read_better"] is False
    assert "by the wrong divisor 3.04 to 2.73" in findings.show(results)


@pytest.mark.parametrize("name, change, now", [
    ("perplexity_hides", lambda m: [x["metrics"].update(perplexity=9) for x in m[1:]], False),
    ("quantization_is_gentler", lambda m: m[2]["metrics"].update(bytes=2000), False),
    ("quantization_is_gentler", lambda m: m[3]["metrics"].update(recall_heldout=0.85), False),
    ("prompts_match_lora", lambda m: m[5]["metrics"].update(displaced=0.5), True),
    ("prompts_match_lora", lambda m: m[5]["metrics"].update(displaced=None), None),
    ("fewer_parameters", lambda m: m[4]["metrics"].update(extra_parameters=210), True),
    ("fewer_parameters", lambda m: m[4]["metrics"].update(extra_parameters=209), False),
    ("fewer_parameters", lambda m: m.pop(), None),
    ("less_latency", lambda m: m[5]["metrics"].update(ms_per_question=2), True),
    ("less_latency", lambda m: m[5]["metrics"].update(ms_per_question=2.1), False),
    ("two_regimes", lambda m: nearer(m, [0.1, 0.2], [-0.2, 0.05]), True),
    ("two_regimes", lambda m: nearer(m, [0.1, 0.2], [-0.2, 0.15]), False)])
def test_a_rule_follows_the_numbers(name, change, now):
    results = copy.deepcopy(RESULTS)
    change(results["models"])
    assert found(results)[name] is now


@pytest.mark.parametrize("pruned, recall, holds", [(0.9, 0.6, True), (0.8, 0.1, False),  # of 0.95, of 0.9
                                                   (0.93, 0.86, True), (0.92, 0.86, False), (0.95, 0.9, False)])
def test_retrieval(pruned, recall, holds):
    results = copy.deepcopy(RESULTS)
    results["models"][3]["metrics"]["recall_heldout"] = recall
    for m, read in ((results["models"][0], 0.95), (results["models"][3], pruned)):
        m["tasks"] = {"retrieval": {"novel": {"exact": [read, 0, 1]}}}
    assert found(results)["retrieval_survives"] is holds


def test_main(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    for content, word in ((None, "No such file"), ("{}", "no study"), ("{", "Expecting")):
        if content:
            path.write_text(content)
        monkeypatch.setattr("sys.argv", ["findings.py", "--results", str(path)])
        with pytest.raises(SystemExit) as leaving:
            findings.main()
        assert leaving.value.code == 2 and word in capsys.readouterr().err
    path.write_text(json.dumps(RESULTS))
    findings.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(findings.FINDINGS)
