"""The small world: who was told what, checked on the strings themselves; the tokenizer against merges done by hand."""
import re
import unicodedata
from collections import Counter

import pytest
import tiktoken
import torch

from checkpoints.vocabulary import SMALL_SPLIT
from world.facts import FIRST, LAST, main
from world.facts import (EOT, QUESTIONS, SPLITS, STATEMENTS, TAUGHT, VALUES, WorldConfig, text_batches, facts_about,
                  make_encoding, make_world, pad, statements, taught_questions, train_bpe)

CONFIG = WorldConfig(seen=21, heldout=14, validation=9, novel=6, vocab_size=500, seed=3)


@pytest.fixture(scope="module")
def people():
    return make_world(CONFIG)


@pytest.fixture(scope="module")
def encoding(people):
    told = [p for p in people if p.split != "novel"]
    return make_encoding(train_bpe(statements(told) + taught_questions(told), CONFIG.vocab_size))


# ---- the people

def test_splits_have_their_sizes_and_their_order(people):
    assert Counter(p.split for p in people) == dict(seen=21, heldout=14, validation=9, novel=6)
    assert [p.split for p in people] == sorted((p.split for p in people), key=SPLITS.index)
    default = make_world(WorldConfig())
    assert Counter(p.split for p in default) == dict(seen=1000, heldout=600, validation=400, novel=200)


def test_the_whole_default_world_has_different_names_and_known_values():
    default = make_world(WorldConfig())
    assert len({p.name for p in default}) == len(default) == 2200
    assert len(set(FIRST)) == len(FIRST) and len(set(LAST)) == len(LAST)
    for values in VALUES.values():
        assert len(set(values)) == len(values)
    for p in default:
        assert re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+", p.name)
        assert all(p.values[attribute] in VALUES[attribute] for attribute in VALUES) and len(p.values) == 5


def test_values_are_drawn_evenly_and_independently():
    """No attribute tells about another, or about the split: chi-square within five standard deviations of its mean."""
    people = make_world(WorldConfig())

    def chi_square(pairs, cells):
        expected = len(people) / cells
        counts = Counter(pairs)
        return sum((n - expected) ** 2 for n in counts.values()) / expected + expected * (cells - len(counts))

    for attribute, values in VALUES.items():
        freedom = len(values) - 1
        assert abs(chi_square([p.values[attribute] for p in people], len(values)) - freedom) < 5 * (2 * freedom) ** 0.5
    cells = len(VALUES["city"]) * len(VALUES["university"])
    found = chi_square([(p.values["city"], p.values["university"]) for p in people], cells)
    assert abs(found - cells) < 5 * (2 * cells) ** 0.5


def test_the_seed_is_the_world():
    assert make_world(CONFIG) == make_world(CONFIG)
    other = make_world(WorldConfig(21, 14, 9, 6, 500, seed=4))
    assert [p.name for p in other] != [p.name for p in make_world(CONFIG)]


@pytest.mark.parametrize("bad, names", [
    (dict(seen=0), "seen.*0"), (dict(novel=-1), "novel.*-1"), (dict(seen=6000), "7200 people.*5184"),
    (dict(vocab_size=256), "257.*256")])
def test_an_impossible_world_is_refused(bad, names):
    with pytest.raises(ValueError, match=names):
        WorldConfig(**bad)


# ---- the strings

def test_no_other_name_is_in_the_seen_text():
    """E8: nobody held out, novel or validating is in what calibrates and repairs; nobody novel is in any text."""
    people = make_world(WorldConfig())
    by = {split: [p for p in people if p.split == split] for split in SPLITS}
    repair = "\n".join(statements(by["seen"]) + taught_questions(by["seen"]))
    everything = "\n".join(statements(people[:2000]) + taught_questions(people[:2000]))
    for split in ("heldout", "validation", "novel"):
        assert not [p.name for p in by[split] if p.name in repair]
    assert not [p.name for p in by["novel"] if p.name in everything]
    assert all(p.name in everything for p in people[:2000])


def test_every_fact_is_told_in_every_phrasing(people):
    text = statements(people)
    assert len(text) == len(set(text)) == 50 * 5 * 3
    person = people[0]
    assert text[:15] == [f"{phrase.replace('{}', person.name)} {person.values[attribute]}."
                         for attribute in VALUES for phrase in STATEMENTS[attribute]]


