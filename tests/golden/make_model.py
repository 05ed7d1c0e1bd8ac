"""
Writes model.json: four small GPTs, and what they make of token ids on the way from the embedding to the logits.
README.md beside this file says how to check a port against it.

    python tests/golden/make_model.py
"""
import pathlib
import sys
from dataclasses import asdict

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from golden.files import draw, floats, numbers, short, whole, write  # noqa: E402

CONFIGS = {  # what differs from GPTConfig
    "study": dict(vocab_size=13, context=16, n_layer=2, n_head=2, n_embd=8, n_hidden=12),
    "llama": dict(vocab_size=11, context=16, n_layer=1, n_head=4, n_kv_head=2, n_embd=16, n_hidden=12,
                  activation="swiglu", tied=False, rope_theta=100.0),
    "opt": dict(vocab_size=11, context=16, n_layer=2, n_head=2, n_embd=8, n_hidden=10, position="learned",
                position_offset=2, norm="layernorm", activation="relu", bias=True),
    "gpt2": dict(vocab_size=11, context=12, n_layer=1, n_head=2, n_embd=8, n_hidden=10, position="learned",
                 norm="layernorm", activation="gelu_tanh", bias=True),
}
LLAMA3 = dict(vocab_size=4, context=6, n_layer=1, n_head=1, n_embd=8, rope_theta=500.0,
              rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32))


# ---- the inputs

def models():
    """{name: {"config": all fields of GPTConfig, "weights": {name: lists}}}."""
    from model import GPT, GPTConfig
    made = {}
    for n, (name, config) in enumerate(CONFIGS.items()):
        model, weights = GPT(GPTConfig(**config)), {}
        for i, (key, p) in enumerate(model.named_parameters()):
            gain = "norm" in key and key.endswith("weight")
            weights[key] = numbers(short(draw(100 * n + i, *p.shape) * (0.2 if p.dim() == 1 else 0.5) + gain, 3))
        made[name] = {"config": asdict(model.config), "weights": weights}
    return made


def cases():
    """Every case without its result."""
    ids = whole(1, 13, 2, 5).tolist()
    ragged = {"ids": whole(2, 13, 3, 5).tolist(), "lengths": [5, 2, 4]}
    asked = {"ids": whole(25, 11, 3, 4).tolist(), "lengths": [4, 1, 3]}
    return [
        {"name": "step by step", "model": "study", "given": {"ids": ids}},
        {"name": "ragged cache", "model": "study", "given": {**ragged, "more": whole(3, 13, 3, 3).tolist()}},
        {"name": "prompt", "model": "study", "given": {"ids": ids, "prompt": numbers(short(draw(4, 3, 8), 3))}},
        {"name": "prefix", "model": "study",
         "given": {"ids": ids, "prefix": numbers(short(draw(5, 2, 2, 2, 3, 4), 3))}},
        {"name": "greedy", "model": "llama", "given": {**asked, "max_new_tokens": 6, "stop": None}},
        {"name": "greedy until a stop", "model": "llama", "given": {**asked, "max_new_tokens": 6, "stop": 3}},
        *({"name": name, "model": name, "given": {"ids": whole(6, 11, 2, 7).tolist()}}
          for name in ("llama", "opt", "gpt2")),
        {"name": "opt, ragged cache", "model": "opt",
         "given": {**ragged, "ids": whole(7, 11, 3, 5).tolist(), "more": whole(8, 11, 3, 2).tolist()}},
        {"name": "llama, ragged cache", "model": "llama",
         "given": {**ragged, "ids": whole(9, 11, 3, 5).tolist(), "more": whole(10, 11, 3, 2).tolist()}},
        {"name": "rotary table", "model": "study", "given": {}},
        {"name": "rotary table, theta 100", "model": "llama", "given": {}},
        {"name": "rotary table, Llama 3's scaling", "given": {"config": LLAMA3}},
    ]


# ---- the results

class Code:
    """The code under test, imported when this is made: the test of mistakes changes it first."""

    def __init__(self):
        import model
        import recover
        self.gpt, self.sizes, self.rope_table, self.recover = model.GPT, model.GPTConfig, model.rope_table, recover

    def model(self, made):
        """The GPT, in float64, of {"config", "weights"}."""
        model = self.gpt(self.sizes(**made["config"])).double()
        given = floats(made["weights"])
        if made["config"]["tied"]:
            given["lm_head.weight"] = given["wte.weight"]
        model.load_state_dict(given)
        return model


@torch.no_grad()
def result(code, models, case):
    """What the code of the day makes of a case."""
    given = case["given"]
    if "table" in case["name"]:
        config = given.get("config") or models[case["model"]]["config"]
        return {"table": numbers(code.rope_table(code.sizes(**config)), 9)}
    model, ids = code.model(models[case["model"]]), torch.tensor(given["ids"])
    if "max_new_tokens" in given:
        lengths = torch.tensor(given["lengths"])
        return {"ids": model.generate(ids, given["max_new_tokens"], lengths, stop=given["stop"]).tolist()}
    if "more" in given:
        return ragged(model, ids, torch.tensor(given["lengths"]), torch.tensor(given["more"]))
    if "prompt" in given:
        prompt = floats(given["prompt"])
        return {"logits": numbers(model(ids, prompt=prompt)),
                "prefix": numbers(code.recover.prefix_init(model, prompt))}
    if "prefix" in given:
        prefix = code.recover.Prefix(floats(given["prefix"]))
        return {"logits": numbers(model(ids, cache=prefix.cache(model, len(ids), ids.shape[1])))}
    return steps(model, ids) if case["name"] == "step by step" else {"logits": numbers(model(ids))}


def steps(model, ids):
    """Every tensor of the forward pass; of the first block all that is inside."""
    positions, first = torch.arange(ids.shape[1])[None], model.blocks[0]
    x = model.embed(ids)
    out = {"embed": x, "norm1": first.norm1(x)}
    out.update(zip("qkv", first.attn.qkv(out["norm1"], positions)))
    out["attention"] = first.attn(out["norm1"], positions)
    out["norm2"] = first.norm2(x + out["attention"])
    out["mlp"] = first.mlp(out["norm2"])
    for i, block in enumerate(model.blocks):
        out[f"block {i}"] = x = block(x)
    out["norm"] = model.norm(x)
    out["logits"] = model.head(x)
    assert torch.equal(out["logits"], model(ids))
    return numbers(out)


def ragged(model, ids, lengths, more):
    """Rows of unlike length behind each other in one cache: logits of the real tokens, then of one more token a row,
    and one more; and the keys and values (2, nkv, slots, hs) of the first layer in the end, row by row."""
    cache = model.new_cache(len(ids), ids.shape[1] + more.shape[1])
    logits = model(ids, cache=cache, lengths=lengths)
    then = [model(more[:, i:i + 1], cache=cache)[:, 0] for i in range(more.shape[1])]
    return {"logits": [numbers(row[:n]) for row, n in zip(logits, lengths.tolist())],
            "more": numbers(torch.stack(then, dim=1)), "length": cache.length.tolist(),
            "kv": [numbers(cache.kv[0][:, b, :, :n]) for b, n in enumerate(cache.length.tolist())]}


def main():
    """Make the file again."""
    code, made = Code(), models()
    write("model.json", cases(), lambda case: result(code, made, case), models=made)


if __name__ == "__main__":
    main()
