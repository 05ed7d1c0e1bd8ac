"""The items: what is asked is true, what is wrong is false, and nobody hidden is in a lesson; scores worked by hand."""
import math
import random
import re
from collections import Counter

import pytest
import torch

from world.facts import Fact, SPLITS, STATEMENTS, VALUES, WorldConfig, make_encoding, make_world, statements, train_bpe
from world.items import LESSONS, main
from world.items import TASKS, distinct, lessons, make_items, score_item
from model import GPT, GPTConfig
from world.score import Subject, answer, choose_option

PEOPLE = make_world(WorldConfig())
BY = {split: [p for p in PEOPLE if p.split == split] for split in SPLITS}
TOLD = [p for p in PEOPLE if p.split != "novel"]
WHO = {p.name: p for p in PEOPLE}
ITEMS = {(name, split): make_items(name, BY[split], TOLD, 200, 0)
         for name in TASKS for split in ("seen", "heldout", "novel")}
CHOICES = [name for name in TASKS if TASKS[name].by == "choose"]
every = pytest.mark.parametrize("name, split", ITEMS, ids="-".join)


@every
def test_200_different_items_a_split_about_its_people(name, split):
    """Novel people's pairs of facts often fit somebody told as well: there are 140 questions, not 200."""
    found = ITEMS[name, split]
    assert len(found) == 200 or (name, split) == ("reverse", "novel") and len(found) > 130
    assert len({item.question for item in found}) == len(found)
    assert {item.split for item in found} == {split} and all(WHO[item.person].split == split for item in found)
    assert len({item.person for item in found}) == len(found)  # one a person: items are independent
    assert all(item.question == item.question.strip() for item in found)


@pytest.mark.parametrize("name", ["four-way", "hard", "last word", "listed", "retrieval", "counterfactual"])
def test_a_persons_second_item_is_about_something_else(name):
    """Also where the number of people is a multiple of the number of attributes."""
    about = {}
    for item in make_items(name, BY["heldout"][:30], TOLD, 60, 0):
        about.setdefault(item.person, []).append(item.attribute)
    assert len(about) == 30 and all(len(set(two)) == len(two) == 2 for two in about.values())


READS = "listed", "retrieval", "counterfactual", "summary", "instructions"  # the question holds the answer


@every
def test_no_answer_stands_in_its_question(name, split):
    """E3, except where reading it there is the task; then all options stand there, or the text is asked about."""
    for item in ITEMS[name, split]:
        words = re.findall(r"\w+", item.question)
        if item.options is not None:
            standing = [option.strip(" .") in words for option in item.options]
            assert not any(standing) or ((name in READS) and all(standing))
        elif name not in READS:
            assert not set(re.findall(r"\w+", item.answer)) & set(words)


