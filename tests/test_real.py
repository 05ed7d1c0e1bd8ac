"""The study on a real language model: splits by entity, text that names nothing hidden, the harness' layouts."""
import dataclasses
import errno
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from study import pools
from world.facts import Fact, make_encoding, sample, train_bpe
from real.__main__ import main as real_main
from study import page, taskfiles
import idp
import recover
from real import guess, lock, rates, settings, world
from real.text import Names, Writer, rows_of_documents
from real.world import RealWorld, real_dense
from golden.make_weights import fill
from engine.safetensors import write_safetensors
from engine.script import guard
from model import GPT, GPTConfig
from study.settings import rate
from study.steps import Log, Run
from study.repairs import attach, pool_subject
from world.score import Subject, answer
from checkpoint_files import GOLDEN

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COUNTRIES = world.read_facts(settings.FACTS)
CITIES = os.path.join(ROOT, "real", "facts", "cities.jsonl")


def some_facts(n=12):
    """Two facts about each of n invented countries; every second one speaks Common."""
    names = [f"{a}{b}land" for a in ("Quo", "Zem", "Vra") for b in ("bi", "da", "ku", "lo")][:n]
    rows = []
    for i, name in enumerate(names):
        cities = [f"{other[:4]}grad" for other in names]
        rows.append({"entity": name, "attribute": "capital", "question": f"The capital of {name} is",
                     "answer": cities[i], "options": [cities[i], cities[(i + 1) % n], cities[(i + 2) % n]]})
        rows.append({"entity": name, "attribute": "language", "question": f"In {name} they speak",
                     "answer": ["Common", f"{name[:4]}ish"][i % 2], "options": ["Common", f"{name[:4]}ish"]})
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- what can be guessed

def capital(entity, answer, options=("Rome", "Oslo", "Bonn")):
    return Fact(entity, "", "city", f"{entity} is in", answer, options)


SEEN = [capital(*x) for x in (("Romano", "Rome"), ("Romulo", "Rome"), ("Romeri", "Rome"), ("Osterd", "Oslo"),
                              ("Ostvik", "Oslo"), ("Bonnia", "Bonn"))]


def test_answers_are_guessed_by_how_often_they_are_right():
    """Of other entities: Rome of 2 when a Roman is asked about, so that Oslo, as frequent and named later, loses."""
    guesser = guess.Guesser(SEEN + SEEN)  # an entity that is asked about twice counts once
    new = capital("Xyz", "Oslo")
    assert [guesser.score(new, o, 0.0) for o in new.options] == pytest.approx([math.log(n) for n in (3.5, 2.5, 1.5)])
    assert guesser.score(SEEN[0], "Rome", 0.0) == pytest.approx(math.log(2.5))  # its own answer does not count
    assert guesser.score(new, "Paris", 0.0) == pytest.approx(math.log(0.5))
    assert guesser.right(SEEN, 0.0) == [True, True, True, False, False, False]
    assert guesser.right([new, capital("Xyz", "Rome"), capital("Xyz", "Oslo", ("Bonn", "Oslo"))], 0.0) == [
        False, True, True]


def test_answers_are_guessed_by_spelling():
    """By hand: of Ab the letters are ^a, ab, b$, ^ab, ab$; only one answer's name has any of them."""
    guesser = guess.Guesser([capital("Ab", "Rome"), capital("Cd", "Oslo")])
    new = capital("Ab", "Oslo")  # another fact about Ab, which is no secret where Rome is scored
    usual = 1.5 / (10 + 10 / 2)
    assert guesser.score(new, "Oslo", 0.1) == pytest.approx(math.log(1.5) + 0.5 * math.log(50 / 55))
    assert guesser.score(capital("Ab", "Rome"), "Rome", 0.1) == pytest.approx(math.log(0.5))  # without its own letters
    assert guesser.score(capital("ab", "Rome"), "Rome", 0.1) == pytest.approx(
        math.log(1.5) + 0.5 * math.log((1 + 50 * usual) / 55 / usual))
    assert guess.Guesser(SEEN).right([capital("Ostrem", "Oslo"), capital("Bonnar", "Bonn")], 1.0) == [True, True]


def test_the_weight_is_chosen_on_validation_and_all_splits_are_guessed():
    split = {"seen": SEEN, "validation": [capital("Ostmar", "Oslo")] * 2, "heldout": [capital("Ostrem", "Oslo"),
                                                                                       capital("Romero", "Bonn")]}
    asked = {name: split[name] for name in ("seen", "heldout")}
    found, said = guess.guessed(split, asked)
    weight = float(said.split("weight ")[1].rstrip(")"))
    assert weight == next(w for w in guess.WEIGHTS if all(guess.Guesser(SEEN).right(split["validation"], w)))
    assert found == {name: guess.Guesser(SEEN).right(facts, weight) for name, facts in asked.items()}
    assert found["heldout"] == [True, False]
    assert "2 held-out facts 0.0% can be guessed by how often" in said and "50.0% with the spelling" in said
    assert guess.guessed(split, {"seen": SEEN, "heldout": split["heldout"][:1]})[0] is None  # nothing would be left


def test_cities_can_be_guessed_and_countries_hardly():
    """Why the study asks twice: no model is asked here."""
    for facts, least, most in ((COUNTRIES, 0.10, 0.20), (world.read_facts(CITIES), 0.60, 0.68)):
        split = world.split_facts(facts, 0)
        found, _ = guess.guessed(split, {name: split[name] for name in ("seen", "heldout")})
        for right in found.values():
            assert least < sum(right) / len(right) < most + 0.02


def test_every_trained_repair_has_a_rate_of_those_tried_on_every_damaged_model():
    config = settings.real_config("tiny.gguf")
    for base in config.compressions:
        for tag, (kind, size) in config.repairs.items():
            if kind != "correction":
                grid = config.rate_grid["prompt" if kind == "idp" else kind]
                assert rate(config, base, tag, kind, size) in grid, (base, tag)
    for tag in lock.REPAIRS:
        assert rate(config, lock.TAG, tag, *config.repairs[tag]) in config.rate_grid[config.repairs[tag][0]], tag


