"""
The checklist: what LLM-KICK (Jaiswal et al. 2024, arXiv 2310.01382) and the paper (arXiv 2310.00867) found, and our
number next to each.

Each finding is a rule on the numbers of results.json, written before the run: it holds, it does not, or it was not
measured here, and then the command that measures it is named. Nothing is judged by hand.

    python -m study findings                     # of out/results.json
"""
import argparse
import json

LOST = 0.05  # of the dense model's recall: more is "hurt"


def checklist(results):
    """[(finding, True or False or None: not measured, the numbers)] of one results.json."""
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


# ---- the rules

def perplexity_hides(results):
    """Some compression moves perplexity by less than 10 % and takes more than 10 % of held-out recall."""
    dense, rows = results["models"][0]["metrics"], []
    for m in made_by(results, "quantize") + made_by(results, "prune"):
        up = m["metrics"]["perplexity"] / dense["perplexity"] - 1
        down = 1 - m["metrics"]["recall_heldout"] / dense["recall_heldout"]
        said = f"{m['tag']}: perplexity {100 * up:+.1f} %, held-out recall {-100 * down:+.1f} %"
        rows.append((up < 0.1 < down, down - up, said))
    holds, _, said = max(rows)
    return holds, said


def early_sparsity_hurts(results):
    found = points(results, "sparsity", "SparseGPT")
    if not found:
        return missing("python -m study sweep sparsity")
    dense = results["models"][0]["metrics"]["recall_heldout"]
    lost = {x: 1 - found[x]["recall_heldout"][0] / dense for x in (0.25, 0.3)}
    return max(lost.values()) > LOST, "SparseGPT, of held-out recall: " + ", ".join(
        f"{percent(v)} lost at {percent(x)}" for x, v in lost.items())


def n_m_is_worse(results):
    found = [(points(results, "sparsity", name).get(0.5), points(results, "sparsity", f"{name} 2:4").get(0.5), name)
             for name in ("magnitude", "Wanda", "SparseGPT")]
    if not all(a and b for a, b, _ in found):
        return missing("python -m study sweep sparsity")
    gaps = {name: b["recall_heldout"][0] - a["recall_heldout"][0] for a, b, name in found}
    return max(gaps.values()) < 0, "held-out recall of 2:4 over 50 % anywhere: " + ", ".join(
        f"{name} {100 * gap:+.1f} points" for name, gap in gaps.items())


def quantization_is_gentler(results):
    """The best quantized model, in no more bytes than the best pruned one takes, recalls more."""
    quantized, pruned = made_by(results, "quantize"), made_by(results, "prune")
    if not (quantized and pruned):
        return missing("no model is quantized, or none pruned")
    a, b = quantized[0]["metrics"], pruned[0]["metrics"]
    return a["recall_heldout"] > b["recall_heldout"] and a["bytes"] <= b["bytes"], ", ".join(
        f"{m['tag']} {percent(m['metrics']['recall_heldout'])} in {m['metrics']['bytes'] / 1000:,.0f} KB"
        for m in (quantized[0], pruned[0]))


def retrieval_survives(results):
    """At 50 % sparsity retrieval about novel people keeps 90 % of the dense model's, and loses less than half the share
    that recall loses."""
    dense, pruned = results["models"][0], made_by(results, "prune")
    if not pruned or "retrieval" not in dense.get("tasks", {}):
        return missing("python evaluate.py --size medium")
    read = [m["tasks"]["retrieval"]["novel"]["exact"][0] for m in (dense, pruned[0])]
    known = [m["metrics"]["recall_heldout"] for m in (dense, pruned[0])]
    lost = [1 - after / before if before else 0.0 for before, after in (read, known)]
    return (lost[0] < 0.1 and lost[0] < lost[1] / 2,
            f"{pruned[0]['tag']}: retrieval about novel people {percent(read[0])} -> {percent(read[1])}, "
            f"held-out recall {percent(known[0])} -> {percent(known[1])}")


def prompts_match_lora(results):
    """On every base that has both, the best pool of prompts brings back at least what the best LoRA does."""
    said, holds, tags = [], True, {m["id"]: m["tag"] for m in results["models"]}
    for base in {m["base"] for m in results["models"]}:
        pool, lora = made_by(results, "IDP", base), made_by(results, "LoRA", base)
        if not (pool and lora) or None in (pool[0]["metrics"]["displaced"], lora[0]["metrics"]["displaced"]):
            continue
        holds &= pool[0]["metrics"]["displaced"] >= lora[0]["metrics"]["displaced"]
        said.append(f"{tags[base]}: " + ", ".join(
            f"{m['tag']} brings back {percent(m['metrics']['displaced'])} with {m['metrics']['extra_parameters']:,} "
            "parameters" for m in (pool[0], lora[0])))
    return (holds, "; ".join(sorted(said))) if said else (None, "compression took too little to divide by")


