"""
The questions and the one scorer: what a model answers, how likely it finds the right answer, how well it reads text.

A `Subject` is whatever answers: a model, and what stands in front of every input as keys and values (nothing, one
prompt, a prefix, or a pool of which `choose` picks one row an input). Every number of the study comes from a Subject
through this file.

    recall       the question is continued greedily; the generated part up to the first full stop must be the value
    logprob      the sum of log-probabilities of the value's tokens behind the question, in nats
    acc          multiple choice: the option with the highest logprob is the right one
    acc_norm     the same with each logprob divided by the option's characters, so that length does not decide
    perplexity   exp of the mean loss a text token; positions of prompts are never counted

What it leaves out: partial credit, a language model as a judge, sampling.

Sources: closed-book recall after Roberts et al. 2020 (arXiv 2002.08910); trap of counting prompt positions: see
docs/sweeps.md.
"""
import math
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
import torch.nn.functional as F

from world.facts import VALUES, pad

CONTEXT = 16  # text tokens at the head of each window that perplexity only reads: what a pool chooses its prompt on


def always(m):
    """A `choose` that takes row m for every input."""
    return lambda ids, lengths: (ids.new_full((len(ids),), m), None)


@dataclass
class Subject:
    """Something that answers questions.

    filled  a Cache of M rows that stand in front of the input, or None: nothing does
    choose  (ids, lengths) -> (B,) row of `filled` for each input, and what that computed of the first layer for
            `GPT.hidden`, or None (`idp.choose`)
    """
    model: Any
    filled: Any = None
    choose: Callable = always(0)
    about: dict = field(default_factory=dict)  # id, tag, base, operation, ...: for tables

    @property
    def device(self):
        """Where the model computes."""
        return self.model.wte.weight.device

    @property
    def name(self):
        """What the model is called in messages."""
        return self.about.get("id", "the model")

    def room(self):
        """How many tokens of text fit behind what stands in front."""
        return self.model.config.context - (self.filled.slots if self.filled else 0)

    def start(self, ids, lengths, room=0):
        """Stand in front of each input ids (B, T) of `lengths` (B,) tokens what it chooses.

        Returns the chosen rows of `filled` (B,), a Cache with T + room free slots behind them, and what the choice
        already computed of the first layer, for `GPT.hidden`, or None.
        """
        chosen, first = self.choose(ids, lengths)
        return chosen, self.cache(chosen, ids.shape[1] + room), first

    def cache(self, chosen, room):
        """A Cache with what was chosen (B,) in front, and `room` free slots behind it."""
        return self.model.new_cache(len(chosen), room) if self.filled is None else self.filled.repeat(chosen, room)

    def logits(self, ids, chosen=None):
        """(B, T, V) of ids (B, T), each row behind row chosen[b] of `filled`; default: the first."""
        chosen = ids.new_zeros(len(ids)) if chosen is None else chosen
        return self.model(ids, cache=self.cache(chosen, ids.shape[1]))


def tokenized(facts, encoding):
    """[(question tokens behind an end-of-text, answer tokens)], cut where the answer's first token starts.

    Question and answer are tokenized together, as training saw them; a value starts at its leading space.
    """
    rows = []
    for fact in facts:
        question = [encoding.eot_token, *encoding.encode_ordinary(fact.question)]
        whole = [encoding.eot_token, *encoding.encode_ordinary(fact.question + fact.answer)]
        if whole[:len(question)] != question or len(whole) == len(question):
            raise ValueError(f"the question {fact.question!r} does not end where a token of {fact.answer!r} begins")
        rows.append((question, whole[len(question):]))
    return rows


@torch.no_grad()
def answer(subject, facts, encoding):
    """What the subject answers, one dict a fact: answer (text), correct (bool), logprob (of the right answer, nats),
    chosen (row of the pool). Facts with options are chosen (by `choose_option`, whose entries come along), others said.
    """
    if not facts or facts[0].options is None:
        return say(subject, facts, encoding)
    return [{"answer": fact.options[row["picked"]].strip(), "correct": row["picked"] == fact.gold,
             "logprob": row["logprobs"][fact.gold], "knowledge": knowledge(row["logprobs"], fact.gold), **row}
            for fact, row in zip(facts, choose_option(subject, facts, encoding))]


def knowledge(logprobs, gold):
    """log p(right option) - logsumexp(options), in nats: at most 0, and -log n where n options are equally likely.

    What changes every option alike, as a repaired format does, leaves it alone.
    """
    highest = max(logprobs)
    return logprobs[gold] - highest - math.log(sum(math.exp(p - highest) for p in logprobs))


def fitting(sizes, batch_size, room):
    """(start, end) of batches of neighbours whose longest question and longest answer fit `room` together.

    sizes  [(tokens of the question, tokens of the answer)]; one that does not fit by itself is a batch, for the model
           to refuse
    """
    start = question = answer = 0
    for end, (q, a) in enumerate(sizes):
        question, answer = max(question, q), max(answer, a)
        if end > start and (end - start == batch_size or question + answer > room):
            yield start, end
            start, question, answer = end, q, a
    if sizes:
        yield start, len(sizes)