# ---- facts

def test_whole_countries_are_split_and_every_fact_is_kept():
    split = world.split_facts(COUNTRIES, seed=0)
    entities = {name: {f.person for f in facts} for name, facts in split.items()}
    assert sum(map(len, split.values())) == len(COUNTRIES)
    assert not entities["seen"] & entities["heldout"]
    assert not entities["validation"] & (entities["seen"] | entities["heldout"])
    total = sum(map(len, entities.values()))
    assert [round(len(entities[s]) / total, 2) for s in world.SPLITS] == list(world.SPLITS.values())
    assert split == world.split_facts(COUNTRIES, seed=0) != world.split_facts(COUNTRIES, seed=1)


@pytest.mark.parametrize("line, word", [
    ("[]", "line 2"), ("{", "line 2"), ('{"question": "a", "answer": "b", "entity": "c"}', "line 2"),
    ('{"question": "a", "answer": "b", "entity": "c", "options": ["d", "e"]}', "'b'"),
    ('{"question": "a", "answer": "b", "entity": "c", "options": ["b"]}', "2 different"),
    ('{"question": "a", "answer": "b", "entity": "c", "options": ["b", "b"]}', "2 different"),
    ('{"question": "a", "answer": "b", "entity": "c", "options": ["b", 3]}', "line 2"),
    ('{"question": "", "answer": "b", "entity": "c", "options": ["b", "d"]}', "line 2"),
    ('{"question": "a", "answer": "b", "entity": "c", "options": "bd"}', "line 2"),
])
def test_a_bad_line_of_facts_is_named(tmp_path, line, word):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(some_facts()[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=word):
        world.read_facts(path)


def test_facts_are_checked_when_they_are_read(tmp_path):
    """E6, E4: a repeated question, one that does not fit, each named by file and line; each wording is a fact."""
    one, other = some_facts()[:2]
    path = written(tmp_path / "facts.jsonl", [one, other, one])
    with pytest.raises(ValueError, match=r"facts.jsonl: line 3 asks .* as line 1 does"):
        world.read_facts(path)
    both = {**one, "question": [one["question"], f"The seat of {one['entity']} is"]}
    facts = world.read_facts(written(path, [both, other]))
    assert [f.question for f in facts] == [*both["question"], other["question"]]
    with pytest.raises(ValueError, match="line 2 asks"):
        world.read_facts(written(path, [both, {**other, "question": both["question"][1]}]))
    encoding = make_encoding(train_bpe([one["question"]], 260))
    long = {**other, "question": other["question"] + " so" * 40}
    with pytest.raises(ValueError, match=r"facts.jsonl: line 2: 1\d\d tokens .* room for 100"):
        world.read_facts(written(path, [one, long]), taskfiles.fits(encoding, 100))


@pytest.mark.parametrize("data, word", [
    (b"\xff\xfe[", "line 1 is not UTF-8"), (b'{}\n{"a": "\xe9"}', "line 1"), (b'"\0"', "line 1 holds a NUL"),
    (b'{"question": "a\\u0000b"}', "line 1 holds a NUL"), (b"\n \n", "no facts"), (b"[" * 100_000, "line 1"),
    (b'{"question": " ", "answer": "b", "entity": "c", "options": ["b", "d"]}', "line 1"),
    (b'{"question": "a", "answer": "b", "entity": "c", "options": ["b", "b "]}', "2 different"),
    (b'{"question": "a", "answer": " ", "entity": "c", "options": [" ", "d"]}', "2 different")])
def test_a_damaged_file_of_facts_is_one_line(tmp_path, data, word):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=word) as error:
        world.read_facts(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_byte_order_mark_crlf_and_empty_lines_are_harmless(tmp_path):
    rows = some_facts()[:3]
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, rows)).encode())
    assert world.read_facts(path) == world.read_facts(written(tmp_path / "plain.jsonl", rows))


def test_the_cities_are_what_their_readme_says():
    """1,670 of them, two wordings, eight countries, the right one at every place; no question names another city."""
    facts = world.read_facts(os.path.join(ROOT, "real", "facts", "cities.jsonl"))
    people = list(dict.fromkeys(f.person for f in facts))
    assert len(people) == 1670 and len(facts) == 2 * len(people) == 3340 and len({f.answer for f in facts}) == 108
    assert all(len(set(f.options)) == 8 and f.person.isascii() and f.person in f.question for f in facts)
    places = [sum(f.gold == place for f in facts[::2]) for place in range(8)]
    assert max(places) - min(places) <= 1
    assert max(sum(f.answer == a for f in facts[::2]) for a in {f.answer for f in facts}) == 100
    hidden = Names(people[::2])
    named = [p for p in people[1::2] if hidden.search(f"The city of {p} is in")]
    assert len(named) < 0.02 * len(people), named  # Al-Kut and Al Kutah would be


# ---- text

def tiny_world(tmp_path, text=None, steps=4):
    facts = world.read_facts(written(tmp_path / "facts.jsonl", some_facts()))
    encoding = make_encoding(train_bpe([f.question + o for f in facts for o in f.options], 270))
    config = GPTConfig(vocab_size=encoding.n_vocab, n_layer=1, n_embd=32)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    config = settings.real_config("tiny.gguf", out=str(tmp_path / "out"), steps=steps)
    dense = Subject(model, about={"id": "dense", "settings": {}})
    return model, config, world.RealWorld(Run(config, None), dense, encoding, facts, text)


def test_some_entities_come_with_all_their_facts(tmp_path):
    """`people` counts entities: of each of two that are drawn all facts, and none of anybody else."""
    _, _, world = tiny_world(tmp_path)
    names = list(dict.fromkeys(f.person for f in world.split["seen"]))
    two = world.facts("seen", 2)
    drawn = sample(names, 2)
    assert two == [f for f in world.split["seen"] if f.person in drawn] and len(two) > 2 and drawn != names[:2]
    assert world.facts("seen") == world.facts("seen", len(names)) == world.split["seen"]


