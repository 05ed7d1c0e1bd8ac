"""
Writes repair.json: LoRA and biases beside a layer and merged, losses and their gradients, the schedule, some steps of
AdamW and Muon. The GPTs are those of model.json. README.md beside this file says how to check a port against it.

    python tests/golden/make_repair.py
"""
import pathlib
import sys

import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from golden import make_model  # noqa: E402
from golden.files import draw, floats, numbers, read, short, whole, write  # noqa: E402

TOLERANCE = dict(rel=1e-5, abs_=1e-6)  # losses are float32
SMALL = dict(vocab_size=5, context=4, n_layer=1, n_head=1, n_embd=4, n_hidden=6)  # whose matrices Muon trains
TRAINED = {"wte.weight": (5, 4), "blocks.0.attn.q.weight": (4, 4), "blocks.0.mlp.up.weight": (6, 4),
           "blocks.0.mlp.down.weight": (4, 6), "norm.weight": (4,)}


# ---- the inputs

def lists(seed, *shape, scale=1.0):
    """Normal numbers of three digits."""
    return numbers(short(draw(seed, *shape) * scale, 3))


def schedules():
    """What FitConfig.rate is asked for: halves of warm steps round to even."""
    return [{"steps": steps, "warmup": warmup} for steps, warmup in
            ((1, 0.05), (8, 0.05), (8, 0.3), (30, 0.05), (50, 0.05))]


def training(seed, shapes, loud):
    """Parameters {name: lists} and the gradient of each at every step, `loud` times as large."""
    return {"parameters": {name: lists(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())},
            "gradients": [{name: lists(seed + 100 * (t + 1) + i, *shape, scale=scale)
                           for i, (name, shape) in enumerate(shapes.items())} for t, scale in enumerate(loud)]}


def cases():
    """Every case without its result."""
    lora = {"W": lists(1, 5, 4), "bias": lists(2, 5), "A": lists(3, 2, 4), "B": lists(4, 5, 2), "alpha": 3.0}
    zeros = (floats(lora["W"]) * (draw(5, 5, 4) > -0.2)).tolist()
    inside = {f"blocks.{i}.{name}": {"A": lists(10 + i, 2, n_in), "B": lists(20 + i, n_out, 2, scale=0.3)}
              for i, (name, n_in, n_out) in enumerate([("attn.q", 8, 8), ("mlp.down", 12, 8)])}
    teacher, student = draw(30, 2, 3, 7), 2 * draw(31, 2, 3, 7)
    teacher[0, 1, 4] += 30  # certain: what is left for the rest is below 1e-6
    student[1, 2, 5] += 25
    adam, loud = {"matrix": (3, 4), "vector": (4,)}, (1.0, 0.1, 2.0, 0.03, 1.0, 0.2)
    settings = {"steps": 6, "lr": 0.1, "warmup": 0.34, "weight_decay": 0.2, "betas": [0.9, 0.99], "clip": 1.0}
    rounded = {f"blocks.{i}.{name}.weight": None for i in (0, 1) for name in ("attn.o", "mlp.down", "mlp.up")}
    for name in rounded:  # what a rough compression leaves: halves
        W = floats(read("model.json")["models"]["opt"]["weights"][name])
        rounded[name] = ((2 * W).round() / 2).tolist()
    return [
        {"name": "LoRA, a layer", "given": {**lora, "x": lists(6, 3, 4)}},
        {"name": "LoRA, merged under zeros", "given": {**lora, "W": zeros, "x": lists(6, 3, 4)}},
        {"name": "LoRA, a model", "model": "study",
         "given": {"layers": inside, "alpha": 3.0, "ids": whole(7, 13, 2, 6).tolist()}},
        {"name": "biases, a model", "model": "opt",
         "given": {"shifts": {f"blocks.{i}.{name}": lists(40 + i, 8)
                              for i in (0, 1) for name in ("attn.o", "mlp.down")},
                   "ids": whole(8, 11, 2, 6).tolist()}},
        {"name": "bias correction", "model": "opt",
         "given": {"compressed": rounded, "ids": whole(9, 11, 3, 6).tolist()}},
        {"name": "next token", "given": {"logits": numbers(short(student, 4)), "ids": whole(32, 7, 2, 4).tolist()}},
        {"name": "distillation", "given": {"teacher": numbers(short(teacher, 4)), "logits": numbers(short(student, 4)),
                                           "ids": whole(32, 7, 2, 4).tolist(), "k": 3}},
        {"name": "schedule", "given": {"settings": schedules()}},
        {"name": "AdamW", "given": {**training(50, adam, loud), "settings": settings}},
        {"name": "AdamW, each clipped", "given": {**training(50, adam, loud),
                                                  "settings": {**settings, "clip_each": True, "weight_decay": 0.0}}},
        {"name": "Muon", "given": {**training(60, TRAINED, (1.0, 0.02, 1.0, 0.2)),
                                   "settings": {"steps": 4, "lr": 0.05, "muon": 0.03, "weight_decay": 0.1}}},
    ]


# ---- the results

