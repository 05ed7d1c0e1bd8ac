"""
What each repair costs when the model answers: IDP against no prompt, a prompt and LoRA, taking turns in one run.

    OMP_NUM_THREADS=1 python tests/bench_latency.py    # two to three minutes; exit status 1 where a claim is missed

The small GPT's prefill is spent on calling small operations, to which the choice adds its own: there the limit is a
close one, and on a busy machine it is missed. On the middle size time is arithmetic.

The paper (arXiv 2310.00867, abstract) claims for IDP 21 times fewer extra parameters than LoRA and 60 % less latency.
Here, of one text of `text` tokens:

    prefill    everything from the text to the first new token; for IDP also the choice among the prompts
    decode     each further token

of a model that is dense, pruned (half of its weights zero, multiplied as they are), packed (3 bits, eager kernel), with

    alone              no repair
    LoRA               unmerged, beside every linear layer;  merged: only a dense model can
    prompt uncached    the soft prompt runs through the model in front of the text
    prompt cached      its keys and values are there already
    IDP                a pool of them, chosen by first-layer attention

In each round every way runs once, in an order that moves on by one; a ratio is the median over rounds of the ratio
within a round, so that what slows the machine for a while slows both sides of it. Times are processor times of one
thread, which on an idle machine is the time one waits. Weights are random: time does not depend on what they say.
At the end, training: a step of a prompt through the frozen model against a step of all weights, on the same batch.
"""
import argparse
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import idp  # noqa: E402  the path comes first
import recover  # noqa: E402
from compress import magnitude, rtn  # noqa: E402
from kernels import PackedLinear, pack  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from study.repairs import unpacked  # noqa: E402
from world.score import Subject  # noqa: E402


@dataclass
class Bench:
    n_layer: int = 4       # the small GPT of the study
    n_embd: int = 96
    vocab_size: int = 1024
    text: int = 64         # tokens in front of the answer
    new: int = 16          # tokens decoded in one turn
    prompts: int = 8       # M, in the pool
    length: int = 16       # P, of each
    rank: int = 8          # of LoRA, on every linear layer
    rounds: int = 60
    prefill: float = 1.10  # limit of IDP's prefill over the one with no prompt
    steps: int = 24        # training steps that are timed, of each kind
    batch: int = 8         # rows of a training step, with a prompt of 8 tokens and 128 of text


SIZES = {"small": Bench(), "middle": Bench(n_layer=12, n_embd=384, vocab_size=4096, new=2, rounds=20, steps=4, batch=2)}


class Way(NamedTuple):
    """One way to answer: a Subject, a soft prompt (P, C) that runs in front of the text, a pool and its cache."""
    base: str
    name: str
    subject: Subject
    prompt: Any = None
    pool: Any = None
    filled: Any = None


# ---- the models

def linears(model):
    """(parent, name, layer) of every linear layer of the blocks."""
    return [(parent, name, child) for parent in model.blocks.modules() for name, child in parent.named_children()
            if isinstance(child, torch.nn.Linear)]


def make_model(bench, kind):
    """The same random GPT each time: dense, pruned or packed."""
    config = GPTConfig(vocab_size=bench.vocab_size, context=256, n_layer=bench.n_layer, n_head=bench.n_embd // 24,
                       n_embd=bench.n_embd)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    for parent, name, layer in linears(model):
        if kind == "pruned":
            layer.weight.mul_(magnitude(layer.weight, 0.5))
        if kind == "packed":
            setattr(parent, name, PackedLinear(pack(rtn(layer.weight, 3, group_size=32))))
    return model


def with_lora(bench, kind, merged=False):
    """The model with LoRA on every linear layer, B not zero; returns it and how many parameters LoRA has."""
    model, generator = make_model(bench, kind), torch.Generator().manual_seed(1)
    parameters = recover.add_lora(model, bench.rank, generator=generator)
    for p in parameters[1::2]:
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.01)
    if merged:
        recover.merge_lora(model)
    return model, sum(p.numel() for p in parameters)


@torch.no_grad()
def make_ways(bench):
    ways = [Way("dense", "alone", Subject(make_model(bench, "dense"))),
            Way("dense", "LoRA", Subject(with_lora(bench, "dense")[0])),
            Way("dense", "LoRA merged", Subject(with_lora(bench, "dense", merged=True)[0]))]
    for kind in ("pruned", "packed"):
        model, generator = make_model(bench, kind), torch.Generator().manual_seed(2)
        pool = idp.PromptPool([recover.prompt_init(model, bench.length, generator=generator)
                               for _ in range(bench.prompts)])
        filled = idp.prefill(model, pool)
        ways += [Way(kind, "alone", Subject(model)),
                 Way(kind, "prompt uncached", Subject(model), pool.prompts[0]),
                 Way(kind, "prompt cached", Subject(model, idp.prefill(model, idp.PromptPool([pool.prompts[0]])))),
                 Way(kind, "IDP", Subject(model), pool=pool, filled=filled),
                 Way(kind, "LoRA", Subject(with_lora(bench, kind)[0]))]
    return ways


# ---- time

def clock():
    """Seconds of processor time: with one thread that is the time an idle machine would take."""
    return time.process_time()


@torch.no_grad()
def turn(way, ids, new):
    """(milliseconds to the first new token, milliseconds for each of `new` more) of one answer to ids (1, T)."""
    model, room, chosen, first = way.subject.model, 1 + new, torch.zeros(len(ids), dtype=torch.long), None
    began = clock()
    if way.filled is not None:
        chosen, first = idp.choose(model, way.pool, ids, filled=way.filled)
        cache = way.filled.repeat(chosen, ids.shape[1] + room)
    else:
        cache = way.subject.cache(chosen, ids.shape[1] + room + (0 if way.prompt is None else len(way.prompt)))
    token = model.generate(ids, 1, prompt=way.prompt, cache=cache, first=first)[:, -1:]  # (1, 1)
    read = clock()
    model.generate(token, new, cache=cache)
    return 1000 * (read - began), 1000 * (clock() - read) / new