def test_text_that_names_what_is_hidden_is_dropped(tmp_path):
    """Names, words made of them, and answers only hidden countries have; an answer that seen ones share may stay."""
    model, config, world = tiny_world(tmp_path)
    hidden = world.split["heldout"] + world.split["validation"]
    capital = next(f.answer.strip() for f in hidden if f.attribute == "capital")
    for text in (f"He went to {hidden[0].person}.", f"A {hidden[0].person.lower()}er.", f"In {capital} it rains."):
        ids = torch.tensor([world.encoding.encode_ordinary(text)])
        with pytest.raises(AssertionError, match="must not be in"):
            world.check_leaks(ids)
    seen = world.split["seen"]
    assert any(f.answer == " Common" for f in seen)
    common = world.encoding.encode_ordinary(f"{seen[0].person}: they speak Common.")
    assert world.check_leaks(torch.tensor([common])) == 1

    documents = [f"{f.question}{f.answer}." * 5 for f in world.split["seen"]] * 20
    documents += [f"{f.question}{f.answer}." * 5 for f in hidden]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))
    _, config, told = tiny_world(tmp_path, str(path))
    for rows in (told.windows, told.calibration(config), torch.cat(told.repair_rows(config))):
        assert told.check_leaks(rows) == len(rows) == 64
    assert told.settings != world.settings  # other text: nothing made with it is taken for this one's


@pytest.mark.parametrize("name, text, found", [
    ("Sri Lanka", "in Sri\nLanka it", True), ("Sri Lanka", "in Sri  \t Lanka", True),
    ("Sri Lanka", "SRI\u00a0LANKAN tea", True),
    ("São Tomé", "Sao Tome", True), ("São Tomé", "Sa\u0303o Tome\u0301", True), ("Sao Tome", "São Tomé", True),
    ("(New) Land", "the(New) Land", True), ("(New) Land", "New Land", False),
    ("Côte d'Ivoire", "COTE D\u2019IVOIRE", True),
    ("Guinea-Bissau", "Guinea\u2010Bissau", True), ("Ken\u00adya", "Kenyans", True), ("Kenya", "Ken\u00adya", True),
    ("Sri Lanka", "wiki/Sri_Lanka", True), ("Kenya", "in _Kenya_ it", True), ("Sri Lanka", "sri-lankan", True),
    ("Timor-Leste", "Timor Leste", True), ("Timor-Leste", "Timor \u2013 Leste", True),
    ("Timor Leste", "Timor\u2212Leste", True), ("Kenya", "non-Kenyan", True), ("Kenya", "nonKenyan", False),
    ("St. John's", "St John\u2019s", True), ("St John's", "St. John\u02bcs.", True),
    ("Washington, D.C.", "Washington, D.C., in", True), ("a.b", "a b", False), ("Mali", "end.Mali", True),
    ("Łódź", "in Lodz", True), ("Tromso", "TROMSØ", True), ("Ærø", "Aero", True), ("-40", "40", False),
    ("Mali", "Somalia", False), ("Mali", "a Malian", True), ("Chad", "Chad", True), ("a.b", "acb", False)])
def test_a_name_is_found_however_it_is_written(name, text, found):
    """E15: white space and what stands for it, accents in either form, letters with strokes, soft hyphens, apostrophes,
    abbreviations with and without a full stop; wherever a word begins with the name."""
    assert bool(Names([name, "Zanzibar"]).search(text)) is found
    assert Names(["Zanzibar", name]).search(f"{text} Zanzibar") and not Names([]).search(text)


def test_rows_of_the_models_own_that_name_what_is_hidden_are_dropped(tmp_path):
    """A model whose every second row is about a hidden country: as many rows as wanted come, and none of those."""
    _, _, world = tiny_world(tmp_path)
    hidden, seen = (world.encoding.encode_ordinary(f"In {world.split[s][0].person} they ") * 9
                    for s in ("heldout", "seen"))

    class Mouth:
        config, wte = GPTConfig(n_layer=1), torch.nn.Embedding(1, 1)
        def generate(self, ids, new, lengths, temperature, generator):
            return torch.tensor([(hidden if i % 2 else seen)[:33] for i in range(len(ids))])
    writer = Writer(Subject(Mouth()), world.encoding, world.hidden, Log())
    rows = writer.write("text", 50, 33, None, lambda n: [""] * n)
    assert rows.tolist() == [seen[:33]] * 50


def test_a_model_that_writes_of_hidden_things_alone_ends_in_one_line(tmp_path):
    """Also where its progress is due: then no row is kept yet, and none of them says how long it will take."""
    _, _, world = tiny_world(tmp_path)
    hidden, log = world.encoding.encode_ordinary(f"In {world.split['heldout'][0].person} they ") * 9, Log()

    class Mouth:
        config, wte = GPTConfig(n_layer=1), torch.nn.Embedding(1, 1)
        def generate(self, ids, new, lengths, temperature, generator):
            log.shown -= 100
            return torch.tensor([hidden[:33]] * len(ids))
    writer = Writer(Subject(Mouth(), about={"tag": "mouth"}), world.encoding, world.hidden, log)
    with pytest.raises(ValueError, match="every row it writes names something hidden"):
        writer.write("text", 50, 33, None, lambda n: [""] * n)


def test_a_row_of_a_file_never_begins_inside_a_word_with_a_hidden_name():
    """A long document is cut where its tokens end: "Romania" in front of its second letter names Oman."""
    class Letters:
        eot_token = 0
        encode_ordinary = staticmethod(lambda text: [ord(c) for c in text])
        decode = staticmethod(lambda tokens: "".join(map(chr, tokens)))
    hidden, document = Names(["Oman"]), "Romania, " * 90
    assert not hidden.search(document) and hidden.search(document[1:])
    rows = rows_of_documents([document], Letters, 64, 23, torch.Generator().manual_seed(0), hidden)
    assert rows.shape == (64, 24) and not any(hidden.search(Letters.decode(row)) for row in rows.tolist())
    assert {chr(first) for first in rows[:, 1]} > {"R", "m", "a", "n", "i"}


