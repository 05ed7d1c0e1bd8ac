"""tests/golden/model.json against the code of the day, and against golden/twin.py, which calls no line of ours."""
import pytest
import torch

from golden import make_model, twin
from golden.files import differing, floats, read, same

FILE = read("model.json")
CASES = {case["name"]: case for case in FILE["cases"]}
WEIGHTS = {name: floats(made["weights"]) for name, made in FILE["models"].items()}


def read_case(name):
    """(config, weights, what is given, the result) of a case."""
    case = CASES[name]
    return FILE["models"][case["model"]]["config"], WEIGHTS[case["model"]], case["given"], case["result"]


def close(got, expected):
    """Within 1e-6: the rotary table of ours is rounded to float32."""
    torch.testing.assert_close(got, floats(expected), rtol=1e-6, atol=1e-6)


def test_golden():
    code = make_model.Code()
    assert differing(lambda case: make_model.result(code, FILE["models"], case), FILE) == []


def test_the_file_is_the_one_that_the_script_writes():
    """What is given; the results are compared above, as their last digits differ between machines."""
    assert make_model.models() == FILE["models"]
    assert make_model.cases() == [{k: v for k, v in case.items() if k != "result"} for case in FILE["cases"]]


def test_a_difference_is_seen():
    assert same([1, 2.0, {"a": [0.5]}], [1, 2.0 + 1e-9, {"a": [0.5]}]) and same(0.0, 1e-8)
    for other in ([1, 2.0 + 1e-5, {"a": [0.5]}], [2, 2.0, {"a": [0.5]}], [1, 2.0, {"b": [0.5]}],
                  [1, 2.0, {"a": [0.5, 1]}]):
        assert not same([1, 2.0, {"a": [0.5]}], other)


def test_step_by_step():
    config, w, given, result = read_case("step by step")
    for b, ids in enumerate(given["ids"]):
        found = {name: [] for name in result}
        x = w["wte.weight"][ids]
        norm1 = twin.norm(config, w, "blocks.0.norm1", x)
        q, k, v = twin.heads(config, w, 0, norm1, list(range(len(ids))))
        attention = twin.linear(w, "blocks.0.attn.o", twin.attend(config, q, k, v, None))
        norm2 = twin.norm(config, w, "blocks.0.norm2", x + attention)
        mlp = twin.mlp(config, w, 0, norm2)
        logits, _ = twin.forward(config, w, x)
        found = dict(embed=x, norm1=norm1, q=q, k=k, v=v, attention=attention, norm2=norm2, mlp=mlp, logits=logits,
                     **{"block 0": x + attention + mlp})
        for name, value in found.items():
            close(value, result[name][b])
        close(floats(result["norm"][b]) @ w["wte.weight"].T, result["logits"][b])
        close(twin.norm(config, w, "norm", floats(result["block 1"][b])), result["norm"][b])


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_logits(name):
    config, w, given, result = read_case(name)
    for ids, expected in zip(given["ids"], result["logits"]):
        close(twin.logits(config, w, ids), expected)


@pytest.mark.parametrize("name", ["ragged cache", "opt, ragged cache", "llama, ragged cache"])
def test_a_cache_changes_nothing(name):
    """A row behind its own tokens alone, without a cache; keys and values those of the whole row."""
    config, w, given, result = read_case(name)
    for b, (ids, n, more) in enumerate(zip(given["ids"], given["lengths"], given["more"])):
        logits, kept = twin.forward(config, w, w["wte.weight"][ids[:n] + more])
        close(logits[:n], result["logits"][b])
        close(logits[n:], result["more"][b])
        close(torch.stack(kept[0]), result["kv"][b])
        assert result["length"][b] == n + len(more)


def test_a_prompt_and_a_prefix():
    config, w, given, result = read_case("prompt")
    prompt = floats(given["prompt"])
    for ids, expected in zip(given["ids"], result["logits"]):
        close(twin.logits(config, w, ids, prompt), expected)
        close(twin.logits(config, w, ids, prefix=floats(result["prefix"])), expected)  # what the prompt leaves behind
    close(torch.stack([torch.stack(kv) for kv in twin.forward(config, w, prompt)[1]]), result["prefix"])
    config, w, given, result = read_case("prefix")
    for ids, expected in zip(given["ids"], result["logits"]):
        close(twin.logits(config, w, ids, prefix=floats(given["prefix"])), expected)


@pytest.mark.parametrize("name", ["greedy", "greedy until a stop"])
def test_greedy(name):
    """Right behind each row's own tokens; behind the new ones a shorter row has zeros."""
    config, w, given, result = read_case(name)
    n, width = given["max_new_tokens"], len(given["ids"][0]) + given["max_new_tokens"]
    for ids, length, found in zip(given["ids"], given["lengths"], result["ids"]):
        new = twin.greedy(config, w, ids[:length], n, given["stop"])
        assert found == new + [0] * (width - len(new))
    assert len({tuple(row) for row in result["ids"]}) == 3
    assert (result["ids"] == CASES["greedy"]["result"]["ids"]) == (name == "greedy")


def test_rotary_tables():
    """cos and sin (context, 2, hs / 2); of Llama 3's scaling the frequencies by its three cases."""
    for name in ("rotary table", "rotary table, theta 100", "rotary table, Llama 3's scaling"):
        case = CASES[name]
        config = case["given"].get("config") or FILE["models"][case["model"]]["config"]
        half, scaling = config["n_embd"] // config["n_head"] // 2, config.get("rope_scaling")
        for i in range(half):
            speed = config["rope_theta"] ** (-i / half)
            if scaling:
                wavelength = 2 * torch.pi / speed
                low = scaling["original_context"] / scaling["low_freq_factor"]
                high = scaling["original_context"] / scaling["high_freq_factor"]
                if wavelength > low:
                    speed /= scaling["factor"]
                elif wavelength > high:
                    part = ((scaling["original_context"] / wavelength - scaling["low_freq_factor"])
                            / (scaling["high_freq_factor"] - scaling["low_freq_factor"]))
                    speed = (1 - part) * speed / scaling["factor"] + part * speed
            for t in range(config["context"]):
                angle = torch.tensor(t * speed, dtype=torch.float64)
                row = torch.tensor(case["result"]["table"])[t, :, i]
                torch.testing.assert_close(row, torch.stack([angle.cos(), angle.sin()]).float(), rtol=0, atol=2e-7)