def longer_prompts_read_better(results):
    """Perplexity a text token falls from the shortest prompt to the longest; by the wrong divisor it seems to."""
    said, holds = [], True
    for base in sorted({p["series"] for p in results.get("sweeps", {}).get("prompt-length", {}).get("points", [])}):
        found = points(results, "prompt-length", base)
        short, long = found[min(found)], found[max(found)]
        holds &= long["perplexity"] < short["perplexity"]
        right, wrong = (f"{short[key]:.2f} to {long[key]:.2f}" for key in ("perplexity", "perplexity_wrong_divisor"))
        said.append(f"{base}, {min(found)} to {max(found)} tokens: {right}, by the wrong divisor {wrong}")
    return (holds, "; ".join(said)) if said else missing("python -m study sweep prompt-length")


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


def less_latency(results):
    """A question takes 60 % less time with IDP than with LoRA beside the weights."""
    said, holds = [], True
    for base, pool, lora in pools_and_lora(results):
        ms, MS = (m["metrics"]["ms_per_question"] for m in (pool, lora))
        holds &= ms <= 0.4 * MS
        said.append(f"{base}: {ms:.1f} ms against {MS:.1f}, {percent(1 - ms / MS)} less")
    return (holds, "; ".join(said)) if said else missing("no base has both IDP and LoRA")


def two_regimes(results):
    """Every LoRA brings block outputs nearer to the dense model's than every prompt, prefix and pool does: the
    intervals of the changes do not touch. (Stated after a first look at the means, before there were intervals.)
    """
    said, holds = [], True
    for base in sorted({m["base"] for m in results["models"] if m["base"]}):
        change = {name: [(m["similarity"]["nearer"]["output"], m["tag"]) for m in made_by(results, name, base)
                         if "nearer" in (m.get("similarity") or {})] for name in ("LoRA", "prompt", "prefix", "IDP")}
        inside, front = change["LoRA"], change["prompt"] + change["prefix"] + change["IDP"]
        if inside and front:
            low, high = min(inside), max(front, key=lambda x: x[0][1])
            holds &= low[0][0] > high[0][1]
            said.append(f"{base}, change of the outputs' similarity to the dense model's: " + ", ".join(
                "{} [{:+.4f}, {:+.4f}]".format(tag, *bounds) for bounds, tag in (low, high)))
    return (holds, "; ".join(said)) if said else missing("no base has both LoRA and prompts")


FINDINGS = [
    ("LLM-KICK, the paper: perplexity hides what compression does to knowledge", perplexity_hides),
    ("LLM-KICK: 25 to 30 % sparsity already hurts knowledge", early_sparsity_hurts),
    ("LLM-KICK: N:M sparsity is worse than as many zeros anywhere", n_m_is_worse),
    ("LLM-KICK: quantization is gentler than pruning at equal bytes", quantization_is_gentler),
    ("LLM-KICK: retrieval in context survives 50 % sparsity", retrieval_survives),
    ("the paper: prompts (IDP) recover as much as LoRA", prompts_match_lora),
    ("the paper: longer prompts lower perplexity", longer_prompts_read_better),
    ("the paper: IDP has 21 times fewer parameters than LoRA", fewer_parameters),
    ("the paper: IDP takes 60 % less time than LoRA", less_latency),
    ("the paper: prompting and re-training work in two different regimes", two_regimes),
]


def show(results):
    """The checklist as text, a line a finding and one of numbers."""
    words = {True: "holds here", False: "does not hold here", None: "open"}
    return "\n".join(f"{text}: {words[holds]}\n    {numbers}" for text, holds, numbers in checklist(results))


def main(arguments):
    """python -m study findings: see the top of this file."""
    parser = argparse.ArgumentParser(prog="study findings", description="What others found, with our numbers.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", default="out/results.json", help="what the study and the sweeps wrote")
    args = parser.parse_args(arguments)
    with open(args.results, encoding="utf-8") as f:
        results = json.load(f)
    if "models" not in results:
        raise ValueError(f"{args.results} has no study in it yet: run python evaluate.py first")
    print(show(results))
