"""
Make harness.json: what the EleutherAI harness (lm-eval 0.4) scores on thirty items, asked of the GPT of world.json.

The harness builds the requests, cuts context and continuation, and judges acc and acc_norm; our part is only the
log-probability of each token, one row at a time, nothing cached. It is no part of the study, so it is imported by name,
in an environment of its own:

    python -m venv out/golden && . out/golden/bin/activate
    pip install torch==2.13.0 numpy tiktoken pytest lm-eval==0.4.13 datasets transformers
    python tests/golden/make_harness.py
"""
import importlib
import json
import os
import sys
import tempfile

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]

from world.items import make_items
from test_harness_golden import ENCODING, MODEL, PEOPLE  # noqa: E402


@torch.no_grad()
def loglikelihood(context, continuation):
    """Of the tokens `continuation` behind `context`, nats."""
    log_p = MODEL(torch.tensor([context + continuation])).float().log_softmax(-1)[0]
    return sum(log_p[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def ours():
    """Our GPT behind the harness' interface."""
    class Ours(importlib.import_module("lm_eval.api.model").TemplateLM):
        eot_token_id = ENCODING.eot_token

        def tok_encode(self, string, **kwargs):
            return ENCODING.encode_ordinary(string)

        def _loglikelihood_tokens(self, requests, **kwargs):
            return [(loglikelihood(context, continuation), False) for _, context, continuation in requests]

        def loglikelihood_rolling(self, requests, **kwargs):
            raise NotImplementedError

        def generate_until(self, requests, **kwargs):
            raise NotImplementedError
    return Ours()


def questions():
    """(delimiter, question, choices, gold): the tasks' items, uneven options, spaces and tokens on the border."""
    told = [p for p in PEOPLE if p.split != "novel"]
    for name in ("four-way", "hard", "continuation", "comparison"):
        for item in make_items(name, told, told, 6, 0):
            yield " ", item.question, [option[1:] for option in item.options], item.gold
    name = told[0].name
    yield " ", f"{name} comes from ", ["Tarmere", "Zanburg", "Bal"], 0                      # a space at the end
    yield " ", f"{name} comes from   ", ["Tarmere", "a much longer place, told in full"], 1
    yield " ", f"{name} was", ["born in Tarmere", "born", "born in the year 1912, in Tarmere"], 2
    yield "", f"{name} comes fr", ["om Tarmere", "om Zanburg, and so on", "amed"], 0        # a token across the border
    yield "", f"When was {name} born? In 19", ["12", "1", "99.", " 12"], 1
    yield "", f"{name} works as a bak", ["er.", "ery of bread", "er and brewer"], 2


def asked(delimiter, rows):
    """The harness' own samples of the questions with one delimiter."""
    harness = importlib.import_module("lm_eval")
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "rows.jsonl"), "w") as f:
            for _, question, choices, gold in rows:
                f.write(json.dumps({"question": question, "choices": choices, "gold": gold}) + "\n")
        task = {"task": "ours", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
                "dataset_kwargs": {"data_files": {"test": os.path.join(folder, "rows.jsonl")}},
                "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
                "target_delimiter": delimiter, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
        done = harness.simple_evaluate(model=ours(), tasks=[task], log_samples=True, bootstrap_iters=0)
    return sorted(done["samples"]["ours"], key=lambda sample: sample["doc_id"])


def main():
    rows, out = list(questions()), []
    for delimiter in (" ", ""):
        part = [row for row in rows if row[0] == delimiter]
        for (_, question, choices, gold), sample in zip(part, asked(delimiter, part), strict=True):
            assert sample["doc"]["question"] == question
            out.append({"question": question, "options": [delimiter + choice for choice in choices], "gold": gold,
                        "logprobs": [round(float(resp[0]), 5) for resp in sample["filtered_resps"]],
                        "acc": sample["acc"], "acc_norm": sample["acc_norm"]})
    with open(os.path.join(HERE, "harness.json"), "w") as f:
        f.write('{"lm_eval": "%s", "items": [\n' % importlib.import_module("lm_eval").__version__)
        f.write(",\n".join(json.dumps(row) for row in out) + "\n]}\n")
    print(f"{len(out)} items, acc {sum(r['acc'] for r in out):.0f}, acc_norm {sum(r['acc_norm'] for r in out):.0f}")


if __name__ == "__main__":
    main()