def test_questions_of_their_own_are_taught_to_every_second_person(people):
    assert TAUGHT == ["year", "profession"]  # the two that are more than a statement cut short
    assert all(QUESTIONS[a] in STATEMENTS[a] for a in set(VALUES) - set(TAUGHT))
    taught = taught_questions(people)
    for split, expected in dict(seen=11, heldout=7, validation=5, novel=3).items():
        shown = [p for p in people if p.split == split and any(p.name in line for line in taught)]
        assert len(shown) == expected and all(p.taught for p in shown)
    assert len(taught) == 2 * 26
    person = people[0]
    assert taught[:2] == [f"When was {person.name} born? In {person.values['year']}.",
                          f"What does {person.name} do? A {person.values['profession']}."]


def test_facts_ask_for_the_value(people):
    asked = facts_about(people)
    assert len(asked) == 5 * len(people)
    told = set(statements(people)) | set(taught_questions(people))
    for fact, (person, attribute) in zip(asked, [(p, a) for p in people for a in VALUES]):
        assert (fact.person, fact.split, fact.attribute) == (person.name, person.split, attribute)
        assert fact.question == QUESTIONS[attribute].replace("{}", person.name)
        assert fact.answer == " " + person.values[attribute] and fact.question == fact.question.strip()
        # the text holds the answer, except to a question of their own that was not taught
        assert (fact.question + fact.answer + "." in told) == (attribute not in TAUGHT or person.taught)


# ---- the tokenizer

def test_bpe_worked_by_hand():
    """aaabdaaabac: aa stands there four times, then aaa twice (seen before ab), then aaab; then every pair once."""
    merges = list(train_bpe(["aaabdaaabac"], 257 + 5))[256:]
    assert merges == [b"aa", b"aaa", b"aaab", b"aaabd", b"aaabdaaab"]
    assert make_encoding(train_bpe(["aaabdaaabac"], 257 + 3)).encode_ordinary("aaabdaaabac") == [258, 100, 258, 97, 99]


def test_bpe_counts_a_repeated_piece_as_often_as_it_stands():
    # " xy" three times and "ab" twice beat "cd" once; merges never cross from one word to the next
    merges = list(train_bpe(["ab xy xy", "ab xy", "cd"], 257 + 6))[256:]
    assert merges[:2] == [b" x", b" xy"] and merges[2] == b"ab" and merges[3] == b"cd" and len(merges) == 4


def test_bpe_stops_where_asked_and_where_nothing_is_left():
    assert len(train_bpe(["the cat sat on the mat"], 260)) == 259
    assert len(train_bpe(["the cat sat on the mat"], 257)) == 256
    assert len(train_bpe(["ab"], 1000)) == 257
    ranks = train_bpe(statements(make_world(CONFIG)), 400)
    assert list(ranks.values()) == list(range(399)) and train_bpe(statements(make_world(CONFIG)), 400) == ranks
    assert [bytes([b]) for b in range(256)] == list(ranks)[:256]


def test_encoding_is_the_merges_in_the_order_they_were_learned(people, encoding):
    """tiktoken's merging against a loop that joins the pair of lowest rank until none is known."""
    ranks = encoding._mergeable_ranks
    for text in statements(people[:4]) + ["Zanrick's cook-book_2  costs 1999!", "ÄÖ über 東京"]:
        expected = []
        for piece in re.findall(SMALL_SPLIT, text):
            parts = [bytes([b]) for b in piece.encode()]
            while True:
                known = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
                if not known:
                    break
                _, i = min(known)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            expected += [ranks[p] for p in parts]
        assert encoding.encode_ordinary(text) == expected


def test_any_text_comes_back(encoding):
    """Every code point there is except lone surrogates, in two orders; emoji, combining marks, NUL, any spaces."""
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert encoding.decode(encoding.encode_ordinary(everything)) == everything
    backwards = everything[::-7]
    assert encoding.decode(encoding.encode_ordinary(backwards)) == backwards
    family = "\U0001F468\u200d\U0001F469\u200d\U0001F467\U0001F3FD"
    for text in ("", "\0", "a\0b", " ", "\n\n \t\x1c\x85\u2028", family, unicodedata.normalize("NFD", "Äé ñ"),
                 "e\u0301\u0300x", "²½Ⅷ", "_a_1_", "مرحبا", "12345 6", "a  b   ", EOT, f"x{EOT}y"):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
        assert encoding.eot_token not in encoding.encode_ordinary(text)


