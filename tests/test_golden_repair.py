"""tests/golden/repair.json against the code of the day, and against golden/twin.py and sums written out here."""
import math

import numpy as np
import pytest
import torch

from golden import make_repair, twin
from golden.files import differing, floats, read

FILE, MODELS = read("repair.json"), read("model.json")["models"]
CASES = {case["name"]: case for case in FILE["cases"]}


def close(got, expected, atol=1e-6):
    """Within what float32 leaves of a loss."""
    got = torch.as_tensor(np.asarray(got)) if not isinstance(got, torch.Tensor) else got
    torch.testing.assert_close(got.detach().double(), floats(expected), rtol=1e-5, atol=atol)


def test_golden():
    code = make_repair.Code()
    assert differing(lambda case: make_repair.result(code, MODELS, case), FILE, **make_repair.TOLERANCE) == []


def test_the_file_is_the_one_that_the_script_writes():
    assert make_repair.cases() == [{k: v for k, v in case.items() if k != "result"} for case in FILE["cases"]]


@pytest.mark.parametrize("name", ["LoRA, a layer", "LoRA, merged under zeros"])
def test_a_layer(name):
    """W + (alpha / rank) B A; under zeros the update is masked, and `lost` is the share of its squares so lost."""
    given, result = {k: np.array(v) for k, v in CASES[name]["given"].items()}, CASES[name]["result"]
    W, update = given["W"], given["alpha"] / 2 * given["B"] @ given["A"]
    kept = np.where(W == 0, 0, update) if "zeros" in name else update
    close(given["x"] @ (W + update).T + given["bias"], result["y"])
    close(W + kept, result["merged"])
    close(given["x"] @ (W + kept).T + given["bias"], result["y_merged"])
    close(((update - kept) ** 2).sum() / (update**2).sum(), result["lost"])
    assert ("zeros" in name) == bool(result["lost"] > 0.05) == bool((W == 0).any())


def cross_entropy(logits, tokens):
    """One loss a token."""
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    return -log_p[torch.arange(len(tokens)), tokens]


@pytest.mark.parametrize("name", ["LoRA, a model", "biases, a model"])
def test_a_model(name):
    """The repair is part of the weights; gradients of the mean over all tokens by differentiating the twin."""
    given, result, made = CASES[name]["given"], CASES[name]["result"], MODELS[CASES[name]["model"]]
    config, w, trained = made["config"], floats(made["weights"]), {}
    for layer, parts in given.get("layers", {}).items():
        trained[layer] = {key: value.requires_grad_() for key, value in floats(parts).items()}
        weight = f"{layer}.weight"
        w[weight] = w[weight] + given["alpha"] / 2 * trained[layer]["B"] @ trained[layer]["A"]
    for layer, shift in given.get("shifts", {}).items():
        trained[layer] = {"shift": floats(shift).requires_grad_()}
        w[f"{layer}.bias"] = w[f"{layer}.bias"] + trained[layer]["shift"]
        close(w[f"{layer}.bias"], result["merged"][layer])
    every = []
    for b, ids in enumerate(given["ids"]):
        logits = twin.logits(config, w, ids[:-1])
        close(logits, result["logits"][b])
        every.append(cross_entropy(logits, ids[1:]))
        close(every[-1], result["losses"][b])
    torch.stack(every).mean().backward()
    for layer, parts in trained.items():
        for key, p in parts.items():
            close(p.grad, result["gradients"][layer][key])
            assert float(p.grad.abs().max()) > 1e-3