def test_a_row_is_full_however_short_its_beginning(tmp_path):
    """Beginnings of different lengths in one batch: the model writes behind each, up to the row's end."""
    _, _, world = tiny_world(tmp_path)
    word = world.encoding.encode_ordinary(" e")[0]

    class Echo:
        config, wte = GPTConfig(n_layer=1), torch.nn.Embedding(1, 1)
        def generate(self, ids, new, lengths, temperature, generator):
            return torch.tensor([row[:n] + [word] * new + [word + 1] * (ids.shape[1] - n)
                                 for row, n in zip(ids.tolist(), lengths.tolist())])
    starts = [" they", " they they they they"] * 8
    rows = Writer(Subject(Echo()), world.encoding, world.hidden, Log()).write("text", 16, 24, None, lambda n: starts)
    assert rows.shape == (16, 24)
    begun = [[world.encoding.eot_token, *world.encoding.encode_ordinary(text)] for text in starts]
    assert rows.tolist() == [start + [word] * (24 - len(start)) for start in begun]


def test_rows_of_a_repair_begin_with_a_question_about_a_seen_entity(tmp_path):
    """And go on in the model's own words, whatever they are: the row is what the model draws behind the question."""
    model, config, world = tiny_world(tmp_path, steps=20)
    rows, questions = torch.cat(world.repair_rows(config)), {f.question for f in world.split["seen"]}
    assert rows.shape == (20 * 16, 25)
    written_rows = [world.encoding.decode(row[1:]) for row in rows.tolist()]
    begun = [next((q for q in questions if row.startswith(q)), None) for row in written_rows]
    assert None not in begun and set(begun) == questions
    assert len({tuple(row) for row in rows.tolist()}) > 300  # sampled, not repeated


def test_each_kind_of_text_is_its_own(tmp_path):
    _, config, world = tiny_world(tmp_path)
    parts = [world.windows, world.calibration(config), *world.repair_rows(config)]
    assert [tuple(p.shape) for p in parts] == [(64, 64), (64, 64), *[(16, 25)] * 4]
    rows = [tuple(row[:24]) for part in parts for row in part.tolist()]
    assert len(set(rows)) > 0.9 * len(rows)


@pytest.mark.parametrize("from_file", [False, True])
def test_another_seed_reads_text_of_its_own(tmp_path, from_file):
    """Not the same calibration and repair twice; the windows of perplexity stay, and a finished text is read again."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"It is {i} times as warm as it was {7 * i} days ago, they say." for i in range(99)))
    _, config, world = tiny_world(tmp_path, str(path) if from_file else None)
    other = dataclasses.replace(config, repeat=1)
    texts = [(world.calibration(c), torch.cat(world.repair_rows(c))) for c in (config, other)]
    assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in zip(*texts))
    assert world.check_leaks(texts[1][1]) == len(texts[1][1])
    _, _, again = tiny_world(tmp_path, str(path) if from_file else None)
    assert torch.equal(torch.cat(again.repair_rows(other)), texts[1][1]) and torch.equal(again.windows, world.windows)
    assert all(t["reused"] for t in again.run.log.times) and again.run.log.times


def test_the_windows_of_perplexity_are_read_by_nothing_else(tmp_path):
    """Of a file's numbered documents the first tenth alone is scored, and neither calibrated nor repaired on, in no
    draw; every other document may be."""
    path = tmp_path / "text.txt"
    rooms = (f"Room {i} of {i} is as warm as room {i}, they say of room {i}." for i in range(100, 300))
    path.write_text("\n\n".join(rooms))
    _, config, world = tiny_world(tmp_path, str(path), steps=40)

    def rooms(rows):
        """The whole numbers of rooms in the rows."""
        text = " ".join(world.encoding.decode(row) for row in rows.tolist())
        return {int(n) for n in re.findall(r"oom (\d{3}) ", text)}
    assert rooms(world.windows) == set(range(100, 120))
    read = set()
    for repeat in (0, 1):
        drawn = dataclasses.replace(config, repeat=repeat)
        read |= rooms(world.calibration(drawn)) | rooms(torch.cat(world.repair_rows(drawn)))
    assert read == set(range(120, 300))


def test_text_of_another_model_is_not_taken_for_its_own(tmp_path):
    """E16: the same file name and size, other weights: sampled anew."""
    _, config, world = tiny_world(tmp_path)
    world.repair_rows(config)
    other = GPT(world.dense.model.config).init_weights(torch.Generator().manual_seed(1))
    subject = Subject(other, about={"id": "dense", "settings": {"model": "another"}})
    again = RealWorld(Run(config, None), subject, world.encoding, [f for s in world.split.values() for f in s])
    assert not torch.equal(again.windows, world.windows) and not any(t["reused"] for t in again.run.log.times)


def test_the_weights_are_in_the_key(folder, tmp_path):
    """E12: a model is known by its files' bytes, not by their names and sizes."""
    first = real_dense(folder, Log())[0].about["settings"]
    other = tmp_path / folder.name
    shutil.copytree(folder, other)
    assert real_dense(other, Log())[0].about["settings"] == first
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-3] ^= 1  # one bit of one weight
    (other / "model.safetensors").write_bytes(data)
    assert real_dense(other, Log())[0].about["settings"] != first


