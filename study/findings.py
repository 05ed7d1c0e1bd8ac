"""
The checklist: what LLM-KICK (Jaiswal et al. 2024, arXiv 2310.01382) and the paper (arXiv 2310.00867) found, and our
numbers next to each.

Each finding is a rule on results.json, written before the run (`two_regimes` after a first look). It judges by the
intervals and tests that the verdicts are made of, never by the estimates alone: a finding holds where the whole
interval says so, does not hold where the whole interval says the opposite, and is open in between, as it is where it
was not measured (the command that measures it is then named). Perplexities, bytes and parameters have no interval; they
are compared as they are.

Besides "models" with their "intervals" the rules read, where results.json has them,

    model["confirmed"]   whether a repair gained on held-out people
    results["pairs"]     [{"base", "a", "b": tags, "interval": [low, high] of displaced(a) - displaced(b)}]
    results["claims"]    [{"statement", "verdict"}]: the claims stated before the run; all else is exploratory

    python -m study findings                     # of out/results.json
"""
import argparse

from engine.files import read_json
from study.claims import MARGIN
from study.statistics import judged

LOST = 0.05  # of the dense model's recall: more is "hurt"
SCORED = 47  # text tokens that perplexity counts in a window: of 64, the first and 16 more are only read


def checklist(results):
    """[(finding, True, False or None: open, the numbers)] of one results.json."""
    return [(text, *rule(results)) for text, rule in FINDINGS]


def made_by(results, operation, base="dense"):
    """The models that one operation made of one base, the best on held-out people first."""
    made = [m for m in results["models"] if m["base"] == base and (m["operation"] or {}).get("name") == operation]
    return sorted(made, key=lambda m: -m["metrics"]["recall_heldout"])


def missing(what):
    return None, f"not measured: {what}"


def points(results, sweep, series):
    """{x: point} of one series of a sweep; empty when it has not been run."""
    found = results.get("sweeps", {}).get(sweep, {}).get("points", [])
    return {p["x"]: p for p in found if p["series"] == series}


def percent(x):
    return f"{100 * x:.1f} %"


# ---- what intervals say: True, False, or None where they do not decide

def bounds(model, metric="recall_heldout"):
    """[low, high] of a model's metric; [-inf, inf] where it has no interval, so that nothing follows from it."""
    found = (model.get("intervals") or {}).get(metric) or [None, None]
    return [-float("inf"), float("inf")] if None in found else found


def above(interval, threshold):
    """Whether a number with an interval is above the threshold."""
    low, high = interval
    return True if low > threshold else False if high <= threshold else None


def every(answers):
    """Whether all of them are True."""
    answers = list(answers)
    return False if False in answers else None if None in answers else True


def some(answers):
    """Whether one of them is True."""
    answers = list(answers)
    return True if True in answers else None if None in answers else False


def minus(a, b):
    """The interval of a difference from two, at its widest: as if the two had no person in common."""
    return [a[0] - b[1], a[1] - b[0]]


def lost(before, after):
    """The share of a score that was lost, as an interval at its widest; both scores are in [0, 1]."""
    (low, high), (least, most) = after, before
    return [1 - high / least if least > 0 else -float("inf"), 1 - max(0.0, low) / most if most > 0 else float("inf")]


def between(interval):
    return "[{:.1f}, {:.1f}] %".format(*(100 * x for x in interval))


# ---- the rules

def displaced(results):
    """Of every compressed model whose loss is sure, a repair brings something back on people it never read about."""
    said, holds = [], []
    for base in results["models"]:
        repairs = [m for m in results["models"] if m["base"] == base["id"] and bounds(m, "displaced")[1] < float("inf")]
        if base["base"] != "dense" or base.get("kind") == "control" or not repairs:
            continue
        sure = [m for m in repairs if m.get("confirmed") and bounds(m, "displaced")[0] > 0]
        holds.append(True if sure else None)
        best = max(sure, key=lambda m: bounds(m, "displaced")[0], default=None)
        said.append(f"{base['tag']}: at least {percent(bounds(best, 'displaced')[0])} of what was lost ({best['tag']})"
                    if best else f"{base['tag']}: none of {len(repairs)} repairs is confirmed")
    return (every(holds), "; ".join(said)) if said else (None, "compression took too little to divide by")


def perplexity_hides(results):
    """Some compression moves perplexity by less than 10 % and takes more than 10 % of held-out recall."""
    dense, rows = results["models"][0], []
    for m in made_by(results, "quantize") + made_by(results, "prune"):
        up = m["metrics"]["perplexity"] / dense["metrics"]["perplexity"] - 1
        share = lost(bounds(dense), bounds(m))
        rows.append((False if up >= 0.1 else above(share, 0.1), share[0] - max(0.0, up - 0.1),
                     f"{m['tag']}: perplexity {100 * up:+.1f} %, of held-out recall {between(share)} lost"))
    return (some(row[0] for row in rows), max(rows, key=lambda row: row[1])[2]) if rows else missing("compressions")