def test_bias_correction():
    """b = (W - W') E[x] layer after layer, x what the compressed and corrected layers before give: so each layer's mean
    output is the dense layer's, on the inputs of the compressed model."""
    case = CASES["bias correction"]
    made, given = MODELS[case["model"]], case["given"]
    config, dense = made["config"], floats(made["weights"])
    w = {**dense, **floats(given["compressed"])}
    xs = [w["wte.weight"][ids] + w["wpe.weight"][[t + config["position_offset"] for t in range(len(ids))]]
          for ids in given["ids"]]

    def corrected(name, inputs):
        mean = torch.cat(inputs).mean(0)
        shift = (dense[f"{name}.weight"] - w[f"{name}.weight"]) @ mean
        close(shift, case["result"][name])
        w[f"{name}.bias"] = w[f"{name}.bias"] + shift
        return [twin.linear(w, name, x) for x in inputs]
    for i in range(config["n_layer"]):
        normed = [twin.norm(config, w, f"blocks.{i}.norm1", x) for x in xs]
        attended = [twin.attend(config, *twin.heads(config, w, i, x, range(len(x))), None) for x in normed]
        xs = [x + y for x, y in zip(xs, corrected(f"blocks.{i}.attn.o", attended))]
        ups = [twin.linear(w, f"blocks.{i}.mlp.up", twin.norm(config, w, f"blocks.{i}.norm2", x)) for x in xs]
        xs = [x + y for x, y in zip(xs, corrected(f"blocks.{i}.mlp.down", [up.clamp(min=0) for up in ups]))]


def test_next_token():
    given, result = CASES["next token"]["given"], CASES["next token"]["result"]
    logits = floats(given["logits"]).requires_grad_()
    every = torch.stack([cross_entropy(row, ids[1:]) for row, ids in zip(logits, given["ids"])])
    close(every, result["losses"])
    every.mean().backward()
    close(logits.grad, result["gradient"])


def test_distillation():
    """The teacher's three likeliest tokens and a bucket for the rest, which holds at least 1e-6; a loop over tokens."""
    given, result = CASES["distillation"]["given"], CASES["distillation"]["result"]
    least = 0
    for b in range(2):
        for t in range(3):
            p, q = (np.exp(z) / np.exp(z).sum() for z in (np.array(given[who][b][t]) for who in ("teacher", "logits")))
            top = np.argsort(-p)[:given["k"]]
            assert top.tolist() == result["tokens"][b][t]
            close(np.log(p[top]), result["log_p"][b][t], atol=1e-5)
            rest_p, rest_q = max(1 - p[top].sum(), 1e-6), max(1 - q[top].sum(), 1e-6)
            least += (rest_p == 1e-6) + (rest_q == 1e-6)
            loss = (p[top] * np.log(p[top] / q[top])).sum() + rest_p * math.log(rest_p / rest_q)
            assert result["losses"][b][t] == pytest.approx(loss, rel=1e-4, abs=2e-6)
    assert least >= 1


def test_schedule():
    given, result = CASES["schedule"]["given"], CASES["schedule"]["result"]
    for settings, rates in zip(given["settings"], result["rates"]):
        steps, warmup = settings["steps"], settings["warmup"]
        assert rates == pytest.approx([twin.rate(steps, step, warmup) for step in range(steps)])
    assert [sum(a < b for a, b in zip(r, r[1:])) for r in result["rates"]] == [0, 0, 1, 1, 1]  # warm steps, less one


@pytest.mark.parametrize("name", ["AdamW", "AdamW, each clipped", "Muon"])
def test_steps(name):
    """Each parameter on its own, from the clipped gradients: decay on matrices only, Muon for those of the blocks."""
    given, result = CASES[name]["given"], CASES[name]["result"]
    s = {"warmup": 0.05, "clip": 1.0, "clip_each": False, "muon": 0.0, "betas": [0.9, 0.99], **given["settings"]}
    names = list(given["parameters"])
    each = [[np.array(g[name]) for name in names] for g in given["gradients"]]
    norms = [math.sqrt(sum((g**2).sum() for g in step)) for step in each]
    assert min(norms) < 1 < max(norms)
    each = [[twin.clipped([g], s["clip"])[0] for g in step] if s["clip_each"] else twin.clipped(step, s["clip"])
            for step in each]
    factors = [twin.rate(s["steps"], step, s["warmup"]) for step in range(s["steps"])]
    for i, parameter in enumerate(names):
        start, gradients = np.array(given["parameters"][parameter]), [step[i] for step in each]
        decay = s["weight_decay"] if start.ndim == 2 else 0.0
        if s["muon"] and parameter.startswith("blocks"):
            after = twin.muon(start, gradients, [s["muon"] * f for f in factors], decay)
        else:
            after = twin.adamw(start, gradients, [s["lr"] * f for f in factors], decay, s["betas"])
        for step, expected in zip(after, result["after"], strict=True):
            close(step, expected[parameter], atol=1e-7)
