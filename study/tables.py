"""
Every table of the study as Markdown that reads as text: columns padded to one width.
"""
import statistics

import numpy as np

from study import findings
from world.items import TASKS

SPLIT_NAMES = {"seen": "seen", "heldout": "held-out", "novel": "novel"}


def markdown(head, rows, text_columns=1):
    """A Markdown table of strings; the first `text_columns` columns are aligned left, the others right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells):
        """One row of the table."""
        return "| " + " | ".join(cell.ljust(w) if i < text_columns else cell.rjust(w)
                                 for i, (cell, w) in enumerate(zip(cells, widths))) + " |"
    rules = ["-" * (w + 2) if i < text_columns else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), f"|{'|'.join(rules)}|", *map(line, rows)])


def share(values):
    """[mean, low, high] or (mean, [low, high]) as percent: "43.7 [38.0, 49.0]"; without bounds the mean alone."""
    mean, low, high = values if len(values) == 3 else (values[0], *(values[1] or (None, None)))
    if mean is None:
        return ""

    def percent(x):
        return f"{round(100 * x, 9) + 0.0:.1f}"  # a mean of draws that is 0 but for rounding has no sign
    return percent(mean) + (f" [{percent(low)}, {percent(high)}]" if low is not None else "")


def in_points(difference, bounds):
    """A difference of shares in percentage points: "+12.0 [+8.1, +15.9]"."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in (difference, *bounds)))


def name_of(model):
    """A model's tag, "+ tag" for a repair."""
    return ("+ " if model.get("kind") == "repaired" else "") + model["tag"]


def main_table(results):
    """What came back of what was taken, a row a model, at most 100 columns: percent, 95 % intervals; * confirmed."""
    rows, several = [], results["settings"]["seeds"] > 1
    for m in results["models"]:
        cells = [share((m["metrics"].get(name), m["intervals"].get(name, [None, None])))
                 for name in ("recall_heldout", "displaced", "relearned")]
        name = name_of(m) + (" *" if m.get("confirmed") else "")
        rows.append([name, f"{m['metrics']['extra_parameters']:,}", *cells])
    head = ["model", "params", "held-out recall %", "displaced %", "re-learned %"]
    draws = f"; over {results['settings']['seeds']} draws" if several else ""
    return (markdown(head, rows) + "\n\n* a confirmed gain on held-out people, by test and interval; "
            f"params: a repair's own{draws}")


def cost_table(results):
    """Recalls, knowledge and costs of every model."""
    splits = {f"recall_{split}": f"{name} %" for split, name in SPLIT_NAMES.items()}
    rows = []
    for m in results["models"]:
        v, i = m["metrics"], m["intervals"]
        seeds = {name: [100 * x for x in m.get("seeds", {}).get(name, []) if x is not None] for name in splits}
        rows.append([name_of(m), f"{v['bits_per_weight']:.2f}", f"{v['bytes'] / 1000:.0f}",
                     f"{v['extra_parameters']:,}", f"{v['perplexity']:.2f}" if "perplexity" in v else "",
                     *(share((v.get(name), i.get(name))) + (f" ± {statistics.stdev(seeds[name]):.1f}"
                                                            if len(seeds[name]) > 1 else "") for name in splits)])
    return markdown(["model", "bits a weight", "KB on disk", "extra parameters", "perplexity", *splits.values()], rows)


def knowledge_table(results):
    """Knowledge beside recall: displaced and re-learned by the log-probability of the right value among its attribute's
    values, and how a repair's gain in log-probability (nats) splits into knowledge and format.
    """
    rows = []
    for m in results["models"]:
        v, i = m["metrics"], m["intervals"]
        if m.get("kind") == "repaired" and "gain_knowledge" in v:
            rows.append([name_of(m), share((v["displaced"], i["displaced"])),
                         share((v["displaced_knowledge"], i["displaced_knowledge"])),
                         share((v["relearned_knowledge"], i["relearned_knowledge"])),
                         *(f"{v[name]:+.3f}" for name in ("gain_logprob", "gain_knowledge", "gain_format"))])
    return markdown(["model", "displaced %, recall", "displaced %, knowledge", "re-learned %, knowledge", "gain, nats",
                     "of it knowledge", "format"], rows)


