"""
Every setting of the study, with its default: the sizes, the compressors, the repairs and their learning rates.
"""
import argparse
import os
from dataclasses import dataclass, field

from engine.device import add_device, device_of
from recover import FitConfig
from world.facts import WorldConfig


@dataclass
class StudyConfig:
    world: WorldConfig = field(default_factory=WorldConfig)
    gpt: dict = field(default_factory=dict)  # what differs from GPTConfig's own defaults
    pretrain: FitConfig = field(default_factory=lambda: FitConfig(steps=1200, lr=4e-3, muon=0.02, weight_decay=0.1))
    pretrain_batch: tuple = (32, 64)         # rows, tokens a row
    without: str = ""                        # an ingredient of RECIPE that pretraining goes without
    calibration: tuple = (128, 64)
    repair_batch: tuple = (32, 32)
    repair_steps: int = 200
    repair_bfloat16: bool = False            # matrix products of a repair's training in bfloat16
    test_people: int = 500                   # of each split, at most, that the table asks about
    selector_people: int = 150               # held-out people that every way to choose from a pool is tried on
    size: str = "default"                    # the preset these settings are
    seed: int = 0
    seeds: int = 1                           # everything but the world is made so many times
    repeat: int = 0                          # which of those times this is
    full: bool = False
    skills: bool = False                     # whether pretraining also reads the lessons of world/items.py
    task_items: int = 200                    # of each task and split
    task_repairs: tuple = ("LoRA rank 8", "IDP 4 x 8")  # whom tasks are asked of beside the unrepaired models
    all_tasks: bool = False                  # asked of every model
    out: str = "out"
    device: str = "cpu"                      # where models compute
    dtype: str = "float32"                   # of their weights; the dense GPT is trained in float32
    compressions: dict = field(default_factory=lambda: COMPRESSIONS)
    repairs: dict = field(default_factory=lambda: REPAIRS)
    rates: dict = field(default_factory=lambda: RATES)
    claimed: tuple = ("prompt 8", "prompt 32", "IDP 4 x 8", "biases")  # repairs the claims are about (study/claims.py)
    rate_grid: dict = field(default_factory=lambda: RATE_GRID)

    @property
    def draw_seed(self):
        """The seed of what `--seeds` draws anew: the dense GPT, calibration and repair text, the start of every repair.
        """
        return self.seed + 1000 * self.repeat

    @property
    def draw_suffix(self):
        """What the names of this draw's files end in: nothing in the first one."""
        return f"-seed-{self.repeat}" if self.repeat else ""


SIZES = ("default", "quick", "medium")


def config_of(args, **more):
    """`sized` with what the options of the command line say. Raises ValueError where there is no such device."""
    device_of(args)
    return sized(args.size, args.seed, args.out, device=args.device, dtype=args.dtype, **more)


def sized(size, seed=0, out="out", **more):
    """The study's settings. "quick": fewer people and steps, the same path in a minute, in OUT/quick. "medium": a wider
    GPT that pretraining also teaches to read a text, compare, summarize and follow instructions, in OUT/medium.
    """
    config = StudyConfig(world=WorldConfig(seed=seed), size=size, seed=seed, out=out, **more)
    if size == "quick":
        config.world = WorldConfig(seen=40, heldout=40, validation=12, novel=20, seed=seed)
        config.gpt = {"n_layer": 2, "n_embd": 64}
        config.pretrain.steps, config.pretrain_batch = 400, (16, 64)
        config.repair_steps, config.task_items, config.selector_people = 50, 40, 12
        config.compressions = {  # a GPT that knows 92 people by heart loses little at 3 bits
            "RTN 2 bits": ("quantize", "rtn", {"bits": 2, "group_size": 64}),
            "GPTQ 2 bits": ("quantize", "gptq", {"bits": 2, "group_size": 64}),
            "magnitude 60 %": ("prune", "magnitude", {"sparsity": 0.6})}
        config.repairs = {tag: REPAIRS[tag] for tag in ("biases", "prompt 8", "prompt 32", "IDP 4 x 8", "LoRA rank 8")}
        config.out = os.path.join(out, "quick")
    if size == "medium":
        config.world.vocab_size, config.skills = 1280, True
        config.gpt = {"n_embd": 128, "context": 128}
        config.pretrain.steps, config.pretrain_batch = 6400, (16, 128)
        config.calibration, config.repair_batch, config.out = (128, 128), (16, 96), os.path.join(out, "medium")
    if config.full:
        config.repairs = {**config.repairs, **MORE}
    return config


