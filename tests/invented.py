"""An INVENTED study, by a seeded generator, in the shape of a real one: for the tests of the page and the picture.

No number of it is a result. `invented_study` is a study as files of Compress and Compare and old runs hold it, with
intervals, layers and pools; `with_everything` adds what the study has added since: controls, comparisons, claims,
knowledge apart from format, sweeps.
"""
import json
import math
import random

CITIES = ["Vienna", "Lisbon", "Oslo", "Quito", "Accra", "Hanoi", "Perth", "Turin"]
ATTRIBUTES = ["birthplace", "employer", "instrument", "pet", "university"]
SPLITS = ["seen", "heldout", "novel"]
COMPRESSED = [                              # id, tag, operation, parameters, bits a weight, share of facts it breaks
    ("gptq-4", "GPTQ 4-bit", "quantize", {"method": "gptq", "bits": 4}, 4.2, 0.10),
    ("gptq-3", "GPTQ 3-bit", "quantize", {"method": "gptq", "bits": 3}, 3.2, 0.30),
    ("rtn-3", "RTN 3-bit", "quantize", {"method": "rtn", "bits": 3}, 3.2, 0.55),
    ("sparsegpt-50", "SparseGPT 50 %", "prune", {"method": "sparsegpt", "sparsity": 0.5}, 16.0, 0.25),
    ("sparsegpt-2-4", "SparseGPT 2:4", "prune", {"method": "sparsegpt", "n_m": [2, 4]}, 9.0, 0.38)]
REPAIRS = [                                 # id, tag, operation, parameters, extra parameters, share it brings back
    ("lora", "LoRA r8", "LoRA", {"rank": 8}, 24_576, 0.60),
    ("prompt", "prompt 20", "prompt", {"length": 20}, 2_560, 0.25),
    ("prefix", "prefix 20", "prefix", {"length": 20}, 20_480, 0.45),
    ("idp", "IDP 4 × 20", "IDP", {"prompts": 4}, 10_240, 0.70)]
METRICS = [("bytes", "size on disk", "bytes", False), ("bits_per_weight", "bits per weight", "bits", False),
           ("extra_parameters", "extra parameters", "", False), ("perplexity", "perplexity", "", False),
           ("ms_per_question", "time per question", "ms", False), ("recall_seen", "recall, seen facts", "share", True),
           ("recall_heldout", "recall, held-out facts", "share", True),
           ("recall_novel", "recall, novel facts", "share", True),
           ("displaced", "displaced", "share", True), ("relearned", "relearned", "share", True)]


def invented_layers(rng, bits, sparsity):
    rows, shapes = [], {"attn.q": (64, 64), "attn.k": (64, 64), "attn.v": (64, 64), "attn.o": (64, 64),
                        "mlp.up": (256, 64), "mlp.down": (64, 256)}
    for block in range(4):
        for name, shape in shapes.items():
            width, error = rng.uniform(0.02, 0.06), rng.uniform(0.01, 0.12) * (1 + block / 2)
            rows.append({"name": f"blocks.{block}.{name}", "shape": list(shape), "bits": bits, "sparsity": sparsity,
                         "zeros": sparsity or rng.uniform(0, 0.02), "weight_change": rng.uniform(0.05, 0.3),
                         "error_before": error * 1.6, "error_after": error, "relative_output_error": error,
                         "damp": 0.01,
                         "histogram": {"edges": [width * (k - 15) / 5 for k in range(31)],
                                       "counts": [int(900 * math.exp(-((k - 14.5) / 5) ** 2)) for k in range(30)]}})
    return rows


def invented_similarity(rng, loss):
    return {"attention": [[1 - loss * rng.uniform(0, 0.5) * (1 + k / 3) for _ in range(4)] for k in range(4)],
            "output": [1 - loss * rng.uniform(0.1, 0.3) * (1 + k / 3) for k in range(4)]}


def invented_idp(rng):
    chosen = {a: [rng.randrange(1, 60) for _ in range(4)] for a in ATTRIBUTES}
    scores = [rng.betavariate(2, 5) for _ in range(400)]
    return {"chosen": [sum(c) for c in zip(*chosen.values())], "by_attribute": chosen,
            "correlation": {"rho": 0.31, "interval": [0.22, 0.4]},
            "points": [[s, 2 * s - 0.3 + rng.gauss(0, 0.4)] for s in scores],
            "selectors": [{"name": name, "recall": recall, "interval": [recall - 0.03, recall + 0.03],
                           "over_rule": [recall - 0.74, recall - 0.66], "extra_passes": passes}
                          for name, recall, passes in (("the rule", 0.7, 0), ("random", 0.61, 0), ("oracle", 0.8, 4))]}