def guess_table(results):
    """What came back of all held-out facts beside what came back of those that cannot be guessed (real/guess.py)."""
    rows = []
    for m in results["models"]:
        v, i = m["metrics"], m["intervals"]
        if "unguessed_heldout" in v:
            rows.append([name_of(m), *(share((v.get(name), i.get(name))) for name in (
                "displaced", "unguessed_heldout", "displaced_unguessed", "relearned_unguessed"))])
    return results["guessing"] + "\n\n" + markdown(
        ["model", "displaced %, all facts", "recall %, not guessable", "displaced %", "re-learned %"], rows)


def claims_table(results):
    """The four claims that were written down before the run."""
    rows = [[c["statement"], in_points(c["estimate"], c["interval"]), f"{c['p_holm']:.2g}", c["verdict"]]
            for c in results["claims"]]
    return markdown(["claim", "difference, points", "p (Holm)", "verdict"], rows)


def pairs_table(results):
    """Two repairs of one model compared: the paper's own comparison among them."""
    rows = [[p["base"], p["a"], p["b"], in_points(p["difference"], p["interval"]), p["verdict"]]
            for p in results["pairs"]]
    return markdown(["on", "repair", "against", "displaced, points", "verdict (margin 5 points)"], rows, 3)


def draws_table(results):
    """Displaced in each draw by itself, percent of that draw's own loss; its mean over draws has the interval above."""
    where, rows = {m["id"]: m for m in results["models"]}, []
    for m in [m for m in results["models"] if m.get("kind") == "repaired"]:
        base = where[m["base"]]
        each = zip(*(x["seeds"]["recall_heldout"] for x in (where[base["base"]], base, m)))
        rows.append([base["tag"], m["tag"], *(f"{100 * (c - b) / (a - b):.1f}" if a != b else "" for a, b, c in each)])
    return markdown(["on", "repair", *(f"draw {k + 1}" for k in range(results["settings"]["seeds"]))], rows, 2)


def same_table(results):
    """Facts that two compressors both took from one GPT, and how many of them come back after each (overlap.py)."""
    cells = ("back_a", "back_b", "difference", "back_a_only", "back_b_only")
    rows = [[f"{r['a']}; {r['b']}", r["repair"], f"{r['both']:,}; {r['a_only']:,}; {r['b_only']:,}",
             *(share(r[cell] or (None, None)) for cell in cells)] for r in results["same"]]
    head = ["first; second", "repair", "lost by both; first alone; second alone", "both: back, first %", "second %",
            "difference", "first alone: back %", "second alone: back %"]
    return markdown(head, rows, 3)


def attribute_table(results):
    """Recall by attribute, seen and held-out together."""
    names = list(results["models"][0]["attributes"])
    return markdown(["model", *names], [[name_of(m), *(share(m["attributes"][name]) for name in names)]
                                        for m in results["models"] if "attributes" in m])


def file_table(results):
    """The scores on task files, a row a model."""
    names = [m["name"] for m in results["metrics"] if m["name"].rsplit(" ", 1)[0] in results["files"]]
    return markdown(["model", *names],
                    [[m["id"], *("{:.3f} [{:.3f}, {:.3f}]".format(m["metrics"][name], *m["intervals"][name])
                                 for name in names)] for m in results["models"] if names[0] in m["metrics"]])


def selector_table(model):
    """The ways to choose from one pool."""
    rows = [[row["name"], share((row["recall"], row["interval"])),
             "[{:+.1f}, {:+.1f}]".format(*(100 * x for x in row["over_rule"])), row["extra_passes"]]
            for row in model["idp"]["selectors"]]
    return markdown(["choice", "held-out %", "over the paper's rule, points", "extra passes"], rows) + (
        f"\n\nrank correlation of attention with the right answer's log-probability: {correlation(model) or 'none'}; "
        f"chosen: {model['idp']['chosen']}")


def correlation(model):
    """The rank correlation of a pool's attention with its interval; "" where no question has one."""
    c = model["idp"]["correlation"]
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(c["rho"], *c["interval"]) if c else ""


def pool_table(results):
    """Every pool in one row: what its choice reaches, and what the best choice would, beside an oracle's floor."""
    short = {"rule": "attention-max (the paper's rule)", "probe": "probe trained with the prompts",
             "best single": "best single on validation", "oracle": "oracle",
             "floor": "floor: oracle over an untuned pool"}
    rows = []
    for m in results["models"]:
        if m.get("idp"):
            found = {row["name"]: row for row in m["idp"]["selectors"]}
            rows.append([m["id"], *(share((found[n]["recall"], found[n]["interval"])) if n in found else ""
                                    for n in short.values()),
                         correlation(m)])
    return markdown(["pool", *short, "rank correlation"], rows)


