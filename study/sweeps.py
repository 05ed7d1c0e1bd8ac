"""
Sweeps: one setting varied, everything else held, a point a run.

    bits            RTN and GPTQ at 2 to 8 bits, GPTQ as published and with what `compress.gptq` adds
    sparsity        magnitude, Wanda and SparseGPT at 10 % to 70 %, and with 2 of every 4 weights kept; SparseGPT as
                    published and with `refit`
    prompt-length   a soft prompt of 1 to 32 tokens for each compressed model that the study repairs
    rank            LoRA of rank 1 to 32 for the same
    damage          dose and response: four compressors at four levels each, and what a prompt, biases and LoRA of rank
                    1 and 8 bring back, against what was lost

A point of damage is displaced and re-learned, see study/shares.py. Any other point is recall by split with its
interval, and perplexity. For prompts, perplexity stands there twice: divided by the text's tokens, and as published
code divides it, by text and prompt positions together. The second falls as the prompt grows, even where the model
reads no better: exp(loss * text / (text + P)).

Runs of a sweep do not need each other: under torchrun every process makes its share in turn, and the first one reads
the others', on one machine or on several that share the output folder. They meet only there: whoever wants what
another process is making waits for its lock (study/steps.py). Each run computes on one thread, because sums in another
order are other numbers: so the points are the same, digit for digit, however many processes there are.

    python -m study sweep bits
    torchrun --nproc-per-node 2 -m study sweep sparsity

What it leaves out: two settings varied at once, curves fitted to the points.
"""
import json
import os
import sys

from dataclasses import replace

import torch

import recover
from compress import compress
from engine.files import read_json, write_text
from study.comparisons import ANSWERS
from study.repairs import attach, light, train_repair
from study.settings import REPAIRS, config_of, job_parser, rate
from study.shares import add_shares
from study.statistics import by_person, interval, resampled
from study.steps import Run
from study.subjects import compressed_subject, dense_subject, repair_batches, repaired_subject
from study.tables import markdown, share
from world.score import CONTEXT, Subject, answer, perplexity
from world.small import World

BITS = (2, 3, 4, 5, 6, 8)
SPARSITIES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)
LENGTHS = (1, 2, 4, 8, 16, 24, 32)
RANKS = (1, 2, 4, 8, 16, 32)
REPAIRED = ("GPTQ 3 bits", "SparseGPT 50 %")  # what sweeps of repairs begin from
DOSES = ("prompt 8", "biases", "LoRA rank 1", "LoRA rank 8")  # how each of them is repaired
SWEEPS = ("bits", "sparsity", "prompt-length", "rank", "damage")


def quantized(name, *levels):
    """[(tag, operation)] of a quantizer at some (bits, group size)."""
    return [(f"{name} {bits} bits, groups of {size}",
             ("quantize", name.lower(), {"bits": bits, "group_size": size})) for bits, size in levels]


def pruned(name, *levels):
    """[(tag, operation)] of a pruner at some shares of zeros."""
    return [(f"{name} {zeros:.0f} %", ("prune", name.lower(), {"sparsity": zeros / 100})) for zeros in levels]


DAMAGE = {"RTN": quantized("RTN", (2, 32), (3, 96), (3, 32), (4, 96)),
          "GPTQ": quantized("GPTQ", (2, 96), (2, 32), (3, 96), (3, 32)),
          "magnitude": pruned("magnitude", 30, 40, 50, 60),
          "SparseGPT": pruned("SparseGPT", 40, 50, 60, 70)}


def runs_of(name, config):
    """The runs of a sweep, in order: dicts with "series" and "x", and how to make the model."""
    if name == "damage":
        return [{"series": series, "x": tag, "operation": operation} for series, levels in DAMAGE.items()
                for tag, operation in levels]
    if name == "bits":
        group = next((how["group_size"] for _, _, how in config.compressions.values() if "group_size" in how), None)
        ways = {"RTN": ("rtn", {}), "GPTQ": ("gptq", {}),
                "GPTQ, search and refit": ("gptq", {"search": True, "refit": True})}
        return [{"series": label, "x": bits, "method": method, "how": {"bits": bits, "group_size": group, **more}}
                for label, (method, more) in ways.items() for bits in BITS]
    if name == "sparsity":
        ways = {"magnitude": ("magnitude", {}), "Wanda": ("wanda", {}), "SparseGPT": ("sparsegpt", {}),
                "SparseGPT, refit": ("sparsegpt", {"refit": True})}
        return [*({"series": label, "x": s, "method": method, "how": {"sparsity": s, **more}}
                  for label, (method, more) in ways.items() for s in SPARSITIES),
                *({"series": f"{label} 2:4", "x": 0.5, "method": method, "how": {"n_m": (2, 4), **more}}
                  for label, (method, more) in ways.items())]
    kind, sizes = {"prompt-length": ("prompt", LENGTHS), "rank": ("lora", RANKS)}[name]
    return [{"series": base, "x": size, "kind": kind, "lr": nearest_rate(config, base, kind, size)}
            for base in REPAIRED for size in sizes]