def early_sparsity_hurts(results):
    found = points(results, "sparsity", "SparseGPT")
    if not found:
        return missing("python -m study sweep sparsity")
    dense = bounds(results["models"][0])
    share = {x: lost(dense, found[x]["recall_heldout"][1:]) for x in (0.25, 0.3)}
    return some(above(v, LOST) for v in share.values()), "SparseGPT, of held-out recall: " + ", ".join(
        f"{between(v)} lost at {percent(x)}" for x, v in share.items())


def n_m_is_worse(results):
    found = [(points(results, "sparsity", name).get(0.5), points(results, "sparsity", f"{name} 2:4").get(0.5), name)
             for name in ("magnitude", "Wanda", "SparseGPT")]
    if not all(a and b for a, b, _ in found):
        return missing("python -m study sweep sparsity")
    gaps = {name: minus(a["recall_heldout"][1:], b["recall_heldout"][1:]) for a, b, name in found}
    return every(above(gap, 0) for gap in gaps.values()), "held-out recall of 50 % anywhere over 2:4: " + ", ".join(
        f"{name} [{100 * low:+.1f}, {100 * high:+.1f}] points" for name, (low, high) in gaps.items())


def quantization_is_gentler(results):
    """The best quantized model, in no more bytes than the best pruned one takes, recalls more."""
    quantized, pruned = made_by(results, "quantize"), made_by(results, "prune")
    if not (quantized and pruned):
        return missing("no model is quantized, or none pruned")
    a, b = quantized[0], pruned[0]
    smaller = a["metrics"]["bytes"] <= b["metrics"]["bytes"]
    return every([smaller, above(minus(bounds(a), bounds(b)), 0)]), ", ".join(
        f"{m['tag']} {between(bounds(m))} in {m['metrics']['bytes'] / 1000:,.0f} KB" for m in (a, b))


def retrieval_survives(results):
    """At 50 % sparsity retrieval about novel people keeps 90 % of the dense model's, and loses less than half the share
    that recall loses."""
    dense, pruned = results["models"][0], made_by(results, "prune")
    if not pruned or "retrieval" not in dense.get("tasks", {}):
        return missing("python evaluate.py --size medium")
    read, known = lost(*(m["tasks"]["retrieval"]["novel"]["exact"][1:] for m in (dense, pruned[0]))), \
        lost(bounds(dense), bounds(pruned[0]))
    half = [x / 2 for x in known]
    return (every([above(minus([0.1, 0.1], read), 0), above(minus(half, read), 0)]),
            f"{pruned[0]['tag']}: {between(read)} of retrieval about novel people lost, "
            f"{between(known)} of held-out recall")


def prompts_match_lora(results):
    """Of every pair named before the run, a repair in front of the text and a LoRA: displaced is non-inferior by the
    margin. Inferior in one pair: it does not hold."""
    tags = {m["id"]: m["tag"] for m in results["models"]}
    repaired = {(tags.get(m["base"]), m["tag"]): m for m in results["models"]}
    said, words = [], []
    for pair in results.get("pairs", []):
        a, b = (repaired.get((pair["base"], pair[side])) for side in "ab")
        low, high = pair["interval"]
        if a and (a["operation"] or {}).get("name") == "LoRA":
            a, b, low, high = b, a, *((None, None) if low is None else (-high, -low))
        kinds = [m and (m["operation"] or {}).get("name") for m in (a, b)]
        if kinds[0] not in ("prompt", "prefix", "IDP") or kinds[1] != "LoRA":
            continue
        word = judged([low, high], MARGIN)
        words.append({"superior": True, "non-inferior": True, "inferior": False}.get(word))
        said.append(" beside ".join(f"{m['tag']} ({m['metrics']['extra_parameters']:,} parameters)" for m in (a, b))
                    + f" on {pair['base']}: "
                    + ("no share to compare" if low is None else f"{between([low, high])} of what was lost, {word}"))
    return (every(words), "; ".join(said)) if said else missing("python evaluate.py: pairs of a prompt and a LoRA")