class Code(make_model.Code):
    """The code under test, imported when this is made."""

    def fit_config(self, **settings):
        """FitConfig; betas are a tuple."""
        return self.recover.FitConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def result(code, models, case):
    """What the code of the day makes of a case."""
    given = case["given"]
    if "W" in given:
        return layer(code, given)
    if "layers" in given or "shifts" in given:
        return inside(code, code.model(models[case["model"]]), given)
    if "compressed" in given:
        dense, model = code.model(models[case["model"]]), code.model(models[case["model"]])
        model.load_state_dict(floats(given["compressed"]), strict=False)
        code.recover.correct_biases(model, dense, torch.tensor(given["ids"]))
        return {name: numbers(shift.detach()) for name, shift in shifts(code, model).items()}
    if "parameters" in given:
        return fitted(code, given)
    if "logits" in given:
        return losses(code, given)
    return {"rates": [[code.fit_config(**s).rate(step) for step in range(s["steps"])] for s in given["settings"]]}


def layer(code, given):
    """LoRA beside one layer, and merged; under zeros the merged update is masked."""
    g = floats({key: value for key, value in given.items() if key != "alpha"})
    base = nn.Linear(4, 5).double()
    base.weight.data, base.bias.data = g["W"], g["bias"]
    model = nn.Sequential(code.recover.LoRALinear(base, len(g["A"]), given["alpha"]))
    model[0].A.data, model[0].B.data = g["A"], g["B"]
    beside, zeros = model(g["x"]).detach(), bool((g["W"] == 0).any())
    model.pruned = frozenset(["0"]) if zeros else frozenset()
    lost = code.recover.merge_lora(model, keep_zeros=zeros)
    return {"y": numbers(beside), "merged": numbers(model[0].weight.detach()),
            "y_merged": numbers(model(g["x"]).detach()), "lost": numbers(list(lost.values())[0])}


def shifts(code, model):
    """{name of a layer: its constant} of a model with biases."""
    return {name: m.shift for name, m in model.named_modules() if isinstance(m, code.recover.BiasLinear)}


def inside(code, model, given):
    """Logits, the loss of each token, and the gradients of its mean, of a model with LoRA or biases."""
    ids, lora = torch.tensor(given["ids"]), given.get("layers")
    if lora:
        code.recover.add_lora(model, 2, given["alpha"], "q down")
        found = {name: m for name, m in model.named_modules() if isinstance(m, code.recover.LoRALinear)}
        for name, m in found.items():  # B of the layers that are not named stays zero
            m.A.data, m.B.data = (floats(lora[name][key]) if name in lora else getattr(m, key).data * 0 for key in "AB")
        trained = {name: {"A": found[name].A, "B": found[name].B} for name in lora}
    else:
        code.recover.add_biases(model)
        for name, shift in shifts(code, model).items():
            shift.data = floats(given["shifts"][name])
        trained = {name: {"shift": shift} for name, shift in shifts(code, model).items()}
    logits = model(ids[:, :-1])
    loss = code.recover.next_token(logits, ids)
    loss.mean().backward()
    out = {"logits": numbers(logits.detach()), "losses": numbers(loss.detach()),
           "gradients": {name: {key: numbers(p.grad) for key, p in parts.items()} for name, parts in trained.items()}}
    if lora:
        code.recover.merge_lora(model)
    else:
        code.recover.merge_biases(model)
        out["merged"] = {name: numbers(m.bias.detach()) for name, m in model.named_modules() if name in given["shifts"]}
    torch.testing.assert_close(model(ids[:, :-1]), logits, rtol=1e-9, atol=1e-9)
    return out


def losses(code, given):
    """One loss a token, the gradient of their mean by the student's logits, and a teacher's likeliest tokens."""
    logits, ids = floats(given["logits"]).requires_grad_(), torch.tensor(given["ids"])
    out, batch = {}, ids
    if "teacher" in given:
        teacher = floats(given["teacher"])

        def answers(ids):
            assert ids.shape == teacher.shape[:2]
            return teacher
        batch, = code.recover.add_targets(answers, [ids], given["k"])
        out = {"log_p": numbers(batch[1]), "tokens": batch[2].tolist()}
    loss = (code.recover.distillation if "teacher" in given else code.recover.next_token)(logits, batch)
    loss.mean().backward()
    return {**out, "losses": numbers(loss.detach()), "gradient": numbers(logits.grad)}


def fitted(code, given):
    """The parameters after each step of `fit`, on a loss whose gradients are those given."""
    config, model = code.fit_config(**given["settings"]), code.gpt(code.sizes(**SMALL)).double()
    named = dict(model.named_parameters())
    parameters = {name: named.get(name, nn.Parameter(floats(value))) for name, value in given["parameters"].items()}
    for name, value in given["parameters"].items():
        parameters[name].data = floats(value)
    after = []

    def remember(step, loss):
        after.append({name: numbers(p.detach()) for name, p in parameters.items()})

    def loss(batch):
        return sum((parameters[name] * g).sum() for name, g in batch.items())
    code.recover.fit(model, parameters.values(), [floats(g) for g in given["gradients"]], loss, config, remember)
    return {"after": after}


def main():
    """Make the file again."""
    code, models = Code(), read("model.json")["models"]
    write("repair.json", cases(), lambda case: result(code, models, case))


if __name__ == "__main__":
    main()
