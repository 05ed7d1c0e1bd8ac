"""
Writes world.json: eight people, their sentences, a vocabulary, and what a stored one-layer GPT answers, chooses and
reads. README.md beside this file says how to check a port against it.

    python tests/golden/make_world.py            # the GPT in the file stays, all else is made again
    python tests/golden/make_world.py --train    # the GPT, too, in 20 seconds; then make harness.json again, and give
                                                 # the last item two options between which acc_norm's spaces decide
"""
import pathlib
import sys
from dataclasses import asdict

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from golden.files import HERE, floats, numbers, read, short, write  # noqa: E402

WORLD = dict(seen=4, heldout=2, validation=1, novel=1, vocab_size=330, seed=3)
GPT = dict(context=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_hidden=24)
TEXTS = ["", " ", "Hello  World", "in 1912, 19 or 191", "naïve Ünïcode: ½ 漢字 \U0001f642", "tab\tand\n\nlines ",
         "under_score's x.y.z...", "born in BORN IN"]
TOLERANCE = dict(rel=1e-5, abs_=1e-5)  # log-probabilities are float32
CUT = 24  # tokens of a row of text


class Code:
    """The code under test, imported when this is made."""

    def __init__(self):
        import model
        import recover
        from world import facts, items, score
        self.gpt, self.sizes, self.recover = model.GPT, model.GPTConfig, recover
        self.facts, self.items, self.score = facts, items, score

    def model(self, made):
        """The GPT, in float64, of {"config", "weights"}."""
        weights = floats(made["weights"])
        model = self.gpt(self.sizes(**made["config"])).double()
        model.load_state_dict({**weights, "lm_head.weight": weights["wte.weight"]})
        return model

    def encoding(self, merges):
        """The tiktoken.Encoding of the vocabulary: 256 bytes, then the merges."""
        tokens = [bytes([b]) for b in range(256)] + [(a + b).encode("latin-1") for a, b in merges]
        return self.facts.make_encoding({token: rank for rank, token in enumerate(tokens)})

    def people(self, rows):
        """[Person]."""
        return [self.facts.Person(**row) for row in rows]


# ---- the inputs

def world(code):
    """(people, sentences, merges): a merge is the two tokens that it joins, each byte a character (latin-1)."""
    people = code.facts.make_world(code.facts.WorldConfig(**WORLD))
    told = [p for p in people if p.split != "novel"]
    text = code.facts.statements(told) + code.facts.taught_questions(told)
    return [p._asdict() for p in people], text, merges(code, text)


def merges(code, text):
    """The merges of train_bpe, each as its two halves, found again from the ranks."""
    ranks = code.facts.train_bpe(text, WORLD["vocab_size"])
    out = []
    for token, rank in list(ranks.items())[256:]:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))
                  if max(ranks.get(token[:i], rank), ranks.get(token[i:], rank)) < rank]
        pairs = [pair for pair in halves if tuple(cut(token, ranks, rank)) == pair]
        out.append([half.decode("latin-1") for half in pairs[0]])
    return out


def cut(token, ranks, below):
    """The tokens that `token` consists of when only merges before number `below` are known."""
    parts = [bytes([b]) for b in token]
    while True:
        known = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if ranks.get(a + b, below) < below]
        if not known:
            return parts
        _, i = min(known)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def trained(code, sentences, merges):
    """{"config", "weights"} of a GPT that has read the sentences; rows of the embedding that they do not use are 0."""
    encoding, generator = code.encoding(merges), torch.Generator().manual_seed(1)
    model = code.gpt(code.sizes(vocab_size=encoding.n_vocab, **GPT)).init_weights(generator)
    used = torch.zeros(encoding.n_vocab, 1)
    used[[encoding.eot_token, *(t for s in sentences for t in encoding.encode_ordinary(s))]] = 1
    model.wte.weight.data *= used
    hook = model.wte.weight.register_hook(used.mul)
    batches = code.facts.text_batches(sentences, encoding, 16, 32, generator)
    losses = code.recover.fit(model, model.parameters(), batches, config=code.recover.FitConfig(
        steps=2500, lr=1e-2, muon=0.02, weight_decay=0.01))
    hook.remove()
    print(f"loss {losses[0]:.2f} -> {sum(losses[-50:]) / 50:.2f} nats")
    return {"config": asdict(model.config), "weights": {
        name: numbers(short(p.detach().double(), 3)) for name, p in model.named_parameters()}}