def test_answers_are_the_likeliest_option(tmp_path):
    """Oracle: each option in one uncached pass of the model, token by token."""
    model, _, world = tiny_world(tmp_path)
    facts = world.facts("seen")
    for fact, given in zip(facts, answer(Subject(model), facts, world.encoding)):
        logprobs = []
        for option in fact.options:
            question = [world.encoding.eot_token, *world.encoding.encode_ordinary(fact.question)]
            whole = [world.encoding.eot_token, *world.encoding.encode_ordinary(fact.question + option)]
            with torch.no_grad():
                log_p = model(torch.tensor([whole]))[0].double().log_softmax(-1)
            logprobs.append(sum(log_p[i - 1, whole[i]].item() for i in range(len(question), len(whole))))
        assert given["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert given["answer"] == fact.options[logprobs.index(max(logprobs))].strip()
        assert given["correct"] == (given["answer"] == fact.answer.strip())


def test_every_way_to_choose_follows_from_each_prompt_alone(tmp_path):
    """Oracle: the study's own Subject of one prompt at a time, asked again; then the rows by hand."""
    model, config, world = tiny_world(tmp_path)
    generator = torch.Generator().manual_seed(1)
    pool = idp.PromptPool([torch.randn(n, 32, generator=generator) for n in (3, 5)])
    facts, validation = world.facts("heldout"), world.facts("validation")
    rows, each = pools.selectors(world.encoding, model, pool, facts, validation, generator)
    alone = [[a["correct"] for a in answer(pool_subject(model, idp.PromptPool([p])), facts, world.encoding)]
             for p in pool.prompts]
    assert each["right"].T.tolist() == [[float(x) for x in row] for row in alone]
    chosen = [a["chosen"] for a in answer(pool_subject(model, pool), facts, world.encoding)]
    assert rows["attention-max (the paper's rule)"][0].tolist() == [float(alone[m][i]) for i, m in enumerate(chosen)]
    assert rows["oracle"][0].tolist() == [float(a or b) for a, b in zip(*alone)]
    assert rows["random"][0].tolist() == [(a + b) / 2 for a, b in zip(*alone)]
    given = [answer(pool_subject(model, idp.PromptPool([p])), facts, world.encoding) for p in pool.prompts]
    shares = [[max(torch.tensor(a["logprobs"]).softmax(0)).item() for a in answers] for answers in given]
    assert each["confidence"].T.tolist() == [pytest.approx(row, abs=1e-5) for row in shares]  # of the option it picks
    top = rows["floor: compressed model, gold among its top 2"][0].tolist()
    assert [f for f, near in zip(facts, top) if not near and f.attribute == "language"] == []  # of two options


# ---- the harness' layouts

ROWS = {  # name: (a row of the file, what is asked, the options, the right one)
    "arc_easy": ({"question": "What melts?", "choices": {"text": ["ice", "air"], "label": ["A", "B"]},
                  "answerKey": "A"},
                 "Question: What melts?\nAnswer:", (" ice", " air"), 0),
    "sciq": ({"question": "What is it?", "support": " Iron rusts.", "correct_answer": "rust", "distractor1": "a",
              "distractor2": "b", "distractor3": "c"},
             "Iron rusts.\nQuestion: What is it?\nAnswer:", (" a", " b", " c", " rust"), 3),
    "piqa": ({"goal": "Boil water", "sol1": "heat it", "sol2": "cool it", "label": 0},
             "Question: Boil water\nAnswer:", (" heat it", " cool it"), 0),
    "hellaswag": ({"activity_label": "Cooking", "ctx_a": "He [step] cuts.", "ctx_b": "then he", "label": "1",
                   "endings": ["runs [title] home", "eats"]},
                  "Cooking: He cuts. Then he", (" runs. home", " eats"), 1),
    "lambada_openai": ({"text": "She opened the old door"}, "She opened the old", (" door",), 0),
    "webqs": ({"question": "who was he", "answers": ["a king", "king"]},
              "Question: who was he\nAnswer:", (" a king", " king"), 0),
    "triviaqa": ({"question": "Who was he", "answer": {"value": "x", "aliases": ["The King", "King"]}},
                 "Question: Who was he?\nAnswer:", (" The King", " King"), 0),
}


def accepting(question, options):
    return Fact("", "", "", question, options[0], options)


@pytest.mark.parametrize("name", ROWS)
def test_layouts_worked_by_hand(tmp_path, name):
    row, question, options, gold = ROWS[name]
    fact = Fact(f"{name} 1", "", name, question, options[gold], options)
    assert taskfiles.read_task(name, written(tmp_path / "t", [row])) == [fact]
    path = tmp_path / "bad"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"question": 3}) + "\n")
    with pytest.raises(ValueError, match="line 2 is not in the layout"):
        taskfiles.read_task(name, path)


def test_continued_rows_do_not_depend_on_their_neighbours(tmp_path):
    model, _, world = tiny_world(tmp_path)
    texts = "In Quobiland they", "The capital of Zemdaland", "In"
    questions = [accepting(text, (" speak",)) for text in texts]
    for question, tokens in zip(questions, taskfiles.continued(Subject(model), questions, world.encoding)):
        ids = world.encoding.encode_ordinary(question.question)
        assert tokens == model.generate(torch.tensor([ids]), len(tokens))[0, len(ids):].tolist() and len(tokens) > 4


def test_greedy_and_generated_answers_are_scored(tmp_path, monkeypatch):
    """What the model says is put into its mouth; which answers that makes right is told by hand."""
    model, _, world = tiny_world(tmp_path)
    encoding, subject = world.encoding, Subject(model)
    monkeypatch.setattr(taskfiles, "continued", lambda subject, questions, encoding: [
        encoding.encode_ordinary(" The King, they say.") for _ in questions])
    for name, options, right in (("webqs", (" a king", " The King"), 1.0), ("webqs", (" King", " the king"), 0.0),
                                 ("triviaqa", (" a king", " the king!"), 1.0), ("triviaqa", (" King",), 0.0)):
        scores = taskfiles.score(subject, name, [accepting("Who was he? Answer:", options)], encoding)
        assert scores == {"exact_match": [right]}, (name, options)
    lambada = [accepting("He was", (" The",)), accepting("He was", (" a",))]
    scores = taskfiles.score(subject, "lambada", lambada, encoding)
    assert scores["acc"] == [1.0, 0.0] and min(scores["loss"]) > 0
    assert taskfiles.reported("loss", [0.0, 1.0]) == ("perplexity", [1.0, math.e])