COMPRESSIONS = {  # tag: (operation, method, settings)
    "RTN 3 bits": ("quantize", "rtn", {"bits": 3, "group_size": 96}),
    "GPTQ 3 bits": ("quantize", "gptq", {"bits": 3, "group_size": 96}),  # the published sweep
    "magnitude 50 %": ("prune", "magnitude", {"sparsity": 0.5}),
    "SparseGPT 50 %": ("prune", "sparsegpt", {"sparsity": 0.5}),
}
REPAIRS = {  # tag: (kind, size: a rank (and layers), layers, a length, or prompts x length and how they are trained)
    "bias correction": ("correction", "o down"),     # closed form, nothing is trained
    "biases": ("bias", "o down"),                    # as many parameters as a prompt of 8, free at inference
    "prompt 8": ("prompt", 8),
    "prompt 32": ("prompt", 32),                     # as many as the pool
    "IDP 4 x 8": ("idp", (4, 8, "together")),
    "LoRA rank 8": ("lora", 8),
}
MORE = {  # with --full: another objective than distillation comes last
    "LoRA rank 1 on o": ("lora", (1, "o")),          # as many parameters as a prompt of 8
    "prefix 8": ("prefix", 8),
    "IDP 4 x 8 joint": ("idp", (4, 8, "joint")),     # the other ways to train a pool
    "IDP 4 x 8 competitive": ("idp", (4, 8, "competitive")),
    "IDP 4 x 8 selected": ("idp", (4, 8, "selected")),  # chosen by a probe that was trained with the prompts
    "prompt 8, next token": ("prompt", 8, "next_token"),
    "LoRA rank 8, next token": ("lora", 8, "next_token"),
}
RATES = {  # peak learning rates, the same for every compressed model; a pool's prompts learn as one does
    "biases": 3e-2, "LoRA rank 1 on o": 1e-2, "prompt 8": 1e-1, "prompt 32": 1e-1, "prefix 8": 1e-1,
    "LoRA rank 8": 3e-3,
}
KIND_RATES = {"lora": 3e-3, "bias": 3e-2, "prompt": 1e-1, "prefix": 1e-1, "idp": 1e-1}
RATE_GRID = {"lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "prompt": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
             "prefix": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "bias": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}  # five tries for each

OPERATIONS = {
    "quantize": "weights rounded to a few bits", "prune": "weights set to zero",
    "control": "damage whose answer is known by construction",
    "LoRA": "a low-rank update beside each layer",
    "prompt": "trained vectors in front of the text", "prefix": "trained keys and values in front, in every layer",
    "biases": "a trained constant after o and down", "gains": "the norms' weights, trained",
    "bias correction": "the same in closed form, nothing is trained",
    "IDP": "a pool of prompts, the input picks the one it attends to most",
}
OPERATION = {"lora": "LoRA", "prompt": "prompt", "prefix": "prefix", "idp": "IDP", "bias": "biases",
             "correction": "bias correction", "gains": "gains"}


def rate(config, base, tag, kind, size):
    """The learning rate of a repair `tag` of the compressed model `base`: config.rates by repair, or by both."""
    tag = f"prompt {size[1]}" if kind == "idp" else tag.removesuffix(", next token")
    rates = config.rates.get(base, config.rates)
    if tag not in rates:
        raise ValueError(f"no learning rate is known for {tag} on {base}; there are {', '.join(rates)}")
    return rates[tag]


def job_parser(name, description, sizes=True):
    """The options that every script of the study has."""
    defaults = StudyConfig()
    parser = argparse.ArgumentParser(prog=name, description=description,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if sizes:
        parser.add_argument("--size", choices=SIZES, default="default", help="of the world and the training")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of every random choice")
    parser.add_argument("--out", default=defaults.out, help="folder for everything that is written")
    add_device(parser, dtypes=("float32", "bfloat16"))  # training in float16 needs its losses scaled
    return parser