def measure(ways, bench):
    """{(base, name): [(prefill, decode) milliseconds of each round]}."""
    ids = torch.randint(bench.vocab_size, (1, bench.text), generator=torch.Generator().manual_seed(3))
    for way in ways:
        turn(way, ids, 2)  # the first call of anything is slow
    took = {way[:2]: [] for way in ways}
    for i in range(bench.rounds):
        at = i % len(ways)
        for way in ways[at:] + ways[:at]:
            took[way[:2]].append(turn(way, ids, bench.new))
    return took


def ratio(took, way, against, phase):
    """The median over rounds of `way`'s time in units of `against`'s; phase 0 is prefill, 1 decode."""
    return statistics.median(a[phase] / b[phase] for a, b in zip(took[way], took[against]))


def training(bench):
    """Milliseconds of a step {what: [...]}: all weights of the dense model, a prompt of 8 tokens before two others."""
    generator = torch.Generator().manual_seed(4)
    batch = torch.randint(bench.vocab_size, (bench.batch, 129), generator=generator)
    kinds = {"all weights, dense": make_model(bench, "dense"), "prompt, pruned": make_model(bench, "pruned"),
             "prompt, packed": unpacked(make_model(bench, "packed")),  # as study.train_repair has it
             "prompt, codes unpacked at every step": make_model(bench, "packed")}
    took = {kind: [] for kind in kinds}
    for _ in range(bench.steps // 2):
        for kind, model in kinds.items():
            marks, soft = [], recover.SoftPrompt(recover.prompt_init(model, 8, generator=generator))
            loss = recover.objective(prompt_forward(model, soft) if kind.startswith("prompt") else model)
            recover.fit(model, soft.parameters() if kind.startswith("prompt") else model.parameters(), [batch], loss,
                        recover.FitConfig(steps=3), progress=lambda step, loss: marks.append(clock()))
            took[kind] += [1000 * (b - a) for a, b in zip(marks, marks[1:])]  # the first step also makes AdamW's state
    return took


def prompt_forward(model, soft):
    return lambda ids: model(ids, prompt=soft())


# ---- the report

def parameters(bench):
    """What LoRA and the pool add, by counting, and the formula of their ratio by hand."""
    L, C, P, M, r = bench.n_layer, bench.n_embd, bench.length, bench.prompts, bench.rank
    lora = with_lora(bench, "dense")[1]
    print(f"\nextra parameters: LoRA {lora:,}; IDP {P * C:,} active, {M * P * C:,} stored")
    print(f"  LoRA / active = L r (in + out of every linear layer) / (P C) = {L} * {r} * 18 C / ({P} C) = "
          f"{18 * L * r / P:g}; LoRA / stored = that / M = {18 * L * r / P / M:g}")
    return lora / (P * C)


def report(name, bench):
    """Run one size, print its tables, and return [(claim, value, limit, held)]."""
    print(f"\n{name}: {bench.n_layer} layers of width {bench.n_embd}, {bench.text} tokens of text, "
          f"{bench.new} decoded a turn, {bench.prompts} prompts of {bench.length}, LoRA rank {bench.rank}, "
          f"{bench.rounds} rounds\n")
    took = measure(make_ways(bench), bench)
    print(f"{'':26s} {'prefill ms':>11s} {'/ alone':>8s} {'decode ms':>11s} {'/ alone':>8s} {'/ LoRA':>8s}")
    for base, what in took:
        prefill, decode = (statistics.median(t[phase] for t in took[base, what]) for phase in (0, 1))
        alone, lora = (base, "alone"), (base, "LoRA")
        print(f"{base + ', ' + what:26s} {prefill:11.3f} {ratio(took, (base, what), alone, 0):8.3f} {decode:11.3f} "
              f"{ratio(took, (base, what), alone, 1):8.3f} {ratio(took, (base, what), lora, 1):8.3f}")
    fewer = parameters(bench)
    steps = {kind: statistics.median(t) for kind, t in training(bench).items()}
    full = steps["all weights, dense"]
    print(f"\na training step ({bench.batch} rows of 128 tokens, prompt 8): "
          + "; ".join(f"{kind} {ms:.1f} ms ({ms / full:.2f})" for kind, ms in steps.items()))
    claims = [(f"{name}: LoRA's parameters / IDP's active ones", fewer, ">=", 21),
              *((f"{name}, {base}: a prompt step / a step of all weights", steps[f"prompt, {base}"] / full, "<=", 0.8)
                for base in ("pruned", "packed"))]
    for base in ("pruned", "packed"):
        for against, phase, limit in (("alone", 0, bench.prefill), ("alone", 1, 1.05), ("LoRA", 1, 1.00)):
            claims.append((f"{name}, {base}: IDP / {against}, {('prefill', 'decode')[phase]}",
                           ratio(took, (base, "IDP"), (base, against), phase), "<=", limit))
    return claims


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(),
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all", help="which model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    claims = []
    for name in SIZES if args.size == "all" else [args.size]:
        claims += report(name, SIZES[name])
    print()
    for claim, value, side, limit in claims:
        held = value <= limit if side == "<=" else value >= limit
        print(f"{'held' if held else 'MISSED':6s}  {claim}: {value:.3f} {side} {limit}")
    sys.exit(any((value > limit) if side == "<=" else (value < limit) for _, value, side, limit in claims))


if __name__ == "__main__":
    main()
