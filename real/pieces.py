"""
A study of a real model in pieces that run side by side: each is a process that makes and keeps some steps of the study.

A repair's training on a GPU waits for Python, which starts thousands of small kernels a step; ten processes on one GPU
take turns there. `python -m real ... --jobs 10` makes the text, then every compressed model and, as soon as one is
there, its repairs, a process for each few, and puts the result together from the steps that they kept. A piece alone:
`--only "GPTQ 3 bits: biases, LoRA rank 8"`.

What it leaves out: several GPUs, several machines.
"""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

from evaluate import ask, control_rows, every_draw, own_rows
from real import lock
from real.rates import find_rates
from study.subjects import compressed_subject, repair_batches


def bundles(config, tag):
    """[[repairs]] of one damaged model, each for a process. A pool goes with the prompt of its length, whose rate it
    takes, and what trains nothing with whatever comes first; the longest come first."""
    made, free = [], [name for name, (kind, _) in config.repairs.items() if kind == "correction"]
    for name, (kind, size) in config.repairs.items():
        if kind not in ("correction", "idp") and (tag != lock.TAG or name in lock.REPAIRS):
            pools = [t for t, (k, s) in config.repairs.items() if k == "idp" and name == f"prompt {s[1]}"]
            made.append([name, *(pools if tag != lock.TAG else [])])
    if made and tag != lock.TAG:
        made[0] += free
    return sorted(made, key=len, reverse=True)


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

    def process(tag, repairs=()):
        """One piece, to its end."""
        what = tag + (": " + ", ".join(repairs) if repairs else "")
        began = time.time()
        done = subprocess.run([sys.executable, "-m", "real", *arguments, "--only", what], env=environment, text=True,
                              capture_output=True)
        if done.returncode:
            raise ValueError(f"{what}: {(done.stderr.strip().splitlines() or ['ended without a word'])[-1]}")
        run.log.say(f"{what}: {time.time() - began:.0f} s")
    with ThreadPoolExecutor(jobs) as pool:
        tags = [*([lock.TAG] if locked else []), *run.config.compressions]
        damaged = {pool.submit(process, tag): tag for tag in tags}
        repairs = [pool.submit(process, tag, bundle) for done in as_completed(damaged) for tag in [damaged[done]]
                   if not done.exception() for bundle in bundles(run.config, tag)]
    for made in (*damaged, *repairs):
        made.result()  # raises what a piece raised
