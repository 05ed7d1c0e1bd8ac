"""
Sweeps: one setting varied, everything else held, a point a run.

    bits        RTN and GPTQ at 2 to 8 bits, GPTQ as published and with what `compress.gptq` adds
    sparsity    magnitude, Wanda and SparseGPT at 10 % to 70 %, and with 2 of every 4 weights kept; SparseGPT as
                published and with `refit`
    damage      dose and response: four compressors at four levels each, and what a prompt, biases and LoRA of rank
                1 and 8 bring back, against what was lost
    size        what prompts of 1 to 32 tokens, biases and LoRA of rank 1 to 16 bring back, against their parameters,
                where the study rounds to nearest and by GPTQ
    steps       what prompts and biases bring back there after half as many steps as in the study to 8 times as many;
                --times says other multiples

`--seeds K` gives damage, size and steps K dense GPTs, each compressed and repaired anew, as in evaluate.py.
A point of bits and sparsity is recall by split with its interval, and perplexity. A point of the others is displaced
and re-learned, see study/shares.py.

Runs of a sweep do not need each other: under torchrun every process makes its share in turn, and the first one reads
the others', on one machine or on several that share the output folder. They meet only there: whoever wants what
another process is making waits for its lock (study/steps.py). Each run computes on one thread, because sums in another
order are other numbers: so the points are the same, digit for digit, however many processes there are.

    python -m study sweep bits
    torchrun --nproc-per-node 2 -m study sweep sparsity
    python -m study sweep steps --times 4 --seeds 5

What it leaves out: two settings varied at once, curves fitted to the points.
"""
import functools
import json
import math
import os
import sys

from dataclasses import replace

import torch

import recover
from compress import compress
from engine.files import read_json, write_text
from study.comparisons import ANSWERS
from study.repairs import answers, attach, light, train_repair
from study.settings import KIND_RATES, MORE, OPERATION, REPAIRS, config_of, job_parser
from study.shares import add_shares
from study.statistics import recalls_of
from study.steps import Run, digest, slug
from study.subjects import compressed_subject, dense_of_draw, dense_subject, repair_batches, repaired_subject
from study.tables import markdown, share
from world.score import Subject, answer, perplexity
from world.small import World

BITS = (2, 3, 4, 5, 6, 8)
SPARSITIES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)
STEPS = (0.5, 1, 2, 4, 8)  # times the steps of the study
SIZES = {**{f"prompt {n}": ("prompt", n) for n in (1, 2, 4, 8, 16, 32)},
         "biases": REPAIRS["biases"], "LoRA rank 1 on o": MORE["LoRA rank 1 on o"],
         **{f"LoRA rank {n}": ("lora", n) for n in (1, 2, 4, 8, 16)}}
REPAIRED = {"damage": ("prompt 8", "biases", "LoRA rank 1", "LoRA rank 8"), "size": tuple(SIZES),
            "steps": ("prompt 8", "prompt 32", "biases")}  # how a sweep repairs what it damaged
SWEEPS = ("bits", "sparsity", *REPAIRED)


def quantized(name, *levels):
    """[(tag, operation)] of a quantizer at some (bits, group size)."""
    return [(f"{name} {bits} bits, groups of {size}",
             ("quantize", name.lower(), {"bits": bits, "group_size": size})) for bits, size in levels]


def pruned(name, *levels):
    """[(tag, operation)] of a pruner at some shares of zeros."""
    return [(f"{name} {zeros:.0f} %", ("prune", name.lower(), {"sparsity": zeros / 100})) for zeros in levels]


DAMAGE = [*quantized("RTN", (2, 32), (3, 96), (3, 32), (4, 96)), *quantized("GPTQ", (2, 96), (2, 32), (3, 96), (3, 32)),
          *pruned("magnitude", 30, 40, 50, 60), *pruned("SparseGPT", 40, 50, 60, 70)]


