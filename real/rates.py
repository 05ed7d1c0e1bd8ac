"""
Learning rates of a real model's repairs, by successive halving on validation entities; and bfloat16 where it is faster.

Every rate of the grid trains for a quarter of the steps, the better half of them for all, until one is left: a rate
that is best for a short run can be too high for a long one. What is compared is knowledge, log p(right option) -
logsumexp(options), the mean over the validation facts: it is 3 to 10 times as sensitive as accuracy. A pool's prompts
take the rate of one prompt.

Source: Jamieson & Talwalkar 2016 (arXiv 1502.07943). What it leaves out: rates at other batch sizes, other optimisers.
"""
import time

import torch

import recover
from real import lock
from recover import FitConfig
from study.repairs import attach, light, products, train_repair
from study.steps import slug
from study.subjects import compressed_subject, repair_batches, target_batches
from world.score import answer


def set_rates(run, dense, locked):
    """Find the rates of all repairs and put them into the run's settings: {damaged model: {repair: rate}}."""
    rates, batches, facts = {}, repair_batches(run, dense), run.world.facts("validation")
    for tag in run.config.compressions:
        rates[tag] = find_rates(run, compressed_subject(run, dense, tag), batches, facts)
    if locked:
        control, facts = lock.lock(run, dense)
        short = run.only([], [tag for tag in run.config.repairs if tag in lock.REPAIRS])
        batches = target_batches(run, control.reference.logits, dense.device)
        rates[lock.TAG] = find_rates(short, control.damaged, batches, facts)
    run.config.rates = rates


def find_rates(run, base, batches, facts):
    """{repair: rate} of one damaged model `base`, each found once and kept.

    batches  () -> the batches of a repair;  facts  the validation facts
    """
    config, rates = run.config, {}
    pools = {f"prompt {size[1]}": ("prompt", size[1]) for kind, size in config.repairs.values() if kind == "idp"}
    for tag, (kind, size) in {**pools, **config.repairs}.items():
        if kind in config.rate_grid:
            grid = config.rate_grid[kind]
            settings = {**base.about["settings"], "repair": kind, "size": size, "steps": config.repair_steps,
                        "grid": grid, "repair_batch": config.repair_batch, "bfloat16": config.repair_bfloat16}

            def score(lr, steps):
                """Mean knowledge of the validation facts after `steps` steps."""
                tensors = train_repair(base.model, kind, size, batches(), recover.distillation,
                                       FitConfig(steps=steps, lr=lr), config.draw_seed, bfloat16=config.repair_bfloat16)
                given = answer(light(attach(base.model, kind, size, tensors)), facts, run.world.encoding)
                return sum(a["knowledge"] for a in given) / len(given)
            found = run.once_json(f"rates-{base.about['id']}-{slug(tag)}", settings,
                                  ("real.rates", "compress", "study.training"),
                                  lambda: halving(score, grid, config.repair_steps))
            rates[tag] = best = found["best"]
            if best in (min(grid), max(grid)):
                run.log.say(f"{base.about['tag']}, {tag}: the best rate, {best:g}, is at the edge of those tried")
    return rates


def halving(score, grid, steps):
    """{"best": rate, "rounds": [{"steps", "knowledge": {rate: score}}]} by score(rate, steps), higher is better."""
    left, rounds, length = list(grid), [], max(1, steps // 4)
    while len(left) > 1:
        scores = {lr: score(lr, length) for lr in left}
        rounds.append({"steps": length, "knowledge": {f"{lr:g}": s for lr, s in scores.items()}})
        left = sorted(left, key=scores.get, reverse=True)[:(len(left) + 1) // 2]
        length = steps
    return {"best": left[0], "rounds": rounds}


def faster_in_bfloat16(run, dense):
    """Whether a repair's products are faster in bfloat16 than as they come: one product of each shape is timed, once.

    On CPUs without bfloat16 instructions (AVX2) the same training is 6 to 9 times slower in it.
    """
    rows, T = run.config.repair_batch
    settings = {**dense.about["settings"], "tokens": rows * T}
    timed = run.once_json("products", settings, ("real.rates",), lambda: time_products(dense.model, rows * T))
    run.log.say(f"{rows * T} tokens through one layer and the head: {timed['plain']:.3g} ms as they come, "
                f"{timed['bfloat16']:.3g} ms in bfloat16")
    return timed["bfloat16"] < timed["plain"]


@torch.no_grad()
def time_products(model, tokens):
    """{"plain", "bfloat16"}: milliseconds of one product of each linear layer of a block and of the head."""
    device, took = model.wte.weight.device, {"plain": 0.0, "bfloat16": 0.0}
    layers = [m for m in model.blocks[0].modules() if isinstance(m, torch.nn.Linear)] + [model.lm_head]
    for layer in layers:
        x = torch.ones(tokens, layer.in_features, device=device, dtype=layer.weight.dtype)
        best = dict.fromkeys(took, float("inf"))
        for _ in range(4):  # in turns; the first also warms up
            for name in best:
                with products(device, name == "bfloat16"):
                    began = time.perf_counter()
                    float(layer(x)[-1, -1])  # reading one number waits for the device
                best[name] = min(best[name], time.perf_counter() - began)
        took = {name: took[name] + 1000 * best[name] for name in took}
    return took