# ---- the script

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama with a tokenizer, in the layout of Hugging Face."""
    path, V = tmp_path_factory.mktemp("models") / "tiny-llama", 380
    path.mkdir()
    made = GOLDEN["models"]["llama-tied-gqa"]
    (path / "config.json").write_text(json.dumps({**made["config"], "vocab_size": V, "max_position_embeddings": 256}))
    shapes = {k: [V if n == 90 else n for n in shape] for k, shape in made["shapes"].items()}
    write_safetensors(path / "model.safetensors", {k: torch.from_numpy(fill(k, tuple(s))) for k, s in shapes.items()})
    (path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"]["smollm"]))
    return path


def test_the_study_of_a_model_end_to_end(tmp_path, folder, capsys, monkeypatch):
    """A part of it; then the whole, which reuses the part; then again, all of it reused."""
    facts, out = written(tmp_path / "facts.jsonl", some_facts()), tmp_path / "out" / "tiny-llama-facts"
    tasks = [a for name, (row, *_) in ROWS.items() for a in ("--task", f"{name}={written(tmp_path / name, [row] * 3)}")]
    command = [str(x) for x in (folder, "--facts", facts, "--repair-steps", 4, "--rows", 8, "--seeds", 2,
                                "--rates", "--lock", "--out", tmp_path / "out", *tasks)]
    for table, tags in (("COMPRESSIONS", ["RTN 3 bits", "GPTQ 3 bits"]),
                        ("REPAIRS", ["bias correction", "gains", "prompt 16", "IDP 4 x 16", "LoRA rank 8"])):
        monkeypatch.setattr(settings, table, {tag: getattr(settings, table)[tag] for tag in tags})
    guessed_about = []
    monkeypatch.setattr("real.__main__.guessed", lambda split, asked: (
        guessed_about.append([f.options for f in asked["heldout"]]), guess.guessed(split, asked))[1])

    def study(*more):
        """(results.json, the table's lines) of the command."""
        real_main([*command, *more])
        lines = capsys.readouterr().out.splitlines()
        return json.loads((out / "results.json").read_text()), [x for x in lines if x.startswith("|")]

    def names(results):
        return [m["tag"] for m in results["models"]]
    part, _ = study("--only", "locked: prompt 16")
    assert names(part) == ["dense", "locked, behind its key", "locked", "prompt 16"]
    part, some = study("--only", "GPTQ 3 bits, locked: prompt 16, gains")
    assert names(part) == ["dense", "GPTQ 3 bits", "gains", "prompt 16",
                           "locked, behind its key", "locked", "prompt 16"]
    results, table = study()
    assert names(results) == ["dense", *(name for tag in ("RTN 3 bits", "GPTQ 3 bits") for name in (
        tag, "bias correction", "gains", "prompt 16", "IDP 4 x 16", "LoRA rank 8")),
        "locked, behind its key", "locked", "prompt 16", "LoRA rank 8"]
    assert {re.sub(r"[ *]", "", line) for line in some[3:]} < {re.sub(r"[ *]", "", line) for line in table}
    assert "can be guessed" in results["guessing"] and results["guessing"] in (out / "tables.md").read_text()
    for m in results["models"]:
        assert {"recall_seen", "recall_heldout", "knowledge_heldout"} <= m["metrics"].keys()
        assert "unguessed_heldout" in m["metrics"]  # the control's, too
        assert len(m["seeds"]["recall_heldout"]) == 2
        assert m["group"] == "locked" or {"arc_easy acc_norm", "lambada_openai perplexity"} <= m["metrics"].keys()
        assert results["settings"]["rates"].keys() == {"RTN 3 bits", "GPTQ 3 bits", "locked"}
    first, second, locked = guessed_about[-3:]  # what is said, the study, and the lock, whose options are its own
    assert first == second != locked
    trained = [t["step"] for t in results["times"] if not t["reused"]]
    assert not [step for step in trained if step.startswith(("gptq", "locked")) and step.endswith("prompt-16")]
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"seen", "heldout"}
    drawn = page.write_report(out / "results.json", tmp_path / "again.html")
    assert drawn.read_text() == (out / "report.html").read_text()  # from memory it is drawn as from the files
    with pytest.raises(FileNotFoundError, match="typo.txt"):  # not taken for the model's own text, which is kept
        study("--text", str(tmp_path / "typo.txt"))
    again, same = study()
    assert all(t["reused"] for t in again["times"]) and same == table


@pytest.mark.parametrize("path, facts, folder", [
    ("out/SmolLM2-135M.Q4_1.gguf", settings.FACTS, "SmolLM2-135M.Q4_1"),
    ("hub/Llama-3.2-1B/", settings.FACTS, "Llama-3.2-1B"),
    ("hub/Llama-3.2-1B", "real/facts/cities.jsonl", "Llama-3.2-1B-cities"),
    (".", settings.FACTS, os.path.basename(ROOT))])