def runs_of(name, config, times=STEPS):
    """The runs of a sweep, in order: dicts that say what is measured and how its model, or its repairs, are made.

    times  by what the sweep of steps multiplies the steps of the study
    """
    if name in REPAIRED:
        levels = DAMAGE if name == "damage" else [(tag, operation) for tag, operation in config.compressions.items()
                                                  if operation[1] in ("rtn", "gptq")]
        return [{"base": tag, "operation": operation, "repairs": {repair: SIZES[repair] for repair in REPAIRED[name]},
                 "steps": int(factor * config.repair_steps)}
                for tag, operation in levels for factor in (times if name == "steps" else [1])]
    if name == "bits":
        group = next((how["group_size"] for _, _, how in config.compressions.values() if "group_size" in how), None)
        ways = {"RTN": ("rtn", {}), "GPTQ": ("gptq", {}),
                "GPTQ, search and refit": ("gptq", {"search": True, "refit": True})}
        return [{"series": label, "x": bits, "method": method, "how": {"bits": bits, "group_size": group, **more}}
                for label, (method, more) in ways.items() for bits in BITS]
    ways = {"magnitude": ("magnitude", {}), "Wanda": ("wanda", {}), "SparseGPT": ("sparsegpt", {}),
            "SparseGPT, refit": ("sparsegpt", {"refit": True})}
    return [*({"series": label, "x": s, "method": method, "how": {"sparsity": s, **more}}
              for label, (method, more) in ways.items() for s in SPARSITIES),
            *({"series": f"{label} 2:4", "x": 0.5, "method": method, "how": {"n_m": (2, 4), **more}}
              for label, (method, more) in ways.items())]


def measure(run, point, dense):
    """The point of one compressed model: its recall by split [mean, low, high] and its perplexity."""
    world, generator = run.world, torch.Generator().manual_seed(run.config.seed + 8)
    subject = light(Subject(compress(dense.model, world.calibration(run.config), point["method"], **point["how"])[0]))
    out = {"series": point["series"], "x": point["x"], "perplexity": perplexity(subject, world.windows)}
    for split, facts in world.asked(run.config).items():
        right = [[a["correct"] for a in answer(subject, facts, world.encoding)]]
        out[f"recall_{split}"], = recalls_of(right, facts, generator)
    return out


def dosed(run, point, dense, batches):
    """The Subjects of one level of damage in one draw: dense, damaged, and each repair."""
    tag, steps = point["base"], point["steps"]
    config = replace(run.config, compressions={tag: point["operation"]}, repair_steps=steps)
    level = Run(config, run.world, run.log)
    base = compressed_subject(level, dense, tag)

    def repaired(repair, kind, size):
        """Kept apart from the study's own repairs, which may have been trained on more threads."""
        lr = config.rates.get(repair, KIND_RATES[kind])  # a size for which none was chosen takes its kind's
        return repaired_subject(level, base, lambda: batches()[:steps], f"{repair}, {steps} steps", kind, size, lr=lr)
    return [dense, base, *(repaired(repair, *how) for repair, how in point["repairs"].items())]


def dose(run, name, point, dense, batches):
    """The points of one level of damage, one a repair: displaced and re-learned, [mean, low, high] or None.

    batches  of a draw, what `repair_batches` gives
    """
    asked, repairs, draws = run.world.asked(run.config), point["repairs"], []
    for k in range(run.config.seeds):
        drawn = run.draw(k)
        subjects = dosed(drawn, point, dense_of_draw(drawn, dense), lambda: batches(k)())
        draws.append([{"id": s.about["id"], "base": s.about["base"], "metrics": {}, "intervals": {},
                       "answers": answers(s, asked, run.world.encoding)} for s in subjects])
    rows, tag = draws[0], point["base"]
    add_shares(draws, asked, run.config.seed)
    lost = rows[0]["metrics"]["recall_heldout"] - rows[1]["metrics"]["recall_heldout"]

    def bounded(row, key):
        """[mean, low, high], or None where too little was lost to divide by."""
        value = row["metrics"][key]
        return None if value is None else [value, *row["intervals"][key]]
    points = []
    for (repair, (kind, _)), subject, row in zip(repairs.items(), subjects[2:], rows[2:]):
        extra = subject.about["extra"]
        series, x = {"damage": (tag.split()[0], tag), "size": (OPERATION[kind], extra),
                     "steps": (repair, point["steps"])}[name]
        points.append({"series": series, "x": x, "base": tag, "repair": repair, "parameters": extra, "lost": lost,
                       **{key: bounded(row, key) for key in ("displaced", "relearned")}})
    return points


def run_sweep(run, name, dense, times=STEPS):
    """The points of one sweep, in order; None in every process of torchrun but the first. `times`: see runs_of."""
    config, rank, many = run.config, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    threads, made = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    points = runs_of(name, config, times)
    longest = max(point.get("steps", 0) for point in points)  # shorter runs read the first of its batches

    @functools.lru_cache(1)  # the targets of 1,600 steps take 1.3 GB: of one draw at a time
    def batches(k):
        """Of draw k, what `repair_batches` gives."""
        drawn = run.draw(k)
        return repair_batches(Run(replace(drawn.config, repair_steps=longest), run.world, run.log),
                              dense_of_draw(drawn, dense))
    own = range(rank, len(points), many)
    others = [i for i in range(len(points)) if i not in own] if rank == 0 else []  # read, waited for, or made here
    for i in [*own, *others]:
        point = points[i]
        settings = {**dense.about["settings"], "run": point, "calibration": config.calibration,
                    "repair_batch": config.repair_batch, "steps": config.repair_steps,
                    "test_people": config.test_people, "seeds": config.seeds}
        made[i] = run.once_json(f"sweep-{name}-{i:02d}", settings, ("study.sweeps", *ANSWERS),
                                lambda: dose(run, name, point, dense, batches) if name in REPAIRED
                                else [measure(run, point, dense)])
    torch.set_num_threads(threads)
    return None if rank else [one for i in sorted(made) for one in made[i]]