def invented_answers(rng, facts, model, loss):
    rows = []
    for split, person, attribute, question, gold, hard in facts:
        hit = split != "novel" and hard + rng.gauss(0, 0.12) > 0.06 + loss * (0.9 if split == "seen" else 1.0)
        hit = hit or rng.random() < 0.08
        rows.append({"model": model, "split": split, "person": person, "attribute": attribute, "question": question,
                     "gold": gold, "answer": gold if hit else rng.choice([c for c in CITIES if c != gold]),
                     "correct": hit, "logprob": -rng.expovariate(2.5 if hit else 0.4)})
    return rows


def invented_metrics(rng, rows, size, bits, loss, extra, repaired):
    metrics = {"bytes": size, "bits_per_weight": bits, "extra_parameters": extra, "perplexity": 7.1 * (1 + loss),
               "ms_per_question": rng.uniform(1.2, 2.0) + extra / 40_000}
    intervals = {"perplexity": [metrics["perplexity"] * 0.97, metrics["perplexity"] * 1.03]}
    for split in SPLITS:
        hits = [row["correct"] for row in rows if row["split"] == split]
        mean = sum(hits) / len(hits)
        half = 1.96 * (mean * (1 - mean) / len(hits)) ** 0.5
        metrics[f"recall_{split}"], intervals[f"recall_{split}"] = mean, [mean - half, mean + half]
    if repaired:
        for name, low, high in (("displaced", 0.1, 0.9), ("relearned", -0.1, 0.4)):
            metrics[name] = rng.uniform(low, high)
            intervals[name] = [metrics[name] - 0.14, metrics[name] + 0.12]
    return metrics, intervals


def invented_study(seed=0, people=40, compressed=COMPRESSED, repairs=REPAIRS):
    """(results, predictions) of 1 + len(compressed) * (1 + len(repairs)) models and 15 * people facts."""
    rng = random.Random(seed)
    facts = []
    for split in SPLITS:
        for k in range(people):
            person = f"{rng.choice(['Ada', 'Boris', 'Chiara', 'Dele', 'Emre'])} {split.title()}son {k}"
            for attribute in ATTRIBUTES:
                question = f"What is the {attribute} of {person}?"
                facts.append((split, person, attribute, question, rng.choice(CITIES), rng.random()))
    models, predictions = [], []

    def add(id, tag, base, operation, size, bits, loss, extra=0, repaired=False, **more):
        rows = invented_answers(rng, facts, id, loss)
        metrics, intervals = invented_metrics(rng, rows, size, bits, loss, extra, repaired)
        predictions.extend(rows)
        models.append({"id": id, "tag": tag, "base": base, "operation": operation, "metrics": metrics,
                       "intervals": intervals, "verdict": "mostly displaced" if repaired else None} | more)

    add("dense", "dense", None, None, 3_276_800, 32.0, 0.0)
    for cid, ctag, kind, parameters, bits, loss in compressed:
        size = int(262_144 + 3_014_656 * bits / 32)
        sparsity = 0.5 if kind == "prune" else None
        add(cid, ctag, "dense", {"name": kind, "parameters": parameters}, size, bits, loss,
            layers=invented_layers(rng, parameters.get("bits"), sparsity), similarity=invented_similarity(rng, loss))
        for rid, rtag, repair, parameters, extra, back in repairs:
            left = loss * (1 - back)
            add(f"{cid}+{rid}", rtag, cid, {"name": repair, "parameters": parameters}, size + 4 * extra,
                bits, left, extra, repaired=True, similarity=invented_similarity(rng, left),
                idp=invented_idp(rng) if repair == "IDP" else None)
    study = {
        "name": "An invented study", "command": "python evaluate.py --seed 0", "created": "2026-01-31T12:00:00+00:00",
        "seconds": 612.4, "settings": {"people": people, "steps": 2000, "lr": 1e-3, "device": "cpu"},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "platform": "Linux"},
        "times": [{"step": "train", "seconds": 301.2, "reused": False},
                  {"step": "repair", "seconds": 61.0, "reused": True}],
        "operations": [{"name": name, "parameters": None, "description": f"{name}, as invented"}
                       for name in ("quantize", "prune", "LoRA", "prompt", "prefix", "IDP")],
        "metrics": [{"name": name, "label": label, "unit": unit, "higher_is_better": up, "description": "invented"}
                    for name, label, unit, up in METRICS],
        "models": models,
        "hypothesis": "Knowledge that a compressed model lost is mostly displaced: a repair brings it back."}
    return study, predictions