@pytest.mark.parametrize("name", CHOICES)
def test_gold_positions_are_balanced(name):
    """E5: of 200 items every position is right equally often, for each attribute too."""
    for split in ("seen", "heldout", "novel"):
        found = ITEMS[name, split]
        n = len(found[0].options)
        assert Counter(item.gold for item in found) == {i: 200 // n for i in range(n)}
        if name in ("four-way", "hard", "listed"):
            assert len(Counter((item.gold, item.attribute) for item in found)) == n * 5
        assert all(len(item.options) == len(set(item.options)) == n for item in found)
        assert all(option[0] == " " != option[1] for item in found for option in item.options)


def true_of(person, text):
    """Whether a sentence is true of a person: it ends in the value of the attribute that its phrasing tells."""
    return any(text == f"{phrase.format(person.name)} {person.values[a]}"
               for a in VALUES for phrase in STATEMENTS[a])


def test_gold_options_are_true_and_the_others_false():
    for (name, split), found in ITEMS.items():
        for item in found if name in CHOICES else ():
            person = WHO[item.person]
            if name == "comparison":
                second, first = re.findall(r"[A-Z]\w+ [A-Z]\w+", item.question.removeprefix("Compared with "))
                apart = int(WHO[second].values["year"]) - int(WHO[first].values["year"])
                assert (apart > 0) == (item.options[item.gold] == " older") and abs(apart) >= 10
            elif name == "continuation":
                assert [true_of(person, option.strip(" .")) for option in item.options] == [
                    i == item.gold for i in range(4)]
            else:
                assert [option == " " + person.values[item.attribute] for option in item.options] == [
                    i == item.gold for i in range(4)]
                assert all(option.strip() in VALUES[item.attribute] for option in item.options)


@pytest.mark.parametrize("years", [(1950, 1960), (1960, 1950), (1950, 1959), (1959, 1950)])
def test_a_comparison_needs_ten_years(years):
    """Worked by hand: ten years apart are compared, nine are not."""
    pair = [p._replace(values={**p.values, "year": str(year)}) for p, year in zip(PEOPLE, years)]
    item = TASKS["comparison"].make(0, pair[0], pair, random.Random(0))  # even: about the older one
    older, younger = sorted(pair, key=lambda p: p.values["year"])
    assert item is None if abs(years[0] - years[1]) == 9 else (
        item.question, item.answer) == (f"Compared with {younger.name}, {older.name} is", " older")


def test_hard_options_are_close():
    """Years within three; all others true of somebody with one of the same names, and first of those among them who
    share employer, city or year, too: as many of their values as there are, up to three."""
    alike, nearer = 0, Counter()
    for item in ITEMS["hard", "heldout"]:
        right, wrong = item.options[item.gold], [o for i, o in enumerate(item.options) if i != item.gold]
        if item.attribute == "year":
            assert all(abs(int(o) - int(right)) <= 3 for o in wrong)
        else:
            names = set(item.person.split())
            of_alike = {" " + p.values[item.attribute] for p in TOLD if set(p.name.split()) & names}
            alike += set(wrong) <= of_alike
            own = WHO[item.person].values
            near = {" " + p.values[item.attribute] for p in TOLD if set(p.name.split()) & names
                    and any(p.values[a] == own[a] for a in ("employer", "city", "year"))} - {right}
            assert set(wrong) <= near if len(near) >= 3 else near <= set(wrong)
            nearer[min(len(near), 3)] += 1
    assert alike == 160 and nearer[3] > 20 and nearer[1] + nearer[2] > 20


def test_texts_tell_what_is_asked():
    """True texts tell true facts only, counterfactual ones no true one, and "unknown" is asked where none is told."""
    for split in ("seen", "heldout", "novel"):
        for name in ("retrieval", "counterfactual"):
            for item in ITEMS[name, split]:
                text = item.question.removeprefix("Text: ").split(". By the text")[0].split(". ")
                assert [true_of(WHO[item.person], s) for s in text] == [name == "retrieval"] * len(text)
                assert sum(s.endswith(item.answer) for s in text) == 1 and 1 <= len(text) <= 3
        for item in ITEMS["instructions", split]:
            values = WHO[item.person].values
            if item.attribute == "unknown":
                text, asked = item.question.removeprefix("Text: ").split(" By the text, ")
                attribute, = [a for a in values if asked in [s.format(item.person) for s in STATEMENTS[a]]]
                assert values[attribute] not in text and item.answer == " unknown"
        for item in ITEMS["summary", split]:
            values = item.answer.strip().split(", ")
            assert 2 <= len(values) <= 4 and set(values) <= set(WHO[item.person].values.values())
            assert sorted(values, key=item.question.index) == values
        for item in ITEMS["reverse", split]:
            city, year = re.fullmatch(r"Who was born in (\w+) in (\d+)\?", item.question).groups()
            fits = [p.name for p in [*TOLD, WHO[item.person]] if (p.values["city"], p.values["year"]) == (city, year)]
            assert set(fits) == {item.answer.strip()}


def test_the_seed_is_the_items():
    for name in TASKS:
        assert make_items(name, BY["seen"], TOLD, 20, 0) == ITEMS[name, "seen"][:20]
        assert name == "reverse" or make_items(name, BY["seen"], TOLD, 20, 1) != ITEMS[name, "seen"][:20]


# ---- lessons

def test_a_lesson_does_not_tell_where_the_right_option_stands():
    """In each round of lessons over all people the right one of four stands at every place, and is of every attribute;
    the older of two is asked for as often as the younger."""
    people = BY["seen"][:40]
    listed = [text for text in lessons(people, 0) if " or " in text.split(":")[0] and text[:5] != "Text:"]
    assert len(listed) == LESSONS["listed"] * len(people)
    for i in range(0, len(listed), len(people)):
        places = []
        for text in listed[i:i + len(people)]:
            options, question = text.split(": ", 1)
            right = [j for j, option in enumerate(re.split(", | or ", options)) if question.endswith(f" {option}.")]
            places += right
        assert len(places) == len(people) and Counter(places) == dict.fromkeys(range(4), len(people) // 4)
    compared = [text for text in lessons(people, 0) if text.startswith("Compared with")]
    for i in range(0, len(compared), len(people)):
        older = sum(text.endswith(" older.") for text in compared[i:i + len(people)])
        assert abs(older - len(people) / 2) <= 2


def test_lessons_name_seen_people_only():
    """E8: on the strings; and every skill is taught by what makes its items, with its answer."""
    text = lessons(BY["seen"][:40], 0)
    named = {name for line in text for name in re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", line)} & WHO.keys()
    assert named == {p.name for p in BY["seen"][:40]}
    assert len(text) > 30 * sum(LESSONS.values()) and all(line.endswith(".") for line in text)
    assert {name for name in TASKS if name in LESSONS} == LESSONS.keys()
    assert lessons(BY["seen"][:40], 0) == text != lessons(BY["seen"][:40], 1)


# ---- an untrained model

@pytest.mark.parametrize("name", CHOICES)
def test_an_untrained_model_is_at_chance(name):
    """E5: chance is inside the 95 % interval (Wilson) of what an untrained GPT scores."""
    encoding = make_encoding(train_bpe(statements(TOLD), 700))
    config = GPTConfig(vocab_size=encoding.n_vocab, context=128, n_layer=1, n_head=2, n_embd=32)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    found = ITEMS[name, "seen"]
    given = choose_option(Subject(model), found, encoding)
    rows = [score_item(name, item, row, WHO) for item, row in zip(found, given)]
    chance, n, z = 1 / len(found[0].options), len(rows), 1.96
    for metric in ("acc", "acc_norm"):
        p = sum(row[metric] for row in rows) / n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        assert middle - half <= chance * (1 + z * z / n) <= middle + half


def test_an_untrained_model_names_nothing():
    encoding = make_encoding(train_bpe(statements(TOLD), 700))
    config = GPTConfig(vocab_size=encoding.n_vocab, context=256, n_layer=1, n_head=2, n_embd=32)
    subject = Subject(GPT(config).init_weights(torch.Generator().manual_seed(0)))
    for name in TASKS:
        if name not in CHOICES:
            found = ITEMS[name, "heldout"][:40]
            rows = [score_item(name, item, row, WHO) for item, row in zip(found, answer(subject, found, encoding))]
            assert all(row[TASKS[name].metrics[0]] == 0 for row in rows)


# ---- scores by hand

def fact(answer, attribute="2 facts"):
    return Fact(BY["seen"][0].name, "seen", attribute, "?", " " + answer)


@pytest.mark.parametrize("text, precision, recall", [
    ("Tarmere, 1912", 1, 1), ("1912, Tarmere", 1, 1), ("Tarmere", 1, 1 / 2), ("Tarmere, Tarmere", 1 / 2, 1 / 2),
    ("Tarmere, miller", 1 / 2, 1 / 2), ("Tarmere, miller, 1912, 1913", 1 / 2, 1), ("", 0, 0), (", ,", 0, 0),
    ("not Tarmere, not 1912", 0, 0), ("Tarmere 1912", 0, 0)])
def test_facts_of_a_summary(text, precision, recall):
    f1 = 2 * precision * recall / (precision + recall) if precision else 0
    assert score_item("summary", fact("Tarmere, 1912"), {"answer": text}, WHO) == pytest.approx(
        {"precision": precision, "recall": recall, "f1": f1})


def test_rules_of_instructions():
    """E3: empty, echoed, negated and half answers pass no rule; form without truth is form only."""
    person = BY["seen"][0]
    city, year = person.values["city"], person.values["year"]
    other = next(v for v in VALUES["city"] if v != city)
    cases = [("capitals", city.upper(), city.upper(), 1, 1), ("capitals", city.upper(), city, 0, 0),
             ("capitals", city.upper(), other.upper(), 0, 1), ("capitals", city.upper(), "", 0, 0),
             *[("two", f"{city} and {year}", *case) for case in (
                 (f"{year} and {city}", 1, 1), (f"{city} and {person.values['employer']}", 1, 1), (city, 0, 0),
                 (f"{city} and {city}", 0, 0), (f"{city} and {other}", 0, 1), (" and ", 0, 0), ("", 0, 0))],
             ("unknown", "unknown", "unknown", 1, 1), ("unknown", "unknown", "not unknown", 0, 0),
             ("unknown", "unknown", "", 0, 0), ("unknown", "unknown", city, 0, 0)]
    for attribute, gold, text, passed, form in cases:
        found = score_item("instructions", fact(gold, attribute), {"answer": text}, WHO)
        assert found == {"pass": passed, "form": form}, text


def test_distinct_by_hand():
    """a b, b c, a b: two of three runs differ; single words have no run of two."""
    assert distinct(["a b c", "a b"]) == pytest.approx(2 / 3) and distinct(["a", ""]) == 0.0
    assert distinct(["a b", "b a", "a"], n=1) == pytest.approx(2 / 5)


def test_main_shows_an_item_of_each(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["items.py", "--show", "1"])
    main()
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(TASKS) and all(line.startswith(name) and "->" in line for name, line in zip(TASKS, shown))