def nearest_rate(config, base, kind, size):
    """The learning rate chosen for the repair of this kind whose size is the nearest ratio away."""
    known = {how[1] if isinstance(how[1], int) else how[1][0]: rate(config, base, tag, *how)
             for tag, how in config.repairs.items() if how[0] == kind}
    if not known:
        raise ValueError(f"no learning rate is known for {kind}")
    return known[min(known, key=lambda other: max(size / other, other / size))]


def make(run, point, dense, batches):
    """(the Subject of one point of a sweep, the tokens that stand in front of its text)."""
    config = run.config
    if "method" in point:
        model, _ = compress(dense.model, run.world.calibration(config), point["method"], **point["how"])
        return Subject(model), 0
    base = compressed_subject(run, dense, point["series"])
    fit_config = recover.FitConfig(steps=config.repair_steps, lr=point["lr"])
    tensors = train_repair(base.model, point["kind"], point["x"], batches(), recover.distillation, fit_config,
                           config.seed, bfloat16=config.repair_bfloat16)
    return attach(base.model, point["kind"], point["x"], tensors), point["x"] if point["kind"] == "prompt" else 0


def measure(run, subject, length):
    """What one point measures: recall by split [mean, low, high], perplexity a text token, and as others divide it."""
    world, generator = run.world, torch.Generator().manual_seed(run.config.seed + 8)
    out = {"perplexity": perplexity(subject, world.windows)}
    scored = world.windows.shape[1] - 1 - CONTEXT  # text tokens a window
    out["perplexity_wrong_divisor"] = out["perplexity"] ** (scored / (scored + length))
    for split, facts in world.asked(run.config).items():
        sums, sizes = by_person([[a["correct"] for a in answer(subject, facts, world.encoding)]], facts)
        drawn = resampled(sums, 10_000, generator, sizes)[:, 0]
        out[f"recall_{split}"] = [float(sums.sum() / sizes.sum()), *interval(drawn)]
    return out


def dose(run, point, dense, batches):
    """One level of damage: a point for each repair of DOSES, displaced and re-learned [mean, low, high] or None."""
    repairs = {tag: REPAIRS.get(tag, ("lora", 1)) for tag in DOSES}
    config = replace(run.config, compressions={point["x"]: point["operation"]}, repairs=repairs,
                     rates={**run.config.rates, "LoRA rank 1": run.config.rates["LoRA rank 8"]})
    level, asked = Run(config, run.world, run.log), run.world.asked(config)
    base = compressed_subject(level, dense, point["x"])
    subjects = [dense, base, *(repaired_subject(level, base, tag, *how, batches) for tag, how in repairs.items())]
    rows = [{"id": s.about["id"], "base": s.about["base"], "metrics": {}, "intervals": {},
             "answers": {split: answer(light(s), facts, run.world.encoding) for split, facts in asked.items()}}
            for s in subjects]
    add_shares([rows], asked, config.seed)
    lost = rows[0]["metrics"]["recall_heldout"] - rows[1]["metrics"]["recall_heldout"]

    def share(row, name):
        """[mean, low, high], or None where too little was lost to divide by."""
        value = row["metrics"][name]
        return None if value is None else [value, *row["intervals"][name]]
    return [{"lost": lost, "repair": tag, **{name: share(row, name) for name in ("displaced", "relearned")}}
            for tag, row in zip(repairs, rows[2:])]