def longer_prompts_read_better(results):
    """Perplexity a text token falls from the shortest prompt to the longest of every compressed model. Published code
    divides the loss by text and prompt positions together: exp(loss * text / (text + P)) falls with P whatever is read.
    """
    said, holds = [], []
    for base in made_by(results, "quantize") + made_by(results, "prune"):
        found = {m["operation"]["parameters"]["size"]: m["metrics"]["perplexity"]
                 for m in made_by(results, "prompt", base["id"])
                 if m["operation"]["parameters"].get("objective") != "next_token"}
        if len(found) > 1:
            ends = min(found), max(found)
            right, wrong = [found[P] for P in ends], [found[P] ** (SCORED / (SCORED + P)) for P in ends]
            holds.append(right[1] < right[0])
            said.append("{}, {} to {} tokens: {:.2f} to {:.2f}, by the wrong divisor {:.2f} to {:.2f}".format(
                base["tag"], *ends, *right, *wrong))
    return (every(holds), "; ".join(said)) if said else missing("no model is repaired by prompts of two lengths")


def pools_and_lora(results):
    """[(base's id, the smallest pool made of it, the largest LoRA)] of every base that has both."""
    out = []
    for base in sorted({m["base"] for m in results["models"] if m["base"]}):
        pool, lora = (sorted(made_by(results, name, base), key=lambda m: m["metrics"]["extra_parameters"])
                      for name in ("IDP", "LoRA"))
        out += [(base, pool[0], lora[-1])] if pool and lora else []
    return out


def fewer_parameters(results):
    """A pool's M P C are 21 times fewer than LoRA's sum of r (in + out) over its layers."""
    said, holds = [], True
    for base, pool, lora in pools_and_lora(results):
        n, N = (m["metrics"]["extra_parameters"] for m in (pool, lora))
        M = pool["operation"]["parameters"]["size"][0]
        holds &= N >= 21 * n
        said.append(f"{base}: M P C = {n:,}, sum of r (in + out) = {N:,}: {N / n:.1f} times fewer, "
                    f"{N * M / n:.0f} times of the one prompt in use")
    return (holds, "; ".join(said)) if said else missing("no base has both IDP and LoRA")


def two_regimes(results):
    """Every LoRA brings block outputs nearer to the dense model's than every prompt, prefix and pool does: the
    intervals of the changes do not touch. (Stated after a first look at the means, before there were intervals.)
    """
    said, holds = [], []
    for base in sorted({m["base"] for m in results["models"] if m["base"]}):
        change = {name: [(m["similarity"]["nearer"]["output"], m["tag"]) for m in made_by(results, name, base)
                         if "nearer" in (m.get("similarity") or {})] for name in ("LoRA", "prompt", "prefix", "IDP")}
        inside, front = change["LoRA"], change["prompt"] + change["prefix"] + change["IDP"]
        if inside and front:
            holds.append(every(above(minus(a, b), 0) for a, _ in inside for b, _ in front))
            low, high = min(inside), max(front, key=lambda x: x[0][1])
            said.append(f"{base}, change of the outputs' similarity to the dense model's: " + ", ".join(
                "{} [{:+.4f}, {:+.4f}]".format(tag, *ends) for ends, tag in (low, high)))
    return (every(holds), "; ".join(said)) if said else missing("no base has both LoRA and prompts")


FINDINGS = [
    ("the paper: what compression takes is displaced, in part at least", displaced),
    ("LLM-KICK, the paper: perplexity hides what compression does to knowledge", perplexity_hides),
    ("LLM-KICK: 25 to 30 % sparsity can already hurt knowledge", early_sparsity_hurts),
    ("LLM-KICK: N:M sparsity is worse than as many zeros anywhere", n_m_is_worse),
    ("LLM-KICK: quantization does better than pruning (here: in no more bytes)", quantization_is_gentler),
    ("LLM-KICK: retrieval in context survives 50 % sparsity", retrieval_survives),
    ("the paper: prompts (IDP) recover as much as LoRA", prompts_match_lora),
    ("the paper: longer prompts lower perplexity", longer_prompts_read_better),
    ("the paper: IDP has 21 times fewer parameters than LoRA", fewer_parameters),
    ("the paper: prompting and re-training work in two different regimes", two_regimes),
]


def show(results):
    """The checklist as text, a line a finding and one of numbers."""
    words = {True: "holds here", False: "does not hold here", None: "open"}
    lines = [f"{claim['statement']}: {claim['verdict']}" for claim in results.get("claims", [])]
    lines = [*(["stated before the run:", *lines, "exploratory:"] if lines else [])]
    return "\n".join(lines + [f"{text}: {words[holds]}\n    {numbers}" for text, holds, numbers in checklist(results)])


def main(arguments):
    """python -m study findings: see the top of this file."""
    parser = argparse.ArgumentParser(prog="study findings", description="What others found, with our numbers.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", default="out/results.json", help="what the study and the sweeps wrote")
    args = parser.parse_args(arguments)
    results = read_json(args.results)
    if "models" not in results:
        raise ValueError(f"{args.results} has no study in it yet: run python evaluate.py first")
    try:
        print(show(results))
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{args.results} is not as python evaluate.py writes it") from None