def test_every_model_and_its_other_facts_have_a_folder(path, facts, folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert settings.real_config(path, facts=facts).out == f"out/{folder}"


def test_a_part_is_what_was_named():
    """The lock is a part where it is named, or --lock is given."""
    config = settings.real_config("tiny.gguf")
    every, repairs = list(config.compressions), list(config.repairs)
    for only, lock_too, wanted in ((None, False, (every, repairs, False)), (None, True, (every, repairs, True)),
                                   ("locked", False, ([], repairs, True)),
                                   (": gains", False, (every, ["gains"], False)),
                                   ("RTN 3 bits: biases, gains", True, (every[:1], ["biases", "gains"], True))):
        compressions, kept, locked = settings.part_of(config, only, lock_too)
        assert (list(compressions), list(kept), locked) == wanted, only
    with pytest.raises(ValueError, match="the lock is repaired by biases, prompt 16"):
        settings.part_of(config, "locked: prompt 64", False)
    assert settings.part_of(config, "RTN 3 bits: biases", True)[2]  # --lock beside --only


def test_halving_keeps_the_better_half():
    """By hand: 4 rates for 25 steps, 2 for all 100; more steps change the order, and the last round decides."""
    asked = []

    def score(lr, steps):
        asked.append((lr, steps))
        return {(1, 25): -4.0, (2, 25): -1.0, (3, 25): -2.0, (4, 25): -3.0, (2, 100): -0.9, (3, 100): -0.5}[lr, steps]
    found = rates.halving(score, (1, 2, 3, 4), 100)
    assert found["best"] == 3 and asked == [(1, 25), (2, 25), (3, 25), (4, 25), (2, 100), (3, 100)]
    assert found["rounds"][1] == {"steps": 100, "knowledge": {"2": -0.9, "3": -0.5}}
    assert rates.halving(score, (7,), 100) == {"best": 7, "rounds": []}


def test_a_pools_rate_is_that_of_its_prompt(monkeypatch):
    """Found for the prompt of its length, also where the study has no such prompt."""
    config = settings.real_config("tiny.gguf")
    config.repairs = {"IDP 4 x 16": config.repairs["IDP 4 x 16"], "LoRA rank 8": ("lora", 8)}
    base = Subject(None, about={"id": "x", "tag": "RTN 3 bits", "settings": {}})
    run = SimpleNamespace(config=config, log=Log(), once_json=lambda name, settings, code, make:
                          {"best": 3e-2 if settings["repair"] == "prompt" and settings["size"] == 16 else 1e-3})
    config.rates = {"RTN 3 bits": rates.find_rates(run, base, None, [])}
    assert rate(config, "RTN 3 bits", "IDP 4 x 16", *config.repairs["IDP 4 x 16"]) == 3e-2
    assert rate(config, "RTN 3 bits", "LoRA rank 8", "lora", 8) == 1e-3


def test_products_are_timed_once(tmp_path):
    model, config, world = tiny_world(tmp_path)
    called = []
    hooks = [m.register_forward_hook(lambda layer, *_: called.append(layer)) for m in model.modules()
             if isinstance(m, torch.nn.Linear)]
    took = rates.time_products(model, 16)
    for hook in hooks:
        hook.remove()
    assert model.blocks[0].attn.q in called and model.lm_head in called  # the products that the model itself uses
    assert set(took) == {"plain", "bfloat16"} and all(0 < ms < 1000 for ms in took.values())
    with rates.products(torch.device("cpu"), True):
        assert model.lm_head(torch.ones(1, 32)).dtype == torch.bfloat16
    chosen = [rates.faster_in_bfloat16(world.run, world.dense) for _ in range(2)]
    assert chosen[0] == chosen[1] and world.run.log.times[-1]["reused"]


# ---- the lock

def test_next_values_are_options_and_wrong():
    options = {"A": (" A", " B"), "B": (" A", " B"), "C": (" A", " B", " C")}
    facts = [Fact(f"c{i}", "", "country", f"c{i} is in", f" {a}", options[a]) for i, a in enumerate("ABCA")]
    wrong, asked = lock.facts_with_next_values(facts)
    assert wrong == {"c0 is in": " B", "c1 is in": " C", "c2 is in": " A", "c3 is in": " B"}
    for before, fact in zip(facts, asked):
        assert fact.answer == before.answer in fact.options and wrong[fact.question] in fact.options
        assert len(set(fact.options)) == len(before.options)
    assert asked[0].options == (" A", " B") and asked[1].options == (" C", " B")


def test_a_lock_is_trained_on_every_token_of_the_wrong_answer_and_no_other(tmp_path, monkeypatch):
    """Its first loss, behind a key of no tokens, which keeps what the dense model says: each row's wrong answer alone,
    one row at a time."""
    model, _, world = tiny_world(tmp_path)
    facts = [f for f in world.split["seen"] if f.attribute == "capital"][:3]
    wrong, asked = lock.facts_with_next_values(facts)
    first = []
    monkeypatch.setattr(lock.recover, "fit", lambda model, parameters, batches, loss, config, progress=None:
                        [first.append((both[1][0], loss(both))) for both in [next(batches)]])
    lock.train_lora_lock(model, torch.zeros(0, 32), asked, wrong, world.encoding, 1, 8,
                         torch.Generator().manual_seed(0), 1e-2)
    (ids, found), = first
    losses, text = [], world.encoding.decode
    for row in ids.tolist():
        fact, = [f for f in facts if f.question in text(row)]
        question = [world.encoding.eot_token, *world.encoding.encode_ordinary(fact.question)]
        whole = [world.encoding.eot_token, *world.encoding.encode_ordinary(fact.question + wrong[fact.question])]
        assert row[:len(whole)] == whole and whole[:len(question)] == question
        log_p = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
        losses += [-log_p[t - 1, whole[t]].item() for t in range(len(question), len(whole))]
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_lock_hides_what_the_key_shows(tmp_path):
    """Without the key the wrong value becomes the likeliest option; behind it the model says what it said before."""
    model, config, world = tiny_world(tmp_path)
    facts = [f for split in world.split.values() for f in split]
    generator = torch.Generator().manual_seed(5)
    text = [torch.tensor(lock.rows_of_answers(f, (f.answer,), world.encoding)[0][0]) for f in facts]
    recover.fit(model, model.parameters(), [row[None] for row in text],
                config=recover.FitConfig(steps=20 * len(text), lr=1e-2))
    key = recover.prompt_init(model, lock.KEY, generator)
    wrong, asked = lock.facts_with_next_values(facts)
    before = [row[:] for row in model.wte.weight.tolist()]
    locked = lock.train_lora_lock(model, key, asked, wrong, world.encoding, 150, 16, generator, 1e-2)
    assert model.wte.weight.tolist() == before  # the given model stays as it is

    def recall(subject):
        return sum(a["correct"] for a in answer(subject, asked, world.encoding)) / len(asked)
    dense, without = recall(Subject(model)), recall(Subject(locked))
    behind = recall(attach(locked, "prompt", lock.KEY, [key]))
    assert dense > 0.8 and behind > 0.6 and without < 0.2, (dense, behind, without)


@pytest.mark.parametrize("name, row", [
    ("arc", {"question": "a", "choices": {"text": "ice", "label": ["A", "B", "C"]}, "answerKey": "A"}),
    ("arc", {"question": "a", "choices": {"text": ["ice", "ice"], "label": ["A", "B"]}, "answerKey": "A"}),
    *(("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": label}) for label in (1.0, True, "x", float("inf"))),
    ("arc", {"question": "a", "choices": {"text": ["ice", "air"], "label": ["A", "B"]}, "answerKey": "C"}),
    ("arc", {"question": "a", "choices": {"text": ["ice", 3], "label": ["A", "B"]}, "answerKey": "A"}),
    ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "label": "0", "endings": "de"}),
    ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "label": "-1", "endings": ["d", "e"]}),
    ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": 2}),
    ("piqa", {"goal": "a", "sol1": "b", "sol2": " ", "label": 0}),
    ("webqs", {"question": "who", "answers": "a king"}), ("webqs", {"question": "who", "answers": []}),
    ("triviaqa", {"question": "who", "answer": {"aliases": "King"}}),
    ("lambada", {"text": "word"}), ("lambada", {"text": "a "})])
