"""
Three experiments on tests/golden/trained/, each with a target in numbers; none trains for more than two minutes.

    python exercises/experiments.py scan          # sitting 2: which kind of layer, left dense, gives most back?
    python exercises/experiments.py two-bits      # sitting 3: is displaced above that of 3 bits?
    python exercises/experiments.py leak          # sitting 4: held-out people in the repair text

Say what you expect before you run one. docs/lecture.md has what they print, and what follows from it.
"""
import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.script import guard  # noqa: E402  before torch: Ctrl-C is one line

import torch  # noqa: E402

import recover  # noqa: E402
from checkpoints import load  # noqa: E402
from compress import compress  # noqa: E402
from recover import FitConfig, add_targets  # noqa: E402
from study.ask import TRAINED, read_world  # noqa: E402
from study.repairs import attach, light, train_repair  # noqa: E402
from study.settings import StudyConfig  # noqa: E402
from study.statistics import Estimate, by_person, detectable_flips, flip_test, resampled, share_of  # noqa: E402
from study.tables import markdown, share  # noqa: E402
from world.facts import statements, taught_questions  # noqa: E402
from world.score import Subject, answer  # noqa: E402
from world.small import World  # noqa: E402

KINDS = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o", "up": "mlp.up", "down": "mlp.down"}
RANK, STEPS, LR = 8, 200, 3e-3  # of LoRA, as in the study
POWER_80 = 1.96 + 0.84      # standard errors: a difference so large is found at the level 5 % in 80 of 100 studies
NAMES = "dense", "SparseGPT 50 %", "+ LoRA, seen people in its text", "+ LoRA, held-out, too"


class Bench:
    """The dense GPT of tests/golden/trained/, its world, and what every experiment does with them."""

    def __init__(self):
        path = str(ROOT / TRAINED / "dense.safetensors")
        self.config = StudyConfig(world=read_world(path), repair_steps=STEPS)
        self.world, self.dense = World(self.config), load(path).float().requires_grad_(False)
        self.calibration = self.world.calibration(self.config)
        self.facts = {split: self.world.facts(split) for split in ("seen", "heldout")}

    def compressed(self, method, **settings):
        """The dense GPT compressed, calibrated on text about seen people."""
        return compress(self.dense, self.calibration, method, **settings)[0]

    def with_lora(self, model, split_of_text=("seen",)):
        """`model` repaired by LoRA on text about these splits, distilled from the dense GPT."""
        told = [p for split in split_of_text for p in self.world.people[split]]
        self.world.repair_text = statements(told) + taught_questions(told)
        batches = add_targets(self.dense, self.world.repair_rows(self.config))
        fit_config, seed = FitConfig(STEPS, LR), self.config.seed
        tensors = train_repair(model, "lora", RANK, batches, recover.distillation, fit_config, seed)
        return attach(model, "lora", RANK, tensors).model

    def answers(self, *models):
        """{split: (models, facts) 1 where a model answers rightly}."""
        subjects = [light(Subject(model)) for model in models]
        return {split: [[float(a["correct"]) for a in answer(s, facts, self.world.encoding)] for s in subjects]
                for split, facts in self.facts.items()}

    def recalls(self, right, split="heldout", seed=0):
        """An Estimate of the recall of each model, all on the same resamples of people."""
        sums, sizes = by_person(right[split], self.facts[split])
        samples = resampled(sums, 10_000, torch.Generator().manual_seed(seed), sizes).numpy()
        return [Estimate(float(sums[:, i].sum() / sizes.sum()), samples[:, i:i + 1]) for i in range(sums.shape[1])]

    def shares(self, right, repaired, compressed):
        """Displaced and re-learned of model number `repaired`, made from number `compressed`; the dense one is 0."""
        found = {}
        for split in ("heldout", "seen"):
            a = self.recalls(right, split, seed=len(found))
            found[split] = share_of(a[repaired] - a[compressed], a[0] - a[compressed])
        return found["heldout"], found["seen"] - found["heldout"]


def cell(estimate):
    """An Estimate in percent, with its interval."""
    return share([estimate.value, *estimate.interval()])


