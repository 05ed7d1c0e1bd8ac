"""
A study of a real model in pieces that run side by side: each is a process that makes and keeps some steps of the study.

A repair's training on a GPU waits for Python, which starts thousands of small kernels a step; ten processes on one GPU
take turns there. `python -m real ... --jobs 10` makes the text, then every compressed model, then their repairs, a
process for each few, and puts the result together from the steps that they kept. A piece alone:
`--only "GPTQ 3 bits: biases, LoRA rank 8"`.

What it leaves out: several GPUs, several machines.
"""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from evaluate import ask, control_rows, every_draw, own_rows
from real import lock
from real.rates import find_rates
from study.subjects import compressed_subject, repair_batches


def phases(config, locked):
    """[[(what is damaged, its repairs)]]: what can run side by side, phase by phase. A pool goes with the prompt of its
    length, whose rate it takes, and what trains nothing with whatever comes first."""
    bundles, free = [], [tag for tag, (kind, _) in config.repairs.items() if kind == "correction"]
    for tag, (kind, size) in config.repairs.items():
        if kind not in ("correction", "idp"):
            pools = [t for t, (k, s) in config.repairs.items() if k == "idp" and tag == f"prompt {s[1]}"]
            bundles.append([tag, *pools])
    if bundles:
        bundles[0] += free
    damaged = [*config.compressions, *([lock.TAG] if locked else [])]
    repairs = [(tag, [r for r in bundle if tag != lock.TAG or r in lock.REPAIRS])
               for bundle in sorted(bundles, key=len, reverse=True) for tag in damaged]
    return [[(tag, []) for tag in damaged], [piece for piece in repairs if piece[1]]]


def narrowed(run, tag, repairs):
    """The same run with one damaged model and some of its repairs."""
    config = run.config
    unknown = [name for name in (tag, *repairs) if name not in (*config.compressions, *config.repairs, lock.TAG)]
    if unknown:
        raise ValueError(f"--only: there is no {', '.join(unknown)}; there are {', '.join(config.compressions)}, "
                         f"{lock.TAG} and the repairs {', '.join(config.repairs)}")
    return run.only([tag] if tag != lock.TAG else [], repairs)


def make_piece(run, dense, tag, repairs, rates=False):
    """Make and ask one damaged model and these repairs of it, in every draw; with `rates`, find their rates first."""
    run = narrowed(run, tag, repairs)
    if rates:
        set_rates(run, dense, tag == lock.TAG)
    rows_of = partial(control_rows, name=tag, make=lock.lock_subjects) if tag == lock.TAG else own_rows
    every_draw(run, dense, rows_of)


def set_rates(run, dense, locked):
    """Find the rates of all repairs and put them into the run's settings: {damaged model: {repair: rate}}."""
    rates, first = {}, run.draw(0)
    if not run.config.repairs:
        return
    for tag in run.config.compressions:
        rates[tag] = find_rates(first, compressed_subject(first, dense, tag), repair_batches(first, dense),
                                run.world.facts("validation"))
    if locked:
        control, teacher, facts = lock.lock(first, dense)
        short = narrowed(first, lock.TAG, [tag for tag in first.config.repairs if tag in lock.REPAIRS])
        rates[lock.TAG] = find_rates(short, control.damaged, lock.target_batches(first, teacher, dense.device), facts)
    run.config.rates = rates


def make_pieces(run, dense, jobs, locked, arguments):
    """Make every piece in a process of its own, `jobs` at a time, by the command line's `arguments` and --only.

    ValueError with the last line of a process that fails.
    """
    for k in range(run.config.seeds):  # what all pieces read is made here
        run.world.calibration(run.draw(k).config)
        run.world.repair_rows(run.draw(k).config)
    ask(run, dense, run.world.asked(run.config))
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}

    def process(piece):
        """One piece, to its end."""
        tag, repairs = piece
        what = tag + (": " + ", ".join(repairs) if repairs else "")
        began = time.time()
        done = subprocess.run([sys.executable, "-m", "real", *arguments, "--only", what], env=environment, text=True,
                              capture_output=True)
        if done.returncode:
            raise ValueError(f"{what}: {(done.stderr.strip().splitlines() or ['ended without a word'])[-1]}")
        run.log.say(f"{what}: {time.time() - began:.0f} s")
    for phase in phases(run.config, locked):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(process, phase))