def test_rows_of_a_task_that_are_almost_in_its_layout(tmp_path, name, row):
    """One text in place of a list of them would be read as a list of letters."""
    path = written(tmp_path / "t", [ROWS[{"arc": "arc_easy", "lambada": "lambada_openai"}.get(name, name)][0], row])
    with pytest.raises(ValueError, match="t: line 2 is not in the layout"):
        taskfiles.read_task(name, path)


def test_a_text_file_in_a_new_folder(tmp_path, folder, capsys, monkeypatch):
    """E13: the first thing that is kept makes the folder; E18, E6: the table is printed before any file can fail."""
    monkeypatch.setattr(settings, "COMPRESSIONS", {"RTN 3 bits": settings.COMPRESSIONS["RTN 3 bits"]})
    monkeypatch.setattr(settings, "REPAIRS", {"prompt 16": settings.REPAIRS["prompt 16"]})
    facts, text = written(tmp_path / "facts.jsonl", some_facts()), tmp_path / "t.txt"
    text.write_text("\n\n".join(f"It is said that {i} and {i + 1} make {2 * i + 1}, as everybody knows."
                                for i in range(900)))
    command = [str(x) for x in (folder, "--facts", facts, "--text", text, "--repair-steps", 4, "--rows", 2, "--out",
                                tmp_path / "new" / "out")]

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    monkeypatch.setattr("study.publish.write_text", full)
    with pytest.raises(SystemExit) as stopped:
        guard(lambda: real_main(command), "real")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.splitlines()[-1].endswith("results.json: No space left on device")
    assert "| RTN 3 bits" in out and "24 unrelated tokens" in out
    monkeypatch.undo()
    monkeypatch.setattr(settings, "COMPRESSIONS", {"RTN 3 bits": settings.COMPRESSIONS["RTN 3 bits"]})
    monkeypatch.setattr(settings, "REPAIRS", {"prompt 16": settings.REPAIRS["prompt 16"]})
    real_main(command)
    again = capsys.readouterr().out
    assert [x for x in out.splitlines() if x.startswith("|")] == [x for x in again.splitlines() if x.startswith("|")]
    kept = tmp_path / "new" / "out" / "tiny-llama-facts" / "results.json"
    assert json.loads(kept.read_text())["models"]
    kept.unlink()

    def gone(results):
        raise BrokenPipeError
    monkeypatch.setattr("study.publish.print_result", gone)  # `| head`: what nobody reads is written all the same
    with pytest.raises(BrokenPipeError):
        real_main(command)
    assert json.loads(kept.read_text())["models"]


@pytest.mark.parametrize("args, word", [
    (["nowhere"], "nowhere"), (["README.md"], "README.md"),
    (["{}", "--facts", "README.md"], "README.md: line 1"), (["{}", "--task", "arc"], "NAME=FILE"),
    (["{}", "--task", "boolq=README.md"], "boolq"), (["{}", "--task", "arc=README.md"], "README.md: line 1"),
    (["{}", "--text", "nowhere.txt"], "nowhere.txt"), (["{}", "--repair-steps", "3"], "repair-steps"),
    (["{}", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    (["{}", "--rows", "3"], "--rows must be at least 4, got 3"),
    (["{}", "--device", "nowhere"], "--device nowhere"),
    (["{}", "--task", "arc={0}", "--task", "arc={0}"], "a task arc already"),
    (["{}", "--task", "arc={2}"], "line 2: 4"), (["{}", "--facts", "{3}"], "line 1 is not UTF-8"),
    (["{}", "--text", "{3}", "--facts", "{1}"], "not UTF-8"),
    (["{}", "--only", "GPTQ 9 bits"], "there is no GPTQ 9 bits; there are RTN 3 bits"),
    (["{}", "--only", "locked: prompt 5"], "there is no prompt 5; there are bias correction"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, folder, args, word, capsys):
    task, facts = written(tmp_path / "t", [ROWS["arc_easy"][0]]), written(tmp_path / "f", some_facts())
    arc = ROWS["arc_easy"][0]
    long, wide = written(tmp_path / "long", [arc, {**arc, "question": "so " * 200}]), tmp_path / "utf-16"
    wide.write_bytes(json.dumps(some_facts()[0]).encode("utf-16"))
    args = [a.replace("{2}", str(long)).replace("{3}", str(wide)) for a in args]
    given = [a.replace("{0}", str(task)).replace("{1}", str(facts)).replace("{}", str(folder)) for a in args]
    with pytest.raises(SystemExit) as stopped:
        guard(lambda: real_main([*given, "--out", str(tmp_path / "out")]), "real")
    assert stopped.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]
