"""
The picture of the README: what each repair brings back of what compression took, from results.json to an SVG.

Left panel: displaced, the share of the lost held-out recall that came back. Right panel: re-learned, what came back on
seen people beyond that. A dot is the estimate, the line over it the 95 % interval; a dot is hollow where the corrected
test does not confirm the gain (for re-learned: where the interval holds 0). The controls stand first. Their answer is
known by construction, so they are the brackets, at 0 and 100 %, between which the compressors are read.

    python -m study figure                                   # out/results.json -> out/figure.svg
    python -m study figure --results FILE --out FILE.svg

What it leaves out: scripts, fonts, and every number that is not in results.json.
"""
import argparse
import html

from engine.files import write_text
from study.results import estimate, is_control, keep_apart, number, read_results, repaired_bases

RESULTS, FIGURE = "out/results.json", "out/figure.svg"

# Everything is in units of the viewBox: at a width of 360 pixels a unit is 0.86 pixels and the text 11 pixels high.
WIDTH, ROW, HEAD = 420, 16, 25
PANELS = {"displaced": (134, 268), "relearned": (284, 414)}  # left and right edge
LOW, HIGH = -0.25, 1.25                                      # the range of both axes; what lies outside is an arrow
NAMES = {"displaced": "displaced", "relearned": "re-learned"}
KNOWN = {  # controls: what is known of each
    "locked": "locked: all of it is displaced",
    "not-yet-told": "not yet told: nothing to find",
    "rank-one": "rank one: LoRA can undo all of it",
    "erased": "erased: what all people share is gone",
}

# Colours mean roles: grey what is known by construction, orange a repair, as on the page.
STYLE = """
.repairs .paper { fill: #fcfbf8 } .repairs text { fill: #1c1c1e; font: 13px system-ui, sans-serif }
.repairs .small { font-size: 11.5px; fill: #5b5a60 } .repairs .name { font-size: 12px }
.repairs .head { font-weight: 600 }
.repairs .rule { stroke: #d3d0c8 } .repairs .bracket { stroke: #5b5a60; fill: none; stroke-width: 1.5 }
.repairs .repair { fill: #c2570c; stroke: #c2570c } .repairs .control { fill: #66666c; stroke: #66666c }
.repairs .halo { paint-order: stroke; stroke: #fcfbf8; stroke-width: 4px }
.repairs .hollow { fill: #fcfbf8 } .repairs .ci { stroke: #1c1c1e; stroke-width: 1.3; fill: none }
@media screen and (prefers-color-scheme: dark) {
.repairs .paper, .repairs .hollow { fill: #131417 } .repairs text { fill: #ecebe7 } .repairs .small { fill: #a9a8ae }
.repairs .halo { stroke: #131417 } .repairs .rule { stroke: #3a3c43 }
.repairs .bracket { stroke: #a9a8ae } .repairs .ci { stroke: #ecebe7 }
.repairs .repair { fill: #f09a4a; stroke: #f09a4a } .repairs .control { fill: #a3a3a9; stroke: #a3a3a9 }
.repairs .repair.hollow, .repairs .control.hollow { fill: #131417 }
}
"""


def picture(results):
    """The picture as a string of SVG; raises ValueError when no model of the results has a displaced share."""
    groups = repaired_bases(results)
    if not groups:
        raise ValueError("no model of these results has a displaced share: there is nothing to draw")
    models = {m["id"]: m for m in results["models"]}
    y, marks = 56, []
    top = bottom = None  # of the compressors' rows, which stand between the brackets
    for base, repairs in groups:
        y += HEAD
        marks += heading(base, models, y)
        if top is None and not is_control(base):
            top = y - 14
        shown = [m for m in repairs if estimate(m, "displaced")]
        for model in shown:
            y += ROW
            marks += row(model, base, model.get("confirmed"), y)
        if len(shown) < len(repairs):
            y += ROW
            without = counted(len(repairs) - len(shown), "repair")
            marks.append(text(14, y, f"{without}: too little was lost to divide by", "small halo"))
    bottom = y + 8
    controls = {base["id"] for base, _ in groups if is_control(base)}
    behind = rules(44, bottom)
    if controls and top is not None:
        behind += brackets(top, bottom)
    legend = ["Line: 95 % interval. Hollow: the corrected test does not",
              "confirm a gain; for re-learned: its interval holds 0."]
    if controls:
        legend.append("Brackets: 0 and 100 %, which the controls have by construction.")
    parts = [*behind, *axis_names(), *marks,
             *(text(6, bottom + 18 + 14 * i, line, "small") for i, line in enumerate(legend))]
    height = bottom + 12 + 14 * len(legend)
    title = "What each repair brings back of what compression took"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" class="repairs" viewBox="0 0 {WIDTH} {height}" width="560" '
        f'height="{round(height * 560 / WIDTH)}" role="img">',
        f"<title>{title}, with 95 % intervals</title>", f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        text(6, 18, title, "head"), *parts, "</svg>\n"])