def check_numbers(subject, log_p):
    """`log_p` if there is no NaN in it; else ValueError with the model's name.

    Every comparison with NaN is false: the model would be found to choose its first option.
    """
    if bool(torch.isnan(log_p).any()):
        raise ValueError(f"{subject.name} gives log-probabilities that are not numbers (NaN)")
    return log_p


@torch.no_grad()
def say(subject, facts, encoding, batch_size=250):
    """The question is continued greedily: one dict a fact, as `answer` gives it. "knowledge" is `knowledge` among all
    values of the fact's attribute, None for a fact without one.

    A row may write twice as many tokens as its own right answer has, and two more. What it writes is read up to the
    first full stop behind as many as are part of the right answer.
    """
    rows = tokenized(facts, encoding)
    room, out, known = subject.room(), [], {}
    rooms = [min(2 * len(gold) + 2, max(len(gold) + 1, room - len(question))) for question, gold in rows]
    sizes = [(len(question), n) for (question, _), n in zip(rows, rooms)]
    for start, end in fitting(sizes, batch_size, room):
        part, longest = rows[start:end], max(rooms[start:end])
        ids, lengths = pad([question for question, _ in part], encoding, subject.device)  # (B, T), (B,)
        chosen, cache, first = subject.start(ids, lengths, longest)
        last = cache.length + lengths - 1  # (B,) where the question's last token stands
        given = subject.model.generate(ids, longest, lengths, cache=cache, stop=encoding.eot_token, first=first)
        cache.rewind(last)
        after, _ = pad([question[-1:] + gold for question, gold in part], encoding, subject.device)  # (B, 1 + answer)
        whole = F.log_softmax(subject.model(after[:, :-1], cache=cache).float(), dim=-1).cpu()  # (B, answer, V)
        log_p = check_numbers(subject, whole.gather(-1, after[:, 1:, None].cpu())[..., 0])  # (B, answer)
        given, chosen = given.tolist(), chosen.tolist()
        for b, (fact, (question, gold)) in enumerate(zip(facts[start:end], part)):
            tokens = given[b][len(question):len(question) + rooms[start + b]]
            text, ended = until_stop(tokens, encoding, full_stops(fact.answer))
            values = rivals(fact, gold, encoding, known)
            out.append({"answer": text.strip(), "correct": ended and is_right(text, fact.answer),
                        "logprob": log_p[b, :len(gold)].sum().item(), "knowledge": None if values is None else (
                            log_p[b, len(gold) - 1] - whole[b, len(gold) - 1, values].logsumexp(0)).item(),
                        "chosen": chosen[b]})
    compare = [i for i, (row, fact) in enumerate(zip(out, facts)) if row["knowledge"] is None and values_of(fact)]
    asked = [facts[i]._replace(options=values_of(facts[i])) for i in compare]
    for i, row, fact in zip(compare, choose_option(subject, asked, encoding) if asked else [], asked):
        out[i]["knowledge"] = knowledge(row["logprobs"], fact.gold)
    return out


def values_of(fact):
    """All values of a fact's attribute, each with its leading space; () where it has none, or the answer is not one."""
    values = tuple(f" {value}" for value in VALUES.get(fact.attribute, ()))
    return values if fact.answer in values else ()


def rivals(fact, gold, encoding, known):
    """The last tokens (values,) of all values of the fact's attribute, or None.

    They exist where each value's tokens before its last are those of the right answer `gold`: then one forward pass has
    the probabilities of all. known: a cache.
    """
    key = fact.attribute, tuple(gold[:-1])
    if key not in known:
        tokens = [encoding.encode_ordinary(value) for value in values_of(fact)]
        same = tokens and all(tuple(t[:-1]) == key[1] for t in tokens)
        known[key] = torch.tensor([t[-1] for t in tokens]) if same else None
    return known[key]


def full_stops(gold):
    """How many full stops stand inside the right answer: 1 in "St. Elmere", 1 in "a.m.", whose last one ends it."""
    return gold.strip().rstrip(".").count(".")


def until_stop(tokens, encoding, inside=0):
    """The generated text up to its first full stop behind `inside` others, or end-of-text; and whether it ended."""
    ended = encoding.eot_token in tokens
    text = encoding.decode(tokens[:tokens.index(encoding.eot_token)] if ended else tokens)
    parts = text.split(".")
    return ".".join(parts[:inside + 1]), ended or len(parts) > inside + 1


def is_right(text, gold):
    """Exact match of the generated part, spaces and full stops at the end aside; an empty answer is wrong."""
    return text.strip().rstrip(".") == gold.strip().rstrip(".") != ""


# ---- multiple choice

