"""
Writes idp.json: what texts attend to, which prompt of a pool each selects, and the logits and the text under it. The
GPTs are those of model.json. README.md beside this file says how to check a port against it.

    python tests/golden/make_idp.py
"""
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from golden import make_model  # noqa: E402
from golden.files import draw, floats, numbers, read, short, whole, write  # noqa: E402

HAND = [[0.1, 0.3, 0.3], [0.3, 0.2999985, 0.1], [0.2999985, 0.3, 0.1], [0.2999, 0.3, 0.3], [0.0, 0.0, 0.0],
        [-0.2, -0.1000005, -0.1], [0.1, 0.2, 0.2]]  # the third ties with a lower one, the fourth does not


# ---- the inputs

def pool(seed, width, *lengths):
    """Prompts (P_i, width), one a length."""
    return [numbers(short(draw(seed + i, n, width), 3)) for i, n in enumerate(lengths)]


def cases():
    """Every case without its result."""
    padded = {"ids": whole(41, 11, 5, 6).tolist(), "lengths": [6, 1, 3, 5, 2]}
    twice = pool(72, 8, 3, 3)
    return [
        {"name": "equal lengths", "model": "study",
         "given": {"prompts": pool(50, 8, 3, 3, 3, 3), "ids": whole(40, 11, 6, 5).tolist(), "lengths": None}},
        {"name": "unequal lengths, padding", "model": "study", "given": {"prompts": pool(60, 8, 4, 2, 3), **padded}},
        {"name": "grouped queries", "model": "llama", "given": {"prompts": pool(64, 16, 1, 4, 2), **padded}},
        {"name": "learned positions", "model": "opt", "given": {"prompts": pool(68, 8, 2, 3, 1), **padded}},
        {"name": "the same prompt twice", "model": "study",
         "given": {"prompts": [twice[0], twice[1], twice[1], twice[0]], **padded}},
        {"name": "by hand", "given": {"scores": HAND}},
    ]


# ---- the results

class Code(make_model.Code):
    """The code under test, imported when this is made."""

    def __init__(self):
        super().__init__()
        import idp
        self.idp = idp


@torch.no_grad()
def result(code, models, case):
    """Scores, choice, logits of the real tokens and five greedy tokens of a case."""
    given = case["given"]
    if "scores" in given:
        return {"chosen": code.idp.highest(floats(given["scores"])).tolist()}
    model, ids = code.model(models[case["model"]]), torch.tensor(given["ids"])
    prompts = code.idp.PromptPool([floats(p) for p in given["prompts"]])
    lengths = None if given["lengths"] is None else torch.tensor(given["lengths"])
    filled = code.idp.prefill(model, prompts)
    chosen, first = code.idp.choose(model, prompts, ids, lengths, filled)
    logits = code.idp.forward(model, prompts, ids, lengths)
    sizes = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
    text = model.generate(ids, 5, lengths, cache=filled.repeat(chosen, ids.shape[1] + 5), first=first)
    assert chosen.tolist() == code.idp.select(model, prompts, ids, lengths).tolist()
    return {"scores": numbers(code.idp.attention_scores(model, filled, ids, lengths)), "chosen": chosen.tolist(),
            "logits": [numbers(row[:n]) for row, n in zip(logits, sizes)],
            "text": [row[:n + 5] for row, n in zip(text.tolist(), sizes)]}


def main():
    """Make the file again."""
    code, models = Code(), read("model.json")["models"]
    write("idp.json", cases(), lambda case: result(code, models, case))


if __name__ == "__main__":
    main()
