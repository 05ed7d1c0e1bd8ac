"""The README's picture against the numbers it was drawn from: the SVG is parsed again and every mark is measured."""
import json
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import pytest

from engine.script import guard
from invented import PLANNED, with_everything, written
from study import figure, page
from study.steps import slug

ROOT = pathlib.Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def parsed(results):
    return ElementTree.fromstring(figure.picture(results))


def marks(svg):
    """[(title, mark, interval's path)] of every dot or arrow."""
    return [(g.find(f"{SVG}title").text, g[1], g.find(f"{SVG}path[@class='ci']")) for g in svg.iter(f"{SVG}g")]


def texts(svg):
    return ["".join(t.itertext()) for t in svg.iter(f"{SVG}text")]


def share_at(x, panel):
    left, right = figure.PANELS[panel]
    return figure.LOW + (x - left) / (right - left) * (figure.HIGH - figure.LOW)


@pytest.fixture(scope="module")
def study():
    return with_everything(people=2)[0]


def test_every_dot_stands_at_its_number(study):
    svg = parsed(study)
    expected = [(m, name) for base in sorted(PLANNED, key=lambda b: PLANNED[b][1] != "control")
                for m in study["models"] if m["base"] == base and m["intervals"].get("displaced", [None])[0] is not None
                for name in ("displaced", "relearned")]
    found = marks(svg)
    assert len(found) == len(expected) == 2 * (20 + 8)
    for (title, mark, ci), (model, name) in zip(found, expected):
        assert title.startswith(f"{model['tag']}, {figure.NAMES[name]} ")
        assert abs(share_at(float(mark.get("cx")), name) - model["metrics"][name]) < 0.002
        ends = [float(x) for x in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", ci.get("d")).groups()]
        for x, end in zip(ends, model["intervals"][name]):
            assert abs(share_at(x, name) - end) < 0.002 or not figure.LOW <= end <= figure.HIGH
        low, high = model["intervals"][name]
        sure = model["confirmed"] if name == "displaced" else not low <= 0 <= high
        assert ("hollow" in mark.get("class")) == (not sure)
        assert ("control" in mark.get("class")) == (PLANNED[model["base"]][1] == "control")


def test_an_interval_is_drawn_over_its_dot(study):
    for _, mark, ci in marks(parsed(study)):
        assert mark.tag != ci.tag or mark is not ci
    for g in parsed(study).iter(f"{SVG}g"):
        assert [child.get("class", "").split(" ")[0] for child in g][1:] in (["control", "ci"], ["repair", "ci"])


def test_controls_stand_first_and_bracket_the_rest(study):
    svg = parsed(study)
    said = texts(svg)
    names = [t for t in said if t in [v[0] for v in PLANNED.values()] or t in figure.KNOWN.values()]
    assert names[:3] == [figure.KNOWN[k] for k in ("locked", "not-yet-told", "rank-one")]
    assert len(names) == len(PLANNED)
    brackets = [p.get("d") for p in svg.iter(f"{SVG}path") if p.get("class") == "bracket"]
    tops = [float(re.search(r"M[\d.]+ ([\d.]+)", d)[1]) for d in brackets]
    bottoms = [float(re.search(r"V([\d.]+)", d)[1]) for d in brackets]
    rows = [(float(mark.get("cy")), "control" in mark.get("class")) for _, mark, _ in marks(svg)]
    assert len(brackets) == 2
    assert all((y < min(tops)) if control else (max(tops) < y < min(bottoms)) for y, control in rows)
    controls = [base for base, planned in PLANNED.items() if planned[1] == "control"]
    kept = [m for m in study["models"] if m["id"] not in controls and m["base"] not in controls]
    svg = parsed({**study, "models": kept})
    assert not [p for p in svg.iter(f"{SVG}path") if p.get("class") == "bracket"]
    assert "Brackets" not in " ".join(texts(svg))


def test_no_number_where_too_little_was_lost(study):
    drawn = figure.picture(study)
    assert "2 repairs: too little was lost to divide by" in drawn and "140.0 %" not in drawn
    study = json.loads(json.dumps(study))
    for m in study["models"]:
        m["intervals"].pop("displaced", None)
    assert marks(parsed(study)) == [] and "8 repairs" not in texts(parsed(study))


def test_off_the_axis_is_an_arrow(study):
    study = json.loads(json.dumps(study))
    far = next(m for m in study["models"] if m["id"] == "rtn-3+prompt 8")
    for value, side in ((9.0, 1), (-4.0, -1)):
        far["metrics"]["displaced"], far["intervals"]["displaced"] = value, [value - 1, value + 1]
        title, mark, ci = next(m for m in marks(parsed(study)) if m[0].startswith("prompt 8, displaced")
                               and f"{abs(100 * value):.1f}" in m[0])
        x, tip = (float(v) for v in re.match(r"M([\d.]+) [\d.]+L([\d.]+)", mark.get("d")).groups())
        assert mark.tag == f"{SVG}path" and (tip - x) * side > 0
        assert x == figure.PANELS["displaced"][side > 0]


def test_nothing_leaves_the_picture_or_is_too_small(study):
    """At 360 pixels a unit is 0.857 pixels: text of 11.5 units is 10 pixels high, and all of it lies inside."""
    svg = parsed(study)
    _, _, width, height = (float(v) for v in svg.get("viewBox").split())
    sizes = [float(v) for v in re.findall(r"(?:font|font-size): ([\d.]+)px", figure.STYLE)]
    assert len(sizes) == 3 and min(sizes) * 360 / width > 9.8
    for text in svg.iter(f"{SVG}text"):
        x, y, string = float(text.get("x")), float(text.get("y")), "".join(text.itertext())
        long = (7.4 if "small" not in text.get("class", "") else 6.2) * len(string)
        start = {"middle": x - long / 2, "end": x - long}.get(text.get("text-anchor"), x)
        assert start >= -1 and start + long <= width + 12 and 0 < y <= height, string
    drawn = figure.picture(study).replace("http://www.w3.org/2000/svg", "")
    assert "http" not in drawn and "<script" not in drawn
    assert "@media screen and (prefers-color-scheme: dark)" in figure.STYLE


def test_what_nothing_tested_is_drawn_hollow(study):
    study = json.loads(json.dumps(study))
    for m in study["models"]:
        m.pop("confirmed", None)
    assert all("hollow" in mark.get("class") for title, mark, _ in marks(parsed(study)) if ", displaced" in title)


def test_names_are_text(study):
    study = json.loads(json.dumps(study))
    study["models"][1]["tag"] = "<b>&\ud800\x07\uffff"
    assert "<b>&���" in texts(parsed(study))


def test_the_job_writes_a_file_or_says_why(study, tmp_path, capsys):
    results = written(tmp_path, study, [])
    figure.main(["--results", str(results), "--out", str(tmp_path / "f.svg")])
    assert (tmp_path / "f.svg").read_text(encoding="utf-8") == figure.picture(study)
    rest = '"operations": [], "metrics": []}'
    for content, expected in (("{", "is not complete JSON"), ('{"models": 1, ' + rest, "must be a list"),
                              ('{"models": [{"id": "a", "metrics": {}}], ' + rest, "nothing to draw")):
        results.write_text(content)
        with pytest.raises(SystemExit) as stop:
            guard(lambda: figure.main(["--results", str(results), "--out", str(tmp_path / "g.svg")]), "study figure")
        said = capsys.readouterr().err
        assert stop.value.code == 2 and expected in said and said.count("\n") == 1
    assert not (tmp_path / "g.svg").exists()


# ---- the committed picture and the tables of docs/evidence.md, without a run

NUMBERS = r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]( \*)?"


