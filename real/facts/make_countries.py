"""
The facts about countries as questions: countries.tsv, checked by hand, into countries.jsonl.

A line of the result, by example:

    {"entity": "Kenya", "attribute": "capital", "question": "The capital of Kenya is", "answer": "Nairobi",
     "options": ["Maputo", "Nairobi", "Accra", ...]}

The text is question + " " + answer. One option is right; the others are answers for other countries (for a capital:
on the same continent) that their names do not give away either. The right one stands at every place equally often.

What it leaves out: facts whose answer can be read off the country's name (`gives_away`), and those marked "-" in
the table, because they are disputed, in transition, or true of more than one value. README.md tells which and why.

    python real/facts/make_countries.py
"""
import argparse
import json
import os
import pathlib
import random
import unicodedata

HERE = pathlib.Path(__file__).resolve().parent
QUESTIONS = {  # two wordings each: what a model misses in one of them only, it knows
    "capital": ("The capital of {country} is", "The name of {country}'s capital city is"),
    "continent": ("{country} is a country on the continent of", "The continent that {country} belongs to is"),
    "currency": ("The currency of {country} is the", "In {country}, people pay with the"),
    "language": ("An official language of {country} is", "In {country}, official documents are written in"),
    "country": ("{capital} is the capital of", "The city of {capital} is the seat of the government of"),
}
ALIKE = [{"rial", "riyal"}, {"krone", "krona", "króna"}, {"dinar", "denar"}, {"leu", "lek"},
         {"franc", "CFA franc"}]  # never side by side
OPTIONS = 8
SEED = 0


def unaccented(text):
    """Lower case without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))


def gives_away(country, answer):
    """Whether the answer can be read off the name: a word of each starts with the same three letters, or both share
    four letters in a row anywhere (Tunisia and Tunis, Spain and Spanish, Afghanistan and afghani)."""
    a, b = unaccented(country), unaccented(answer)
    starts = {w[:3] for w in a.split()} & {w[:3] for w in b.split()} - {"the", "of", "and"}
    return bool(starts) or any(b[i:i + 4] in a for i in range(len(b) - 3))


def read_off(row, attribute):
    """Whether a fact can be read off the country's name, or, asked by the capital, off that."""
    return gives_away(row["country"], row["capital" if attribute == "country" else attribute])


def read_table():
    """[{column: value}] of countries.tsv."""
    head, *rows = [line.split("\t") for line in (HERE / "countries.tsv").read_text(encoding="utf-8").splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def wrong_options(row, attribute, table, rng):
    """Seven wrong answers (five continents): never one that is also true, or spelled almost like the right one."""
    answer = row[attribute]
    near = [r for r in table if attribute not in ("capital", "country") or row["continent"] in ("-", r["continent"])]
    never = {answer, "-", *row["also true"].split(", ")}.union(*(group for group in ALIKE if answer in group))
    chosen = []
    for r in rng.sample(near, len(near)):  # countries, not values: what is often right is often on offer when wrong
        value = r[attribute]
        alike = {value}.union(*(group for group in ALIKE if value in group))
        if value not in never and not alike & set(chosen) and not read_off(r, attribute):
            chosen.append(value)
    return chosen[:OPTIONS - 1]


def country_facts():
    """[{entity, attribute, question, answer, options}], the same on every call."""
    rng, table, facts = random.Random(SEED), read_table(), []
    for wording in range(2):
        for attribute, questions in QUESTIONS.items():
            asked = "capital" if attribute == "country" else attribute
            kept = [row for row in table if row[asked] != "-" and not read_off(row, attribute)]
            places = list(range(len(kept)))
            rng.shuffle(places)
            for row, place in zip(kept, places):
                options = wrong_options(row, attribute, table, rng)
                options.insert(place % (len(options) + 1), row[attribute])
                text = questions[wording].format(**row)
                facts.append({"entity": row["country"].removeprefix("the "), "attribute": attribute,
                              "question": text[0].upper() + text[1:], "answer": row[attribute], "options": options})
    return facts


def main():
    """The script: see the top of this file, and --help."""
    argparse.ArgumentParser(description="Write countries.jsonl anew from countries.tsv.").parse_args()
    facts, path = country_facts(), HERE / "countries.jsonl"
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts), encoding="utf-8")
    os.replace(temporary, path)
    for attribute in QUESTIONS:
        print(f"{attribute:10s} {sum(fact['attribute'] == attribute for fact in facts)} questions")


if __name__ == "__main__":
    main()