def sweep_rates(run, dense):
    """Try the learning rates of the grid for each repair but the pool, whose prompts learn as a single one does.

    Judged on the validation people: recall, with the log-probability of the right answer beside it. Prints a row a run.
    """
    config, batches, facts = run.config, repair_batches(run, dense), run.world.facts("validation")
    for base_tag in config.compressions:
        base = compressed_subject(run, dense, base_tag)
        for tag in config.rates:
            kind, size = {**REPAIRS, **MORE}[tag]
            for lr in config.rate_grid[kind]:
                def tried():
                    """[recall, log-probability] of the validation people's facts."""
                    tensors = train_repair(base.model, kind, size, batches(), recover.distillation,
                                           recover.FitConfig(steps=config.repair_steps, lr=lr), config.seed,
                                           bfloat16=config.repair_bfloat16)
                    given = answer(attach(base.model, kind, size, tensors), facts, run.world.encoding)
                    return [sum(a[key] for a in given) / len(given) for key in ("correct", "logprob")]
                settings = {**base.about["settings"], "repair": kind, "size": size, "lr": lr, "facts": digest(facts),
                            "steps": config.repair_steps, "repair_batch": config.repair_batch,
                            "bfloat16": config.repair_bfloat16}
                recall, logprob = run.once_json(f"rate-{base.about['id']}-{slug(tag)}-{lr:g}", settings,
                                                ("study.sweeps", *ANSWERS), tried)
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
    def said(p, key="displaced"):
        """A share in a cell."""
        return share(p[key]) if p[key] else "too little was lost"
    if name == "size":
        return markdown(["model", "repair", "parameters", "displaced %", "re-learned %"],
                        [[p["base"], p["repair"], f"{p['parameters']:,}", said(p), said(p, "relearned")]
                         for p in points], 2)
    if name in REPAIRED:  # a column a repair, or a number of steps
        heads, row_of, column = {
            "damage": (["level", "lost %"], lambda p: (p["x"], f"{100 * p['lost']:.1f}"), "{repair}: displaced %"),
            "steps": (["model", "repair"], lambda p: (p["base"], p["repair"]), "{x} steps: displaced %")}[name]
        rows = {}
        for p in points:
            rows.setdefault(row_of(p), {})[column.format(**p)] = said(p)
        return markdown([*heads, *rows[row_of(points[0])]], [[*row, *cells.values()] for row, cells in rows.items()],
                        len(heads) if name == "steps" else 1)
    splits = [key for key in points[0] if key.startswith("recall_")]
    heads = [key.removeprefix("recall_").replace("heldout", "held-out") + " %" for key in splits]
    return markdown(["model", name, "perplexity", *heads],
                    [[p["series"], f"{p['x']:g}", f"{p['perplexity']:.2f}", *(share(p[split]) for split in splits)]
                     for p in points])


def main(arguments):
    """python -m study sweep: see the top of this file."""
    parser = job_parser("study sweep", "Vary one setting, everything else held; or try learning rates.")
    parser.add_argument("what", choices=["lr", *SWEEPS], help="lr: on validation people, printed; others also go into "
                                                              "results.json")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="dense GPTs; for damage, size and steps")
    parser.add_argument("--times", type=float, nargs="+", default=STEPS, metavar="X",
                        help="multiples of the study's steps; for steps")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or not all(0 < times < math.inf for times in args.times):
        raise ValueError(f"--seeds must be at least 1 and --times above 0, got {args.seeds} and {args.times}")
    config = config_of(args, seeds=args.seeds if args.what in REPAIRED else 1)
    if int(min(args.times) * config.repair_steps) < 1:
        raise ValueError(f"--times {min(args.times):g} of {config.repair_steps} steps is less than one step")
    run = Run(config, World(config))
    dense = dense_subject(run)
    if args.what == "lr":
        return sweep_rates(run, dense)
    points = run_sweep(run, args.what, dense, args.times)
    if points:
        print(sweep_table(args.what, points))
        keep(run, args.what, points, dense)