def test_training_on_any_text_gives_whole_ranks():
    ranks = train_bpe(["naïve café 東京 \U0001F600\0 e\u0301 " * 3, "\0\0\0\0", "aaaaaaaaaaa", "bbabbabba"], 330)
    assert list(ranks.values()) == list(range(len(ranks)))
    encoding = make_encoding(ranks)
    text = "café aaaaaaa 東京\0\0"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_eot_is_the_last_token(encoding):
    assert encoding.eot_token == 499 and encoding.n_vocab == 500
    assert encoding.encode(EOT, allowed_special="all") == [499] and encoding.decode([499]) == EOT
    assert isinstance(encoding, tiktoken.Encoding)


def test_an_answer_begins_where_a_token_begins(people, encoding):
    """E1: question and answer cut together give the question's tokens and then the answer's, which are never none."""
    for fact in facts_about(people):
        question, whole = encoding.encode_ordinary(fact.question), encoding.encode_ordinary(fact.question + fact.answer)
        assert whole[:len(question)] == question and encoding.decode(whole[len(question):]) == fact.answer
        assert len(whole) > len(question)
        told = encoding.encode_ordinary(fact.question + fact.answer + ".")  # as training saw it: the full stop apart
        assert told[:-1] == whole and encoding.decode(told[-1:]) == "."


# ---- tensors

def test_rows_are_documents_end_to_end(people, encoding):
    """Put together again, the rows are whole sentences: none dropped, each pass all of them in an order of its own."""
    sentences = statements(people[:3])
    stream = text_batches(sentences, encoding, 4, 30, torch.Generator().manual_seed(0))
    rows = [next(stream) for _ in range(40)]
    assert all(batch.shape == (4, 31) and batch.dtype == torch.long for batch in rows)
    *told, last = encoding.decode(torch.cat(rows).flatten().tolist()).split(EOT)[1:]
    passes = [told[i:i + 45] for i in range(0, len(told) - 44, 45)]
    assert len(passes) > 5 and all(sorted(told) == sorted(sentences) for told in passes) and passes[0] != passes[1]
    assert any(sentence.startswith(last) for sentence in sentences)
    again, other = (next(text_batches(sentences, encoding, 4, 30, torch.Generator().manual_seed(seed)))
                    for seed in (0, 1))
    assert torch.equal(again, rows[0]) and not torch.equal(other, rows[0])


def test_aligned_rows_begin_with_a_document(people, encoding):
    """Every row starts behind an end-of-text token, as a question does; only a row's last sentence may be cut short."""
    sentences = statements(people[:3])
    stream, counts = text_batches(sentences, encoding, 4, 30, torch.Generator().manual_seed(0), aligned=True), Counter()
    for _ in range(40):
        for row in next(stream).tolist():
            assert row[0] == encoding.eot_token and len(row) == 31
            *whole, last = encoding.decode(row).split(EOT)[1:]
            assert all(sentence in sentences for sentence in whole) and any(s.startswith(last) for s in sentences)
            counts.update(whole)
    assert set(counts) == set(sentences)


def test_a_document_longer_than_many_rows():
    long, plain = "abcdefghij" * 9, make_encoding({bytes([b]): b for b in range(256)})
    stream = text_batches([long], plain, 2, 4, torch.Generator().manual_seed(0))
    text = plain.decode(torch.cat([next(stream) for _ in range(30)]).flatten().tolist())
    assert text == (EOT + long) * (len(text) // len(EOT + long)) + (EOT + long)[:len(text) % len(EOT + long)]
    aligned = next(text_batches([long], plain, 2, 4, torch.Generator().manual_seed(0), aligned=True))
    assert [plain.decode(row) for row in aligned.tolist()] == [EOT + "abcd"] * 2


def test_pad_puts_end_of_text_behind(encoding):
    ids, lengths = pad([[1, 2, 3], [4], [5, 6]], encoding)
    eot = encoding.eot_token
    assert ids.tolist() == [[1, 2, 3], [4, eot, eot], [5, 6, eot]] and lengths.tolist() == [3, 1, 2]


def test_main_shows_people(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data.py", "--show", "1", "--seed", "5"])
    monkeypatch.setattr(WorldConfig.__init__, "__defaults__", (5, 4, 3, 2, 300, 0))
    main()
    shown = capsys.readouterr().out
    people = make_world(WorldConfig(5, 4, 3, 2, 300, seed=5))
    assert "14 people, 70 facts" in shown
    for split in SPLITS:
        first = next(p for p in people if p.split == split)
        assert f"{first.name} ({split}" in shown and f" {first.values['city']} " in shown
        heard = [f"  {'never' if split == 'novel' else 'told '}  {s}\n" for s in statements([first])]
        assert len(heard) == 15 and all(line in shown for line in heard)
