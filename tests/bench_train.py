"""
How fast the study trains: tokens a second of `recover.fit` beside a plain GPT-2 of the same shape with a plain AdamW
loop.

    OMP_NUM_THREADS=1 python tests/bench_train.py             # a minute; exit status 1 where a claim is missed
    python tests/bench_train.py --compile                     # ours compiled too, with the seconds that compiling takes

The peer is the least that a GPT-2 needs in PyTorch: one product for q, k and v, PyTorch's own LayerNorm, GELU and
attention, learned positions, a tied head, AdamW with clipping. It does less than ours: no rotation of q and k, no Muon,
no schedule, no check for losses that are not finite, no cache, no prompts. Both read the same random tokens, so that
nothing is learned and nothing but time is compared. Both keep the memory that they free, as a study does
(engine/memory.py). The two take turns, a few steps each; a ratio is the median over rounds of the ratio within a
round. Times are processor times, which on one thread of an idle machine is the time one waits.
"""
import argparse
import pathlib
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import recover  # noqa: E402  the path comes first
from engine.memory import keep_memory  # noqa: E402
from engine.products import linear  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

V, L, NH, C, B, T = 1024, 4, 4, 96, 32, 64  # the study's dense GPT and its batch
LIMIT = 1.0  # tokens a second of ours with Muon over the peer's


# ---- the peer

class PeerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.o = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).view(B, T, 3, NH, C // NH).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Peer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks, self.norm = nn.Sequential(*(PeerBlock() for _ in range(L))), nn.LayerNorm(C, bias=False)

    def forward(self, ids):
        x = self.blocks(self.tokens(ids) + self.places.weight)
        return F.linear(self.norm(x), self.tokens.weight)


def peer_steps(n, rows):
    """A function that trains the peer for n steps."""
    model = Peer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))

    def run():
        for _ in range(n):
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return run


# ---- ours

def our_steps(n, rows, muon, compiled=False):
    """A function that trains the study's GPT for n steps of `recover.fit`."""
    model = GPT(GPTConfig(vocab_size=V)).init_weights(torch.Generator().manual_seed(0))
    config = recover.FitConfig(steps=n, lr=1e-3, muon=muon, weight_decay=0.1)
    loss = torch.compile(recover.objective(model)) if compiled else None
    return lambda: recover.fit(model, model.parameters(), [rows], loss, config)


def seconds(run):
    began = time.process_time()
    run()
    return time.process_time() - began


def product_ratios(repeats=50):
    """{(rows, in, out): PyTorch's own product over ours in time}, in turns, the median of the ratios."""
    found = {}
    for rows, n_in, n_out in ((B * T, C, 4 * C), (B * T, 4 * C, C), (C, B * T, 4 * C), (B * T, C, V)):
        x, W, ratios = torch.randn(rows, n_in), torch.randn(n_out, n_in), []
        for _ in range(repeats):
            ratios.append(seconds(lambda: F.linear(x, W)) / seconds(lambda: linear(x, W)))
        found[rows, n_in, n_out] = statistics.median(ratios)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(),
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--steps", type=int, default=4, help="training steps in one turn")
    parser.add_argument("--compile", action="store_true", help="ours under torch.compile as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory()
    print(f"{torch.backends.cpu.get_cpu_capability()}, 1 thread, torch {torch.__version__}: {L} layers of {C}, "
          f"{B} x {T} tokens a step, vocabulary {V:,}, {args.rounds} rounds of {args.steps} steps\n")
    print("F.linear's time over ours: " + ", ".join(
        f"{ratio:.2f} ({' x '.join(map(str, shape))})" for shape, ratio in product_ratios().items()) + "\n")
    rows = torch.randint(V, (B, T + 1))
    runs = {"peer, AdamW": peer_steps(args.steps, rows), "ours, AdamW": our_steps(args.steps, rows, 0.0),
            "ours, Muon": our_steps(args.steps, rows, 0.02)}
    if args.compile:
        runs |= {"ours, AdamW, compiled": our_steps(args.steps, rows, 0.0, compiled=True),
                 "ours, Muon, compiled": our_steps(args.steps, rows, 0.02, compiled=True)}
    for name, run in runs.items():
        began = time.time()
        run()  # the first call of anything is slow
        if "compiled" in name:
            print(f"{name}: {time.time() - began:.1f} s to compile and take the first steps")
    took = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            took[name].append(seconds(run))
    print(f"{'':24s} {'ms a step':>10s} {'tokens/s':>10s} {'/ peer':>8s}")
    ratios = {}
    for name, times in took.items():
        ms = 1000 * statistics.median(times) / args.steps
        ratios[name] = statistics.median(p / t for p, t in zip(took["peer, AdamW"], times))
        print(f"{name:24s} {ms:10.1f} {1000 * B * T / ms:10,.0f} {ratios[name]:8.2f}")
    held = ratios["ours, Muon"] >= LIMIT
    print(f"\n{'held' if held else 'MISSED'}  tokens a second, ours with Muon / the peer: "
          f"{ratios['ours, Muon']:.2f} >= {LIMIT}")
    sys.exit(not held)


if __name__ == "__main__":
    main()