# ---- a study with all that the page can show, its displaced shares as planned in advance

PLANNED = {  # base: (tag, kind, operation, recall after, {repair: (displaced, re-learned)}); None: too little was lost
    "rtn-3": ("RTN 3 bits", "compressed", "quantize", 0.66, {"prompt 8": (.35, .03), "biases": (.53, .03),
              "LoRA rank 1": (.46, .08), "LoRA rank 8": (.75, .165), "IDP 4 x 8": (.36, .02)}),
    "gptq-3": ("GPTQ 3 bits", "compressed", "quantize", 0.84, {"prompt 8": (.049, .038), "biases": (.17, .05),
               "LoRA rank 1": (.24, .23), "LoRA rank 8": (.373, .472), "IDP 4 x 8": (.10, .04)}),
    "magnitude-50": ("magnitude 50 %", "compressed", "prune", 0.50, {"prompt 8": (.154, .005), "biases": (.318, .053),
                     "LoRA rank 1": (.285, .077), "LoRA rank 8": (.572, .284), "IDP 4 x 8": (.16, .01)}),
    "sparsegpt-50": ("SparseGPT 50 %", "compressed", "prune", 0.59, {"prompt 8": (.085, -.055), "biases": (.14, .04),
                     "LoRA rank 1": (.2, .1), "LoRA rank 8": (.40, .326), "IDP 4 x 8": (-.04, .02)}),
    "gptq-5": ("GPTQ 5 bits", "compressed", "quantize", 0.985, {"prompt 8": None, "LoRA rank 8": None}),
    "locked": ("locked", "control", "fine-tune", 0.252, {"prompt 8": (1.008, .01), "LoRA rank 1": (1.004, .007),
               "LoRA rank 8": (.936, .185)}),
    "not-yet-told": ("not yet told", "control", "fine-tune", 0.02, {"prompt 8": (-.006, .01),
                     "LoRA rank 8": (-.004, .961)}),
    "rank-one": ("rank one", "control", "add", 0.712, {"prompt 8": (.225, .106), "LoRA rank 1": (.669, .176),
                 "LoRA rank 8": (.838, .141)})}
SIZES = {"prompt 8": ("prompt", 768), "biases": ("biases", 768), "LoRA rank 1": ("LoRA", 6_912),
         "LoRA rank 8": ("LoRA", 55_296), "IDP 4 x 8": ("IDP", 3_072)}
MORE = [(f"knowledge_{split}", f"knowledge, {split}", "nats", True) for split in SPLITS] + [
    ("gain_knowledge", "gain, knowledge", "nats", True), ("gain_format", "gain, format", "nats", True),
    ("displaced_knowledge", "displaced, knowledge", "share", True),
    ("relearned_knowledge", "re-learned, knowledge", "share", False)]