def twin_table(results):
    """Repairs trained by distillation beside their twins on the next token: what came back and what was re-learned."""
    where = {m["id"]: m for m in results["models"]}
    rows = [[name, *(share((t["metrics"][key], t["intervals"][key])) for key in ("displaced", "relearned")
                     for t in (m, where[f"{name}-next-token"]))]
            for name, m in where.items() if f"{name}-next-token" in where]
    return markdown(["repair", "displaced %, distilled", "next token", "re-learned %, distilled", "next token"], rows)


def inside_table(results):
    """How near each model's attention and block outputs are to the dense model's."""
    rows = []
    for m in [m for m in results["models"][1:] if "similarity" in m]:
        cells = []
        for name in ("attention", "output"):
            bounds = m["similarity"].get("nearer", {}).get(name)
            cells += [f"{np.mean(m['similarity']['texts'][name]):.4f}",
                      "[{:+.4f}, {:+.4f}]".format(*bounds) if bounds else ""]
        rows.append([name_of(m), *cells])
    return markdown(["model", "attention", "change by repair", "output", "change by repair"], rows)


def task_table(results, split):
    """A row a model, a column a task: the main metric in percent with its interval, on one split."""
    models = [m for m in results["models"] if m.get("tasks")]
    names = list(models[0]["tasks"])
    metric = {name: TASKS[name].metrics[0] if name in TASKS else "exact" for name in names}
    return markdown(["model", *names],
                    [[m["tag"] if m["base"] in (None, "dense") else f"{m['base']} + {m['tag']}",
                      *(share(m["tasks"][name][split][metric[name]]) for name in names)] for m in models])


def comparison_table(results):
    """The comparisons of recall, and those on tasks that are no luck: flips, p, corrected p, what was detectable.

    Differences are in percent of the items. The study's comparisons, shown or not, are corrected together, and each
    control's.
    """
    shown = [row for row in results["comparisons"] if row["what"].startswith("recall") or row["p_holm"] < 0.05]
    rows = [[row["model"], row["base"], row["what"], row["items"], row["gained"], row["lost"],
             f"{100 * row['difference']:+.1f}", f"{row['p']:.2g}", f"{row['p_holm']:.2g}",
             "" if row["detectable"] is None else f"{100 * row['detectable']:.1f}"] for row in shown]
    hidden = len(results["comparisons"]) - len(shown)
    head = ["model", "against", "on", "items", "gained", "lost", "difference", "p", "p (Holm)", "detectable"]
    return markdown(head, rows, 3) + (
        f"\n\nand {hidden} comparisons on tasks whose corrected p is 0.05 or more" if hidden else "")


def all_tables(results):
    """Every table but the main one, with a heading each: what tables.md holds."""
    parts = [("what came back", main_table(results)), ("claims, written down before the run", claims_table(results)),
             ("repairs in pairs, each interval by itself", pairs_table(results)),
             ("recalls and costs", cost_table(results)),
             ("knowledge and format", knowledge_table(results)),
             ("by attribute, seen and held-out together, %", attribute_table(results))]
    if results.get("guessing"):
        parts.insert(1, ("what cannot be guessed", guess_table(results)))
    if results["settings"]["seeds"] > 1:
        parts.insert(3, ("displaced % in each draw by itself", draws_table(results)))
    if results["same"]:
        parts.insert(3, ("the same facts under two compressors: which are right after the repair", same_table(results)))
    if results["files"]:
        parts.append(("task files", file_table(results)))
    parts += [(f"{m['id']}: one pool, every way to choose", selector_table(m))
              for m in results["models"] if m.get("idp")]
    parts += [("the pools, held-out %", pool_table(results)),
              ("cosine similarity to the dense model, over layers and heads", inside_table(results))]
    if any(m["id"].endswith("-next-token") for m in results["models"]):
        parts.append(("distillation and the next token", twin_table(results)))
    if results["models"][0].get("tasks"):
        parts += [(f"the tasks of items.py, {results['settings']['size']} preset, {name} people, % [95 %]",
                   task_table(results, split)) for split, name in SPLIT_NAMES.items()]
    parts.append(("every model against the one it was made from", comparison_table(results)))
    noise = "\n".join(f"noise floor, {row['model']} {row['what']}: {row['gained']} gained and {row['lost']} lost of "
                      f"{row['items']}, {100 * row['difference']:+.1f} points, p {row['p']:.2g}"
                      for row in results["noise"])
    parts += [("where nothing should differ", noise), ("what others found, and we", findings.show(results))]
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts) + "\n"