def run_sweep(run, name, dense):
    """The points of one sweep, in order; None in every process of torchrun but the first."""
    config, rank, many = run.config, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    threads, made = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    batches, points = repair_batches(run, dense), runs_of(name, config)
    own = range(rank, len(points), many)
    others = [i for i in range(len(points)) if i not in own] if rank == 0 else []  # read, waited for, or made here
    for i in [*own, *others]:
        point = points[i]
        settings = {**dense.about["settings"], "run": point, "calibration": config.calibration,
                    "repair_batch": config.repair_batch, "steps": config.repair_steps,
                    "test_people": config.test_people}
        found = run.once_json(f"sweep-{name}-{i:02d}", settings, ("study.sweeps", *ANSWERS),
                              lambda: dose(run, point, dense, batches) if name == "damage"
                              else [measure(run, *make(run, point, dense, batches))])
        made[i] = [{"series": point["series"], "x": point["x"], **one} for one in found]
    torch.set_num_threads(threads)
    return None if rank else [one for i in sorted(made) for one in made[i]]


def sweep_rates(run, dense):
    """Try the learning rates of the grid for each repair but the pool, whose prompts learn as a single one does.

    Judged on the validation people: recall, with the log-probability of the right answer beside it. Prints a row a run.
    """
    config, batches, facts = run.config, repair_batches(run, dense), run.world.facts("validation")
    for base_tag in config.compressions:
        base = compressed_subject(run, dense, base_tag)
        for tag, (kind, size) in config.repairs.items():
            for lr in config.rate_grid.get(kind, ()):
                tensors = train_repair(base.model, kind, size, batches(), recover.distillation,
                                       recover.FitConfig(steps=config.repair_steps, lr=lr), config.seed,
                                       bfloat16=config.repair_bfloat16)
                given = answer(attach(base.model, kind, size, tensors), facts, run.world.encoding)
                recall, logprob = (sum(a[key] for a in given) / len(given) for key in ("correct", "logprob"))
                print(f"{base_tag:15s} {tag:12s} lr {lr:<7g} validation recall {recall:.1%}, "
                      f"log-probability {logprob:.3f}", flush=True)


# ---- results

def keep(run, name, points, dense):
    """Add a sweep's points to results.json, beside whatever the study has written there."""
    path, settings = run.path("results.json"), dense.about["settings"]
    with run.holding("results.json"):
        results = results_of(path)
        sweeps = {**kept(path, settings), name: {"settings": settings, "points": points}}
        write_text(path, json.dumps({**results, "sweeps": sweeps}, indent=1))


def kept(path, settings):
    """The sweeps in results.json that were made of the dense model of these settings."""
    settings = json.loads(json.dumps(settings))
    sweeps = results_of(path).get("sweeps")
    return {name: sweep for name, sweep in (sweeps if isinstance(sweeps, dict) else {}).items()
            if isinstance(sweep, dict) and sweep.get("settings") == settings}


def results_of(path):
    """What results.json holds; nothing where it is missing, or cut short, which is said: it will be written anew."""
    try:
        return read_json(path) if os.path.exists(path) else {}
    except ValueError as error:
        print(f"{error}; it is written anew", file=sys.stderr)
        return {}


def sweep_table(name, points):
    """A sweep as a Markdown table, recalls and shares in percent with their intervals."""
    if name == "damage":
        return markdown(["level", "lost %", *(f"{tag}: displaced %" for tag in DOSES)],
                        [[base, f"{100 * mine[0]['lost']:.1f}",
                          *(share(p["displaced"]) if p["displaced"] else "too little was lost" for p in mine)]
                         for base, mine in ((x, [p for p in points if p["x"] == x])
                                            for x in dict.fromkeys(p["x"] for p in points))])
    splits = [key for key in points[0] if key.startswith("recall_")]
    heads = [key.removeprefix("recall_").replace("heldout", "held-out") + " %" for key in splits]
    return markdown(["model", name, "perplexity", "by text + prompt (wrong)", *heads],
                    [[p["series"], f"{p['x']:g}", f"{p['perplexity']:.2f}", f"{p['perplexity_wrong_divisor']:.2f}",
                      *(share(p[split]) for split in splits)] for p in points])


def main(arguments):
    """python -m study sweep: see the top of this file."""
    parser = job_parser("study sweep", "Vary one setting, everything else held; or try learning rates.")
    parser.add_argument("what", choices=["lr", *SWEEPS], help="lr: on validation people, printed; others also go into "
                                                              "results.json")
    args = parser.parse_args(arguments)
    config = config_of(args)
    run = Run(config, World(config))
    dense = dense_subject(run)
    if args.what == "lr":
        return sweep_rates(run, dense)
    points = run_sweep(run, args.what, dense)
    if points:
        print(sweep_table(args.what, points))
        keep(run, args.what, points, dense)