def scan():
    """GPTQ at 3 bits with one kind of layer left as it was: how much of the loss comes back."""
    bench = Bench()
    models = [bench.dense, bench.compressed("gptq", bits=3)]
    models += [bench.compressed("gptq", bits=3, targets=tuple(other for other in KINDS.values() if other != name))
               for name in KINDS.values()]
    right = bench.answers(*models)
    recalls = bench.recalls(right)
    block = bench.dense.blocks[0]
    every = sum(block.get_submodule(name).weight.numel() for name in KINDS.values())
    rows = [["all", "0", cell(recalls[1]), "0"]]
    for i, (kind, name) in enumerate(KINDS.items(), 2):
        back = share_of(recalls[i] - recalls[1], recalls[0] - recalls[1])
        weights = block.get_submodule(name).weight.numel() / every
        rows.append([f"all but {kind}", f"{100 * weights:.1f}", cell(recalls[i]), cell(back)])
    print(markdown(["at 3 bits", "left dense, % of weights", "held-out recall %", "given back, % of the loss"], rows))


def two_bits():
    """LoRA on GPTQ at 3 and at 2 bits: is displaced the same share of what was lost?"""
    bench, models = Bench(), {}
    for bits in (3, 2):
        models[f"{bits} bits"] = bench.compressed("gptq", bits=bits)
        models[f"{bits} bits, + LoRA"] = bench.with_lora(models[f"{bits} bits"])
    right = bench.answers(bench.dense, *models.values())
    recalls, entities = bench.recalls(right), [f.person for f in bench.facts["heldout"]]
    rows, back = [["dense", cell(recalls[0]), "", "", ""]], []
    for i, name in enumerate(models, 1):
        if i % 2:
            rows.append([name, cell(recalls[i]), "", "", ""])
            continue
        displaced, relearned = bench.shares(right, i, i - 1)
        p = flip_test(right["heldout"][i - 1], right["heldout"][i], entities)[2]
        rows.append([name, cell(recalls[i]), cell(displaced), cell(relearned), f"{p:.1e}"])
        back.append(displaced)
    print(markdown(["GPTQ", "held-out recall %", "displaced %", "re-learned %", "p of no gain"], rows))
    difference = back[1] - back[0]
    below = float((difference.samples <= 0).mean())
    error = float(difference.samples.std())
    p = max(min(2 * min(below, 1 - below), 1), 2e-4)  # 2 of 10,000 resamples are the least that can be told
    print(f"\nH0: LoRA brings back the same share at 2 bits as at 3 bits\n"
          f"displaced at 2 bits - at 3 bits: {cell(difference)} points, two-sided p = {p:.2g} (bootstrap over people)\n"
          f"power: with its standard error of {100 * error:.1f} points "
          f"a difference of {100 * POWER_80 * error:.0f} points is found four times in five")
    found = detectable_flips(right["heldout"][3], right["heldout"][4], entities)
    print(f"the gain at 2 bits alone: {100 * found:.1f} points of recall would have been found four times in five")


def leak():
    """SparseGPT 50 % repaired by LoRA on text about seen people, and on text that names held-out people, too."""
    bench = Bench()
    base = bench.compressed("sparsegpt", sparsity=0.5)
    models = [bench.dense, base, bench.with_lora(base), bench.with_lora(base, ("seen", "heldout"))]
    right = bench.answers(*models)
    seen, heldout = bench.recalls(right, "seen", 1), bench.recalls(right)
    rows = [[name, cell(seen[i]), cell(heldout[i]), *map(cell, bench.shares(right, i, 1) if i > 1 else ())]
            for i, name in enumerate(NAMES)]
    rows = [row + [""] * (5 - len(row)) for row in rows]
    print(markdown(["model", "seen recall %", "held-out recall %", "displaced %", "re-learned %"], rows))
    (honest, honest_re), (leaky, leaky_re) = (bench.shares(right, i, 1) for i in (2, 3))
    print(f"\nthe leak adds {cell(leaky - honest)} points to displaced and {cell(leaky_re - honest_re)} to re-learned")
    try:
        bench.world.check_leaks(torch.cat(bench.world.repair_rows(bench.config)))
    except AssertionError as error:
        print("World.check_leaks, which the study calls before every repair, refuses this text:\n"
              f"  {str(error)[:72]}...")


EXPERIMENTS = {"scan": scan, "two-bits": two_bits, "leak": leak}


def main():
    """The script: see the top of this file."""
    parser = argparse.ArgumentParser(prog="experiments.py", description="Three experiments on the small GPT.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("name", choices=list(EXPERIMENTS), help="which")
    args = parser.parse_args()
    torch.set_num_threads(1)
    EXPERIMENTS[args.name]()


if __name__ == "__main__":
    guard(main)
