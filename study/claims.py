"""
What was claimed before the run, and whether it holds: four tests, corrected together; and repairs compared in pairs.

The paper's thesis is that compression displaces knowledge and that prompts bring it back as well as LoRA does. Our four
claims take it apart. They were written down after planning runs on one seed and before the study's, and are the one
primary family; every other number of the study is exploratory. docs/evidence.md has their verdicts in every run.

What it leaves out: claims about single attributes, and about tasks.
"""
from study.comparisons import flip_p
from study.statistics import holm, judged

MARGIN = 0.05  # of displaced: a repair that is worse by less counts as not worse (non-inferior)
BASE, CRUDE = "GPTQ", "RTN"  # at the same bits: 3 by default, 2 with --quick
STATEMENTS = {
    "prompt": f"One {{prompt}} brings back held-out facts that {BASE} took: displaced > 0.",
    "pool": "{pool}, chosen by attention, brings back more than one prompt of as many tokens, trained for as many "
            "steps.",
    "weights": f"One {{prompt}} is at most {100 * MARGIN:.0f} points worse than as many parameters in the weights "
               "({equal}).",
    "compressor": f"At equal bits a prompt brings back a smaller share of what {BASE} took than of what {CRUDE} took.",
}


def claims(draws, displaced, claimed):
    """The four claims, each {name, statement, estimate, interval, p, p_holm, verdict}; those whose models were not made
    are left out.

    p is that of the interval over people and draws; where the claim is about two models' answers, or their exact flip
    test's (people, in these draws) if that is larger.

    draws      [rows] of the study's own group; displaced {id: Estimate or None} as add_shares gives it
    claimed    the repairs they are about: a prompt, one of as many tokens as the pool, the pool, and repairs of the
               weights with as many parameters as the first
    """
    named = dict(zip(("prompt", "long", "pool", "equal"), claimed))  # {role: tag}
    ids = {(m["base"], m["tag"]): m["id"] for m in draws[0]}
    bases = {m["tag"].split()[0]: m["id"] for m in draws[0] if m["base"] == draws[0][0]["id"]}

    def share(base, tag):
        """Estimate of displaced of one repair, None where it is missing."""
        return displaced.get(ids.get((bases.get(base), tag)))
    out = []
    prompt, long, pool, equal = (share(BASE, tag) for tag in claimed)
    crude = share(CRUDE, named["prompt"])
    if prompt:
        p = flip_p(draws, bases[BASE], ids[bases[BASE], named["prompt"]])
        out.append(entry("prompt", prompt, 0.0, named, p))
    if pool and long:
        p = flip_p(draws, *(ids[bases[BASE], named[role]] for role in ("long", "pool")))
        out.append(entry("pool", pool - long, 0.0, named, p))
    if prompt and equal:
        out.append(entry("weights", prompt - equal, -MARGIN, named))
    if prompt and crude:
        out.append(entry("compressor", crude - prompt, 0.0, named))
    for row, p in zip(out, holm([row["p"] for row in out])):
        decided = "holds" if row.pop("positive") else "the opposite holds"
        row |= {"p_holm": p, "verdict": decided if p < 0.05 else "undecided"}
    return out


def entry(name, estimate, null, named, p=0.0):
    """One claim before it is corrected: the estimate is above `null`; p: the flip test's; named {role: repair}."""
    return {"name": name, "statement": STATEMENTS[name].format(**named), "estimate": float(estimate.value),
            "interval": estimate.interval(), "p": float(max(p, estimate.p(null))),
            "positive": bool(estimate.value > null)}


def pairs(rows, displaced, claimed):
    """Repairs of one model compared by name: {base, a, b, difference, interval, verdict}, the word of `judged`.

    They are exploratory: each 95 % interval stands by itself, and nothing is corrected.
    """
    (prompt, long, pool, equal), out = claimed, []
    named = ((prompt, "LoRA rank 8"), (pool, "LoRA rank 8"), (prompt, equal), (pool, long))
    for base in [m for m in rows if m["base"] == rows[0]["id"]]:
        ids = {m["tag"]: m["id"] for m in rows if m["base"] == base["id"]}
        for a, b in named:
            first, second = displaced.get(ids.get(a)), displaced.get(ids.get(b))
            if first and second:
                less = first - second
                out.append({"base": base["tag"], "a": a, "b": b, "difference": float(less.value),
                            "interval": less.interval(), "verdict": judged(less.interval(), MARGIN)})
    return out


def headline(rows):
    """One sentence that follows from the finished rows: how many repairs are confirmed, and the most that came back."""
    tags = {m["id"]: m["tag"] for m in rows}
    repaired = [m for m in rows if m.get("kind") == "repaired" and m["metrics"].get("displaced") is not None]
    sure = [m for m in repaired if m.get("confirmed")]
    if not any(m.get("kind") == "repaired" for m in rows):
        return "No compressed model was repaired: nothing is said of what compression took."
    if not repaired:
        return "Compression took too little recall to say whether it was forgotten or displaced."
    if not sure:
        return (f"None of {len(repaired)} repairs brings back held-out facts beyond what chance would: "
                "nothing is shown to be displaced.")
    best = max(sure, key=lambda m: m["metrics"]["displaced"])
    value, (low, high) = best["metrics"]["displaced"], best["intervals"]["displaced"]
    return (f"Part of what compression took came back: {len(sure)} of {len(repaired)} repairs bring back facts "
            f"that they never read about, most of all {best['tag']} on {tags[best['base']]}: "
            f"{value:.0%} [{low:.0%}, {high:.0%}].")