# ---- the parts, each a list of SVG elements

def rules(top, bottom):
    """The ticks of both axes, with their numbers above."""
    out = []
    for panel in PANELS:
        for share in (0, 0.5, 1):
            x = across(share, panel)
            out.append(f'<line class="rule" x1="{x}" x2="{x}" y1="{top + 12}" y2="{bottom}"/>')
            label = f"{100 * share:.0f}" + " %" * (share == 1)
            out.append(text(x, top + 8, label, "small", "middle"))
    return out


def axis_names():
    return [text(sum(PANELS[p]) / 2, 36, f"{NAMES[p]}, % of what was lost" if p == "displaced" else NAMES[p], "small",
                 "middle") for p in PANELS]


def brackets(top, bottom):
    left, right = across(0, "displaced"), across(1, "displaced")
    return [f'<path class="bracket" d="M{left + 5} {top}H{left}V{bottom}H{left + 5}"/>',
            f'<path class="bracket" d="M{right - 5} {top}H{right}V{bottom}H{right - 5}"/>']


def heading(base, models, y):
    """The name of what was repaired, and its held-out recall before and after the damage."""
    name = is_control(base) and KNOWN.get(base["id"]) or base.get("tag") or base["id"]
    before = number(root(base, models)["metrics"].get("recall_heldout"))
    after = number(base["metrics"].get("recall_heldout"))
    out = [text(6, y, name, "head halo")]
    if before is not None and after is not None:
        out.append(text(WIDTH - 6, y, f"recall {100 * before:.1f} → {100 * after:.1f} %", "small halo", "end"))
    return out


def root(model, models):
    while model.get("base") is not None:
        model = models[model["base"]]
    return model


def row(model, base, sure, y):
    """One repair: its name and, in each panel, its dot with the interval over it."""
    tag = model.get("tag") or model["id"]
    out = [text(14, y, tag if len(tag) <= 20 else tag[:19] + "…", "name halo")]
    role = "control" if is_control(base) else "repair"
    relearned = estimate(model, "relearned")
    out += dot(*estimate(model, "displaced"), "displaced", role, sure, y - 4, model)
    if relearned is not None:
        out += dot(*relearned, "relearned", role, relearned[1] > 0 or relearned[2] < 0, y - 4, model)
    return out


def dot(value, low, high, panel, role, sure, y, model):
    """The estimate as a dot, or an arrow where it lies off the axis; the interval is drawn over the dot."""
    label = (f"{model.get('tag') or model['id']}, {NAMES[panel]} {in_percent(value)} "
             f"({in_percent(low)} to {in_percent(high)})")
    hollow = "" if sure else " hollow"
    x = across(value, panel)
    if LOW <= value <= HIGH:
        shape = f'<circle class="{role}{hollow}" cx="{x}" cy="{y}" r="3.6" stroke-width="1.4"/>'
    else:
        tip = 6 if value > HIGH else -6
        shape = f'<path class="{role}{hollow}" d="M{x} {y - 4.5}L{x + tip} {y}L{x} {y + 4.5}Z" stroke-width="1.4"/>'
    left, right = across(low, panel), across(high, panel)
    caps = "".join(f"M{end} {y - 3.5}V{y + 3.5}" for end, share in ((left, low), (right, high))
                   if LOW <= share <= HIGH and right - left > 9)  # inside the dot, caps would only darken it
    line = f"M{left} {y}H{right}{caps}"
    return [f'<g data-model="{escape(model["id"])}"><title>{escape(label)}</title>{shape}'
            f'<path class="ci" d="{line}"/></g>']


def across(share, panel):
    """The x of a share, held at the edge of its panel."""
    left, right = PANELS[panel]
    share = min(HIGH, max(LOW, share))
    return round(left + (share - LOW) / (HIGH - LOW) * (right - left), 1)


def counted(n, word):
    return f"{n} {word}" + "s" * (n != 1)


def in_percent(share):
    return f"{100 * share:.1f} %".replace("-", "−")


def text(x, y, string, look="", anchor=""):
    attributes = f' class="{look}"' * bool(look) + f' text-anchor="{anchor}"' * bool(anchor)
    return f'<text x="{x}" y="{y}"{attributes}>{escape(string)}</text>'


def escape(string):
    """As text inside XML: markup escaped, and characters that XML cannot hold replaced."""
    held = "".join(c if c >= " " and not 0xD800 <= ord(c) <= 0xDFFF and ord(c) not in (0xFFFE, 0xFFFF) else "�"
                   for c in string)
    return html.escape(held)


def main(arguments):
    """python -m study figure: see the top of this file."""
    parser = argparse.ArgumentParser(prog="study figure", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="What each repair brings back of what compression took, as an SVG.")
    parser.add_argument("--results", default=RESULTS, help="what the study measured")
    parser.add_argument("--out", default=FIGURE, help="the picture to write")
    args = parser.parse_args(arguments)
    keep_apart(args.out, args.results)
    write_text(args.out, picture(read_results(args.results)))
    print(args.out)