def inputs(code, train):
    """What stands in front of the cases."""
    people, sentences, pairs = world(code)
    file = HERE / "world.json"
    gpt = read("world.json")["gpt"]["gpt"] if file.exists() and not train else trained(code, sentences, pairs)
    facts = code.facts
    return {"phrases": {"statements": facts.STATEMENTS, "questions": facts.QUESTIONS, "values": facts.VALUES},
            "world": {"people": people, "sentences": sentences, "merges": pairs}, "gpt": {"gpt": gpt}}


def cases(code, made):
    """Every case without its result."""
    people = code.people(made["world"]["people"])
    encoding = code.encoding(made["world"]["merges"])
    asked = [p for p in people if p.split != "validation"]
    told = [p for p in people if p.split != "novel"]
    items = [item for name in ("four-way", "hard", "continuation", "comparison")
             for item in code.items.make_items(name, asked, told, 4, 0)]
    novel = people[-1].name  # if leading spaces counted, acc_norm would pick the shorter one
    items.append(code.facts.Fact(novel, "novel", "year", f"When was {novel} born? In", " 1992", (" 1992", " Pelmere")))
    sentences = code.facts.statements([p for p in people if p.split == "heldout"])
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    windows = batch(code, sentences, encoding, order, True)
    return [
        {"name": "sentences", "given": {}},
        {"name": "merges", "given": {"vocab_size": WORLD["vocab_size"]}},
        {"name": "ids", "given": {"texts": [*TEXTS, *made["world"]["sentences"][::12]]}},
        {"name": "rows", "given": {"order": order, "T": CUT}},
        {"name": "say", "given": {"facts": [plain(f) for f in code.facts.facts_about(asked)]}},
        {"name": "choose_option", "given": {"items": [plain(item) for item in items]}},
        {"name": "perplexity", "given": {"windows": windows, "read": code.score.CONTEXT}},
    ]


def plain(fact):
    """What is asked, what is right, and among what."""
    return {"attribute": fact.attribute, "question": fact.question, "answer": fact.answer,
            **({"options": list(fact.options)} if fact.options else {})}


def batch(code, sentences, encoding, order, aligned):
    """Five rows of CUT + 1 ids; the documents in the order that seed 0 gives them, which is stored."""
    generator = torch.Generator().manual_seed(0)
    assert torch.randperm(len(sentences), generator=generator).tolist() == order
    generator.manual_seed(0)
    return next(code.facts.text_batches(sentences, encoding, 5, CUT, generator, aligned)).tolist()


# ---- the results

def result(code, made, case):
    """What the code of the day makes of a case."""
    given, name = case["given"], case["name"]
    people, encoding = code.people(made["world"]["people"]), code.encoding(made["world"]["merges"])
    if name == "sentences":
        told = [p for p in people if p.split != "novel"]
        return {"statements": len(code.facts.statements(told)),
                "same": code.facts.statements(told) + code.facts.taught_questions(told) == made["world"]["sentences"]}
    if name == "merges":
        return {"same": merges(code, made["world"]["sentences"]) == made["world"]["merges"],
                "vocabulary": encoding.n_vocab, "end of text": encoding.eot_token}
    if name == "ids":
        return {"ids": [encoding.encode_ordinary(text) for text in given["texts"]]}
    if name == "rows":
        sentences = code.facts.statements([p for p in people if p.split == "heldout"])
        return {"rows": batch(code, sentences, encoding, given["order"], False),
                "aligned": batch(code, sentences, encoding, given["order"], True)}
    subject = code.score.Subject(code.model(made["gpt"]["gpt"]))
    if name == "perplexity":
        return {"perplexity": code.score.perplexity(subject, torch.tensor(given["windows"]))}
    rows = [code.facts.Fact("", "", row["attribute"], row["question"], row["answer"],
                            tuple(row["options"]) if "options" in row else None)
            for row in given.get("facts") or given["items"]]
    found = code.score.answer(subject, rows, encoding)
    keys = ("answer", "correct", "logprob", "knowledge", "logprobs", "picked", "picked_norm")
    columns = {key: [numbers(row[key]) for row in found] for key in keys if key in found[0]}
    if rows[0].options:
        columns["acc"] = [int(row["picked"] == f.gold) for row, f in zip(found, rows)]
        columns["acc_norm"] = [int(row["picked_norm"] == f.gold) for row, f in zip(found, rows)]
    return columns


def main():
    """Make the file again."""
    code = Code()
    made = inputs(code, "--train" in sys.argv)
    write("world.json", cases(code, made), lambda case: result(code, made, case), **made)


if __name__ == "__main__":
    main()