def cut_options(item, encoding, start):
    """(question tokens, [tokens of each option]), `start` in front of the question.

    Each option is tokenized together with its question, as training saw them, and is what stands behind as many tokens
    as the question has alone; a space at the question's end belongs to the option. So cuts the EleutherAI harness.
    """
    text = item.question.rstrip(" ")
    moved = item.question[len(text):]
    question = [*start, *encoding.encode_ordinary(text)]
    options = [encoding.encode_ordinary(text + moved + option)[len(question) - len(start):] for option in item.options]
    if not (question and options and all(options)):
        raise ValueError(f"{item.question!r} is no question with options behind it, or one is empty: {item.options!r}")
    return question, options


@torch.no_grad()
def choose_option(subject, items, encoding, batch_size=None, start=None):
    """How likely the subject finds each option, and which it picks: one dict an item,

    logprobs     the log-probability (nats) of each option behind the question
    picked       the index of the highest: `acc` is the share of items where it is the gold one
    picked_norm  the index of the highest divided by the option's characters, its leading space not counted: `acc_norm`
    chosen       row of the pool, by the question alone

    batch_size  items at a time; default: 100, on a GPU 200
    start       tokens in front of every question; default: end-of-text, behind which every document of training stands

    A question is computed once, however many options it has; of the options, only what stands behind it.
    """
    start = [encoding.eot_token] if start is None else start
    cuts = [cut_options(item, encoding, start) for item in items]
    sizes = [(len(question), max(map(len, options)) - 1) for question, options in cuts]
    batch_size = batch_size or (200 if subject.device.type == "cuda" else 100)
    out = []
    for first, last in fitting(sizes, batch_size, subject.room()):
        out += choose_batch(subject, items[first:last], cuts[first:last], encoding)
    return out


def choose_batch(subject, items, cuts, encoding):
    """`choose_option` of a few items whose `cut_options` are at hand."""
    ids, lengths = pad([question for question, _ in cuts], encoding, subject.device)  # (B, T), (B,)
    chosen, cache, first = subject.start(ids, lengths)
    x = subject.model.hidden(ids, cache=cache, lengths=lengths, first=first)  # (B, T, C)
    at = torch.arange(len(cuts), device=ids.device)
    behind = log_softmax(subject.model, x[at, lengths - 1][:, None])[:, 0]  # (B, V): behind each question
    owner = [b for b, (_, options) in enumerate(cuts) for _ in options]  # whose option each is
    rows = [tokens for _, options in cuts for tokens in options]
    sums = [0.0] * len(rows)
    for n in sorted(set(map(len, rows))):  # options of one length together: nothing is computed for padding
        of = [r for r, tokens in enumerate(rows) if len(tokens) == n]
        mine = torch.tensor([owner[r] for r in of]).to(ids.device)  # (R,)
        after = torch.tensor([rows[r] for r in of]).to(ids.device)  # (R, n)
        log_p = behind[mine].gather(-1, after[:, :1])  # (R, 1): of each option's first token
        if n > 1:
            x = subject.model.hidden(after[:, :-1], cache=cache.repeat(mine, n - 1))  # (R, n - 1, C)
            log_p = torch.cat([log_p, log_softmax(subject.model, x).gather(-1, after[:, 1:, None])[..., 0]], dim=1)
        for r, total in zip(of, check_numbers(subject, log_p.sum(1)).tolist()):
            sums[r] = total
    out, chosen = [], chosen.tolist()
    for b, item in enumerate(items):
        mine, sums = sums[:len(item.options)], sums[len(item.options):]
        norm = [p / max(1, len(option.removeprefix(" "))) for p, option in zip(mine, item.options)]
        out.append({"logprobs": mine, "picked": mine.index(max(mine)), "picked_norm": norm.index(max(norm)),
                    "chosen": chosen[b]})
    return out


def log_softmax(model, x):
    """Log-probabilities (..., V) of the next token, in float32, from the last block's output x (..., C)."""
    return F.log_softmax(model.head(x).float(), dim=-1)


@torch.no_grad()
def perplexity(subject, windows, batch_size=250):
    """exp(mean loss in nats) a text token over windows (N, T), the first CONTEXT + 1 tokens of each read but not
    scored.
    """
    if windows.shape[1] < CONTEXT + 2:
        raise ValueError(f"a window needs at least {CONTEXT + 2} tokens, {CONTEXT} of them only read, "
                         f"got {windows.shape[1]}")
    total = 0.0
    for part in windows.split(batch_size):
        part = part.to(subject.device)
        ids = part[:, :-1]
        chosen, _ = subject.choose(ids[:, :CONTEXT], torch.full((len(part),), CONTEXT, device=ids.device))
        logits = subject.logits(ids, chosen)[:, CONTEXT:]
        total += F.cross_entropy(logits.flatten(0, 1).float(), part[:, CONTEXT + 1:].flatten(), reduction="sum").item()
    return float(check_numbers(subject, torch.tensor(total / windows[:, CONTEXT + 1:].numel())).exp())