def with_everything(seed=1, people=40):
    """(results, predictions) with controls, tests, claims, knowledge and format, attributes, tasks and sweeps."""
    compressed = [(i, tag, op, {"method": i}, 3.7, 1 - after) for i, (tag, _, op, after, _) in PLANNED.items()]
    study, predictions = invented_study(seed, people, compressed, [])
    rng, models = random.Random(seed), study["models"]
    dense, plain = models[0], {m["id"]: m for m in models}
    for cid, (tag, kind, _, after, repairs) in PLANNED.items():
        base = plain[cid]
        base["kind"] = kind
        base["metrics"]["recall_heldout"], base["intervals"]["recall_heldout"] = after, [after - .02, after + .02]
        for rtag, shares in repairs.items():
            repair, extra = SIZES[rtag]
            rows = invented_answers(rng, [(p["split"], p["person"], p["attribute"], p["question"], p["gold"],
                                           rng.random()) for p in predictions[:15 * people]], f"{cid}+{rtag}", 0.2)
            size = base["metrics"]["bytes"] + 4 * extra
            metrics, intervals = invented_metrics(rng, rows, size, 3.7, .2, extra, False)
            half = 0.012 if kind == "control" else 0.02 / max(0.05, 1 - after) + 0.01
            for name, k in (("displaced", 0), ("relearned", 1)):
                value = shares and shares[k] + rng.gauss(0, half / 4)
                metrics[name] = value or 1.4
                intervals[name] = [value - half, value + half] if shares else [None, None]
                metrics[f"{name}_knowledge"] = value and value * 0.8
                intervals[f"{name}_knowledge"] = [value * .8 - half / 2, value * .8 + half / 2] if shares else None
            predictions += rows
            models.append({"id": f"{cid}+{rtag}", "tag": rtag, "base": cid, "metrics": metrics, "intervals": intervals,
                           "operation": {"name": repair, "parameters": {"size": extra, "lr": 0.1}}, "kind": "repaired",
                           "confirmed": bool(shares) and intervals["displaced"][0] > 0.03,
                           "verdict": "held-out facts come back" if shares else
                           "compression took too little recall to divide by"})
    dense |= {"kind": "dense"}
    for m in models:
        low = m["metrics"]["recall_heldout"]
        m["attributes"] = {a: [low, low - .04, low + .04] for a in ATTRIBUTES}
        m["tasks"] = {task: {split: {"acc": [rng.uniform(.2, .9), .1, .95]} for split in SPLITS}
                      for task in ("four-way", "last word")}
        gains = ("gain_knowledge", "gain_format") if m.get("kind") == "repaired" else ()
        for name in (*(f"knowledge_{split}" for split in SPLITS), *gains):
            m["metrics"][name] = rng.gauss(.1, .1) if name in gains else -rng.expovariate(2)
            m["intervals"][name] = [m["metrics"][name] - .05, m["metrics"][name] + .05]
    study["metrics"] += [{"name": n, "label": label, "unit": u, "higher_is_better": up} for n, label, u, up in MORE]
    study["operations"] += [{"name": n, "description": n} for n in ("fine-tune", "add", "biases")]
    study["comparisons"] = [comparison(rng, m, what) for m in models[1:]
                            for what in ("recall, seen", "recall, held-out")]
    study["noise"] = [{"what": "asked again in reverse", "model": "dense", "base": "dense", "items": 2500, "gained": 1,
                       "lost": 0, "difference": 0.0004, "p": 1.0}]
    names = ("a prompt brings facts back", "a pool beats one prompt", "prompts equal weights", "GPTQ leaves less")
    study["claims"] = [{"name": n, "statement": f"We claim that {n}.", "estimate": e, "interval": [e - .03, e + .03],
                        "p": p, "p_holm": min(1, 4 * p), "verdict": v} for n, e, p, v in
                       zip(names, (.05, .01, -.12, .3), (.001, .4, .9, 1e-9), ("holds", "open", "fails", "holds"))]
    study["same"] = []
    study["pairs"] = [{"base": "GPTQ 3 bits", "a": "prompt 8", "b": "biases", "difference": -.12,
                       "interval": [-.17, -.07], "verdict": "inferior"}]
    study["sweeps"] = sweeps()
    return json.loads(json.dumps(study)), predictions


def sweeps():
    """Three sweeps, as `python -m study sweep` adds them."""
    return {"bits": {"settings": {}, "points": [
        {"series": s, "x": b, "perplexity": 4 + 9 / b,
         **{f"recall_{split}": [1 - k / b ** 2, .96 - k / b ** 2, 1.02 - k / b ** 2] for split in SPLITS}}
        for s, k in (("RTN", 3.0), ("GPTQ", 1.4)) for b in (2, 3, 4, 5, 6, 8)]}, "damage": {"points": [
            {"series": s, "x": f"level {k}", "lost": .01 + .2 * k, "repair": r,
             "displaced": [d, d - .05, d + .05] if k else None, "relearned": [.05, 0, .1] if k else None}
            for s, d in (("RTN", .4), ("GPTQ", .06), ("SparseGPT", .08)) for r in ("prompt 8", "LoRA rank 8")
            for k in range(4)]},  # at level 0 too little was lost to divide by
        "size": {"settings": {}, "points": [
            {"series": s, "x": n, "base": base, "repair": f"{s} of {n}", "parameters": n, "lost": .2,
             "displaced": [d, d - .05, d + .05], "relearned": [.05, 0, .1]}
            for base in ("RTN 3 bits", "GPTQ 3 bits") for s, sizes in (("prompt", (96, 768, 3072)), ("biases", (768,)))
            for n in sizes for d in [.1 + n / 10_000]]}}


def comparison(rng, model, what):
    """A row as study/comparisons.py makes it; confirmed on held-out people where the model says so."""
    sure = model.get("confirmed") if what.endswith("held-out") else rng.random() < .5
    gained, lost = (300, 60) if sure else (40, 36 + rng.randrange(9))
    return {"what": what, "model": model["id"], "base": model["base"], "items": 2500, "gained": gained, "lost": lost,
            "difference": (gained - lost) / 2500, "p": 1e-20 if sure else .4, "p_holm": 1e-18 if sure else 1.0,
            "detectable": 0.02}


def written(folder, study, predictions):
    """The study as files in the folder; returns the path of results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(study), encoding="utf-8")
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions), encoding="utf-8")
    return folder / "results.json"
