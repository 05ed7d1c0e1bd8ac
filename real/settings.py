"""
Every setting of the study on a real model, with its default: the compressors, the repairs, their rates, the text.
"""
import os

from real.lock import REPAIRS as LOCK_REPAIRS
from real.lock import TAG
from study.settings import StudyConfig

FACTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "facts", "countries.jsonl")
STEPS = 200  # of each repair
LONGEST = 64  # tokens of the longest prompt: so many are kept free in front of every question
COMPRESSIONS = {
    "RTN 3 bits": ("quantize", "rtn", {"bits": 3, "group_size": 64}),
    "GPTQ 3 bits": ("quantize", "gptq", {"bits": 3, "group_size": 64}),
    "SparseGPT 50 %": ("prune", "sparsegpt", {"sparsity": 0.5}),
}
REPAIRS = {  # the numbers of parameters are SmolLM2-135M's
    "bias correction": ("correction", "o down"),  # nothing is trained
    "biases": ("bias", "o down"),            # 34,560
    "gains": ("gains", None),                # 35,136
    "prompt 16": ("prompt", 16),
    "prompt 64": ("prompt", 64),             # 36,864, as the pool
    "IDP 4 x 16": ("idp", (4, 16, "together")),
    "LoRA rank 1 on o": ("lora", (1, "o")),  # 34,560
    "LoRA rank 8": ("lora", 8),
}
CLAIMED = ("prompt 64", "prompt 64", "IDP 4 x 16", "biases")  # what the four claims are about (study/claims.py)
RATE_GRID = {"lora": (3e-4, 1e-3, 3e-3, 1e-2), "prompt": (3e-3, 1e-2, 3e-2, 1e-1), "bias": (1e-3, 3e-3, 1e-2, 3e-2),
             "gains": (1e-3, 3e-3, 1e-2, 3e-2)}  # four tries for each
RATED = ("biases", "gains", "prompt 16", "prompt 64", "LoRA rank 1 on o", "LoRA rank 8")
RATES = {  # found by --rates, 160 steps of 16 rows, on validation countries; the lock has what was first found for RTN
    "RTN 3 bits": dict(zip(RATED, (1e-2, 3e-3, 3e-2, 3e-2, 1e-2, 1e-3))),
    "GPTQ 3 bits": dict(zip(RATED, (3e-2, 3e-3, 1e-1, 1e-1, 1e-2, 3e-3))),
    "SparseGPT 50 %": dict(zip(RATED, (1e-2, 3e-3, 1e-2, 1e-2, 1e-2, 3e-3))),
    TAG: {"biases": 3e-2, "prompt 16": 3e-2, "LoRA rank 8": 1e-3},
}


def real_config(path, seed=0, out="out", steps=STEPS, seeds=1, rows=16, facts=FACTS):
    """The study's settings for the model at `path`; everything is written to a folder in `out` that is this model's,
    and these facts' where they are others than FACTS.

    rows  of 24 tokens in a step of a repair
    """
    least = max([2, *(size[0] for kind, size in REPAIRS.values() if kind == "idp")])  # a pool's prompts need a row each
    for option, value, lowest in (("--repair-steps", steps, 4), ("--seeds", seeds, 1), ("--rows", rows, least)):
        if value < lowest:
            raise ValueError(f"{option} must be at least {lowest}, got {value}")
    name = os.path.basename(os.path.abspath(path)).removesuffix(".gguf")
    if os.path.abspath(facts) != FACTS:
        name += "-" + os.path.splitext(os.path.basename(facts))[0]
    return StudyConfig(seed=seed, seeds=seeds, out=os.path.join(out, name), calibration=(64, 64),
                       repair_batch=(rows, 24), repair_steps=steps, test_people=10 ** 6, selector_people=25,
                       compressions=COMPRESSIONS, repairs=REPAIRS, rates=RATES, rate_grid=RATE_GRID,
                       claimed=CLAIMED)


def part_of(config, only, locked):
    """(compressions, repairs, whether there is a lock) of --only: damaged models, a colon, repairs; what is not said is
    all there is. ValueError for a name that there is not."""
    damaged, _, repairs = (only or "").partition(":")
    damaged, repairs = ([name.strip() for name in names.split(",") if name.strip()] for names in (damaged, repairs))
    for names, known in ((damaged, [*config.compressions, TAG]), (repairs, config.repairs)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"--only: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    locked = locked or TAG in damaged
    if locked and repairs and not set(repairs) & set(LOCK_REPAIRS):
        raise ValueError(f"--only: the lock is repaired by {', '.join(LOCK_REPAIRS)}, none of which is named")
    return ({tag: how for tag, how in config.compressions.items() if tag in damaged or not damaged},
            {tag: how for tag, how in config.repairs.items() if tag in repairs or not repairs}, locked)