def drawn_numbers(svg):
    """{(model, "displaced" or "re-learned"): [value, low, high]} in percent, as the titles of a picture's dots say."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(SVG + "g"):
        said = group.find(SVG + "title").text.replace("−", "-")
        panel, *numbers = re.search(r", (displaced|re-learned) (\S+) % \((\S+) % to (\S+) %\)$", said).groups()
        found[group.get("data-model"), panel] = [float(x) for x in numbers]
    return found


def tables_of(text):
    """Every Markdown table of a text: [head, *rows], each a list of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    tables = [[[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()] for block in blocks]
    return [[head, *rows] for head, _, *rows in tables]


def printed_numbers(evidence):
    """The same of the two sections on controls (a row a repair) and on compressors (a column a compressor); and
    {model: whether it has the * of a confirmed gain}."""
    found, confirmed = {}, {}

    def add(base, repair, panel, cell, star=None):
        model = f"{slug(re.sub(r'[(].*', '', base))}-{slug(repair.removesuffix(' *'))}"
        *numbers, marked = re.fullmatch(NUMBERS, cell).groups()
        found[model, panel] = [float(x) for x in numbers]
        if panel == "displaced":
            confirmed[model] = bool(marked) if star is None else star
    known, compressed = (evidence.split(f"<!-- {name} table -->")[1].split(f"<!-- /{name} table -->")[0]
                         for name in ("controls", "compressors"))
    (_, *rows), = tables_of(known)
    for base, repair, _, displaced, relearned in rows:
        add(base, repair, "displaced", displaced, repair.endswith("*"))
        add(base, repair, "re-learned", relearned)
    for (head, *rows), panel, first in zip(tables_of(compressed), ("displaced", "re-learned"), (2, 1)):
        for repair, *cells in rows:
            if not repair.startswith("held-out recall"):
                for base, cell in zip(head[first:], cells[first - 1:]):
                    add(base, repair, panel, cell)
    return found, confirmed


def test_the_committed_picture_shows_the_numbers_of_the_tables():
    """Whatever is drawn in docs/repairs.svg stands in docs/evidence.md: the same numbers, filled where it has a *."""
    svg = (ROOT / "docs/repairs.svg").read_text(encoding="utf-8")
    drawn, evidence = drawn_numbers(svg), (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    printed, confirmed = printed_numbers(evidence)
    assert len(drawn) == 2 * (4 * 2 + 4 * 6)
    assert {key: printed.get(key) for key in drawn} == drawn
    filled = {g.get("data-model"): "hollow" not in g[1].get("class")
              for g in ElementTree.fromstring(svg).iter(SVG + "g") if ", displaced " in g.find(SVG + "title").text}
    assert {model: confirmed[model] for model in filled} == filled


def test_a_table_of_other_numbers_would_be_noticed():
    """The reader of the tables sees each digit, the sign and the *."""
    text = """<!-- controls table -->
| control | repair | recall | displaced % | re-learned % |
|---|---|---|---:|---:|
| not yet told (0) | prompt 8 * | 2.7, 97.3, 2.3 | -0.4 [-2.2, 1.3] | 10.1 [-1.0, 3.5] |
<!-- /controls table -->
<!-- compressors table -->
| repair | parameters | A 3 bits | B |
|---|---:|---:|---:|
| held-out recall |  | 70.8 [64.5, 77.2] | 47.0 [43.2, 50.8] |
| biases | 768 | 63.2 [56.9, 69.4] * | 4.5 [-1.0, 9.0] |

| repair | A 3 bits | B |
|---|---:|---:|
| biases | 4.9 [1.8, 7.9] | 4.0 [1.0, 7.0] |
<!-- /compressors table -->
"""
    assert printed_numbers(text) == (
        {("not-yet-told-prompt-8", "displaced"): [-0.4, -2.2, 1.3],
         ("not-yet-told-prompt-8", "re-learned"): [10.1, -1.0, 3.5],
         ("a-3-bits-biases", "displaced"): [63.2, 56.9, 69.4], ("b-biases", "displaced"): [4.5, -1.0, 9.0],
         ("a-3-bits-biases", "re-learned"): [4.9, 1.8, 7.9], ("b-biases", "re-learned"): [4.0, 1.0, 7.0]},
        {"not-yet-told-prompt-8": True, "a-3-bits-biases": True, "b-biases": False})


def test_a_picture_is_never_written_over_its_numbers(tmp_path):
    path = written(tmp_path, *with_everything(people=2))
    before = path.read_bytes()
    (tmp_path / "link.json").symlink_to(path)
    for job, given in ((figure.main, "--out"), (page.main, "--out")):
        for out in (path, tmp_path / "link.json", *([tmp_path / "predictions.jsonl"] if job is page.main else [])):
            with pytest.raises(ValueError, match="which is read"):
                job(["--results", str(path), given, str(out)])
    assert path.read_bytes() == before


def test_numbers_in_a_picture_are_read_as_they_were_drawn():
    study, _ = with_everything(people=2)
    drawn = drawn_numbers(figure.picture(study))
    for m in study["models"]:
        if m.get("kind") == "repaired" and m["intervals"]["displaced"][0] is not None:
            value = [m["metrics"]["displaced"], *m["intervals"]["displaced"]]
            assert drawn[m["id"], "displaced"] == [pytest.approx(100 * x, abs=0.051) for x in value]


@pytest.mark.parametrize("ends, sure", [([0.1, 0.3], True), ([-0.3, -0.1], True), ([-0.1, 0.1], False)])
def test_relearned_is_hollow_only_where_its_interval_holds_0(ends, sure):
    model = {"id": "m", "metrics": {"displaced": 0.5, "relearned": sum(ends) / 2},
             "intervals": {"displaced": [0.4, 0.6], "relearned": ends}}
    displaced, relearned = [part for part in figure.row(model, {"id": "b"}, True, 10) if "circle" in part]
    assert "hollow" not in displaced and ("hollow" not in relearned) == sure
