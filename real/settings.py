"""
Every setting of the study on a real model, with its default: the compressors, the repairs, their rates, the text.
"""
import os

from study.settings import StudyConfig

FACTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "facts", "countries.jsonl")
STEPS = 200  # of each repair
LONGEST = 16  # tokens of the longest prompt: so many are kept free in front of every question
COMPRESSIONS = {
    "RTN 3 bits": ("quantize", "rtn", {"bits": 3, "group_size": 64}),
    "GPTQ 3 bits": ("quantize", "gptq", {"bits": 3, "group_size": 64}),
    "SparseGPT 50 %": ("prune", "sparsegpt", {"sparsity": 0.5}),
}
REPAIRS = {  # bias correction trains nothing; biases of 30 layers of o and down have 34,560 parameters, a pool of 4 x 16 has 36,864
    "bias correction": ("correction", "o down"),
    "biases": ("bias", "o down"),
    "prompt 16": ("prompt", 16),
    "IDP 4 x 16": ("idp", (4, 16, "together")),
    "LoRA rank 1 on o": ("lora", (1, "o")),
    "LoRA rank 8": ("lora", 8),
}
RATE_GRID = {"lora": (3e-4, 1e-3, 3e-3), "prompt": (3e-3, 1e-2, 3e-2), "bias": (1e-3, 3e-3, 1e-2)}
RATES = {"biases": 3e-3, "prompt 16": 1e-2, "LoRA rank 1 on o": 3e-3, "LoRA rank 8": 1e-3}


def real_config(path, seed=0, out="out", steps=STEPS, seeds=1, rows=16):
    """The study's settings for the model at `path`; everything is written to a folder of its own in `out`.

    rows  of 24 tokens in a step of a repair
    """
    if steps < 4:
        raise ValueError(f"--repair-steps must be at least 4, got {steps}")
    name = os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
    return StudyConfig(calibration=(64, 64), repair_batch=(rows, 24), repair_steps=steps, test_people=10 ** 6, seed=seed,
                       seeds=seeds, ablation_people=25, out=os.path.join(out, name), compressions=COMPRESSIONS,
                       repairs=REPAIRS, rates=RATES, rate_grid=RATE_GRID)
