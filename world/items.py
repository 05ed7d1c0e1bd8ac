"""
The tasks: what the study asks beside closed-book recall, item by item, and the lessons that teach how such things are
asked.

Perplexity hides what compression does to knowledge (the paper; LLM-KICK: Jaiswal et al. 2024, arXiv 2310.01382), so
each kind of question that either of them uses has its small twin here, on seen, held-out and novel people:

    task            asks                                               after              scored by          chance
    trained         closed-book recall, a phrasing told of everybody   WebQuestions       exact match        2 %
    unseen          closed-book recall, one told of other people only  TriviaQA           exact match        2 %
    four-way        the value among four of its kind                   ARC-easy, SciQ     acc, acc_norm      25 %
    hard            among values of people who are alike               ARC-challenge      acc, acc_norm      25 %
    last word       of a passage about one person                      LAMBADA            exact, perplexity  2 %
    continuation    the true sentence behind a true one, among four    HellaSwag          acc_norm, acc      25 %
    text            sentences about held-out people                    WikiText           perplexity a token
    listed        x among four that the question lists                 MMLU               acc, acc_norm      25 %
    comparison    x is somebody older or younger than another          PIQA               acc, acc_norm      50 %
    reverse       x who has these two facts                            -                  exact match        0 %
    retrieval     x what a text says, of people known or novel         LLM-KICK           exact match        2 %
    counterfact.  x the same where the text contradicts what is known  LLM-KICK           exact match        2 %
    summary       x the facts of a wordy text, by length               LLM-KICK           F1, prec., recall  0 %
    instructions  x in capitals; name two; "unknown" if not stated     LLM-KICK, IFEval   rules, distinct-2  0 %

A task marked x needs a skill that sentences about single facts do not show. `lessons` writes such questions with their
answers about seen people; only `--size medium` reads them in pretraining. One function a task makes both the lesson
and the item, so what is tested is what was taught, about other people.

No model judges an answer. No answer stands in its question, except where reading it there is the task; gold options
take every position equally often; the same seed gives the same items.

    python -m world.items --show 1               # an item of each task
"""
import argparse
import random
from typing import Callable, NamedTuple

from engine.script import guard  # before torch: Ctrl-C is one line
from world.facts import WorldConfig, make_world
from world.facts import QUESTIONS, STATEMENTS, VALUES, Fact

ATTRIBUTES = list(VALUES)


# ---- one function a task: (i, person, people, rng) -> an item about `person`, the i-th of its kind
#
# `people` are those whom the rest of the item may be about. i turns the attribute and the gold position, in periods
# that share no factor, so that every pair of them comes up equally often.

def four_way(i, person, people, rng):
    attribute = ATTRIBUTES[i % 5]
    others = rng.sample([v for v in VALUES[attribute] if v != person.values[attribute]], 3)
    return choice(person, attribute, QUESTIONS[attribute].format(person.name), person.values[attribute], others, i)


def hard(i, person, people, rng):
    """Years at most 3 apart; else values of people who share a name, those of the same employer, city or year first."""
    attribute, value, own = ATTRIBUTES[i % 5], person.values[ATTRIBUTES[i % 5]], person.values
    if attribute == "year":
        others = rng.sample([v for v in VALUES["year"] if 0 < abs(int(v) - int(value)) <= 3], 3)
    else:
        first, last = person.name.split()
        alike = [p for p in people if p.name.startswith(first + " ") or p.name.endswith(" " + last)]
        rng.shuffle(alike)
        alike.sort(key=lambda p: not any(p.values[a] == own[a] for a in ("employer", "city", "year")))
        others = list(dict.fromkeys(p.values[attribute] for p in alike if p.values[attribute] != value))[:3]
        spare = [v for v in VALUES[attribute] if v != value and v not in others]
        others += rng.sample(spare, 3 - len(others))
    return choice(person, attribute, QUESTIONS[attribute].format(person.name), value, others, i)


def last_word(i, person, people, rng):
    """Three sentences about other attributes, then one whose last word is asked."""
    attribute = ATTRIBUTES[i % 5]
    told = rng.sample([a for a in ATTRIBUTES if a != attribute], 3)
    passage = " ".join(sentence(person, a, rng) for a in told)
    return Fact(person.name, person.split, attribute, f"{passage} {statement_start(person, attribute, rng)}",
                " " + person.values[attribute])


def continuation(i, person, people, rng):
    """A true sentence, then four about other attributes in any phrasing, one of them true."""
    first, *rest = rng.sample(ATTRIBUTES, 5)
    false = [f"{statement_start(person, a, rng)} {rng.choice([v for v in VALUES[a] if v != person.values[a]])}."
             for a in rest[1:]]
    return choice(person, rest[0], sentence(person, first, rng), sentence(person, rest[0], rng), false, i)


def listed(i, person, people, rng):
    item = four_way(i, person, people, rng)
    a, b, c, d = (option.strip() for option in item.options)
    return item._replace(question=f"{a}, {b}, {c} or {d}: {item.question}")


def comparison(i, person, people, rng):
    """With somebody at least ten years apart, None where nobody is; even i asks about the older of the two."""
    def years(p):
        return int(p.values["year"])
    far = [p for p in people if abs(years(p) - years(person)) >= 10]
    if not far:
        return None
    other = rng.choice(far)
    older, younger = sorted([person, other], key=years)
    a, b = (older, younger) if i % 2 == 0 else (younger, older)
    question = f"Compared with {b.name}, {a.name} is"
    options = (" older", " younger")
    return Fact(person.name, person.split, "year", question, options[i % 2], options)


def reverse(i, person, people, rng):
    """None where somebody else has the same two facts."""
    city, year = person.values["city"], person.values["year"]
    if sum(p.values["city"] == city and p.values["year"] == year for p in people if p.name != person.name):
        return None
    return Fact(person.name, person.split, "name", f"Who was born in {city} in {year}?", " " + person.name)


def retrieval(i, person, people, rng, counterfactual=False):
    """A text tells one to three facts, true or invented for this text; one of them is asked."""
    attribute = ATTRIBUTES[i % 5]
    told = [attribute, *rng.sample([a for a in ATTRIBUTES if a != attribute], i % 3)]
    rng.shuffle(told)
    if counterfactual:
        values = {a: rng.choice([v for v in VALUES[a] if v != person.values[a]]) for a in ATTRIBUTES}
        person = person._replace(values=values)
    text = " ".join(sentence(person, a, rng) for a in told)
    question = f"Text: {text} By the text, {statement_start(person, attribute, rng)}"
    return Fact(person.name, person.split, attribute, question, " " + person.values[attribute])


def counterfactual(i, person, people, rng):
    return retrieval(i, person, people, rng, counterfactual=True)


FILLERS = ["As many say, {}.", "It is often told that {}.", "One more thing, not that it matters much: {}.",
           "And, as you may have heard by now, {}.", "Nobody here would doubt that {}.", "So much is known: {}."]


def summary(i, person, people, rng):
    """Two to four facts in many words; the answer is their values in the order of the text."""
    told = rng.sample(ATTRIBUTES, 2 + i % 3)
    text = " ".join(filler.format(sentence(person, a, rng).rstrip("."))
                    for a, filler in zip(told, rng.sample(FILLERS, len(told))))
    return Fact(person.name, person.split, f"{len(told)} facts", f"Text: {text} In short:",
                " " + ", ".join(person.values[a] for a in told))


def instructions(i, person, people, rng):
    """In capitals; name two; say "unknown" when the text does not state it: a third each."""
    if i % 3 == 0:
        attribute = rng.choice([a for a in ATTRIBUTES if a != "year"])
        return Fact(person.name, person.split, "capitals", f"In capitals: {statement_start(person, attribute, rng)}",
                    " " + person.values[attribute].upper())
    if i % 3 == 1:
        a, b = rng.sample(ATTRIBUTES, 2)
        return Fact(person.name, person.split, "two", f"Two facts about {person.name}:",
                    f" {person.values[a]} and {person.values[b]}")
    attribute, *told = rng.sample(ATTRIBUTES, 4)
    text = " ".join(sentence(person, a, rng) for a in told[:1 + i // 3 % 3])
    question = f"Text: {text} By the text, {statement_start(person, attribute, rng)}"
    return Fact(person.name, person.split, "unknown", question, " unknown")


def statement_start(person, attribute, rng):
    """A statement up to its value, in any phrasing."""
    return rng.choice(STATEMENTS[attribute]).format(person.name)


def sentence(person, attribute, rng):
    return f"{statement_start(person, attribute, rng)} {person.values[attribute]}."


def choice(person, attribute, question, right, wrong, i):
    options, gold = [" " + text for text in wrong], i % (len(wrong) + 1)
    options.insert(gold, " " + right)
    return Fact(person.name, person.split, attribute, question, " " + right, tuple(options))


# ---- the table of tasks, and the items a split gets

class Task(NamedTuple):
    make: Callable
    by: str           # "choose": score.choose_option; "exact": score.answer, whole; "facts", "rule": see score_item
    metrics: tuple    # names of what an item scores; models are compared on the first


TASKS = {
    "four-way": Task(four_way, "choose", ("acc", "acc_norm")),
    "hard": Task(hard, "choose", ("acc", "acc_norm")),
    "last word": Task(last_word, "exact", ("exact",)),
    "continuation": Task(continuation, "choose", ("acc_norm", "acc")),
    "listed": Task(listed, "choose", ("acc", "acc_norm")),
    "comparison": Task(comparison, "choose", ("acc", "acc_norm")),
    "reverse": Task(reverse, "exact", ("exact",)),
    "retrieval": Task(retrieval, "exact", ("exact",)),
    "counterfactual": Task(counterfactual, "exact", ("exact",)),
    "summary": Task(summary, "facts", ("f1", "precision", "recall")),
    "instructions": Task(instructions, "rule", ("pass", "form")),
}


def make_items(name, who, told, n, seed):
    """The n items of one task about the people `who`; `told` are those whom an item may also be about.

    Fewer come back only for "reverse", where a pair of facts that fits two people is no question.
    """
    rng, make, out = random.Random(f"{seed} {name}"), TASKS[name].make, {}
    for i in range(2 * n):
        item = make(i + i // len(who), who[i % len(who)], told, rng)  # a person's second item is about something else
        if item and len(out) < n:
            out.setdefault(item.question, item)
    return list(out.values())


# ---- lessons: the same questions with their answers, about seen people

LESSONS = {"listed": 5, "comparison": 16, "reverse": 4, "retrieval": 3, "counterfactual": 12, "summary": 5,
           "instructions": 12}  # of each, a person


def lessons(people, seed):
    """Documents that teach every skill, about `people` only: LESSONS items of each, question and answer together."""
    rng, out = random.Random(seed), []
    for name, copies in LESSONS.items():
        make = TASKS[name].make
        for copy in range(copies):
            for k, person in enumerate(people):
                item = make(copy + k, person, people, rng)
                if item:
                    out.append(f"{item.question}{item.answer}.")
    return out


# ---- scores

def score_item(name, item, given, people):
    """{metric: number} of what `given` (a row of score.choose_option or score.answer) is worth.

    people  {name: Person}
    """
    by = TASKS[name].by
    if by == "choose":
        return {"acc": float(given["picked"] == item.gold), "acc_norm": float(given["picked_norm"] == item.gold)}
    if by == "exact":
        return {"exact": float(given["correct"]), "logprob": given["logprob"]}
    return (facts_stated if by == "facts" else rule_kept)(item, given["answer"], people)


def facts_stated(item, text, people):
    """Precision, recall and F1 of the facts a summary states; one stated twice is right once."""
    stated, gold = [part.strip() for part in text.split(",")], item.answer.strip().split(", ")
    right = len(set(stated) & set(gold))
    precision, recall = right / len(stated), right / len(gold)
    return {"precision": precision, "recall": recall, "f1": 2 * right / (len(stated) + len(gold))}


def rule_kept(item, text, people):
    """form: the answer has the form that the instruction asks for; pass: and what it says is true."""
    if item.attribute == "two":
        parts = text.split(" and ")
        form = len(parts) == len(set(parts)) == 2 and all(parts)
        right = form and set(parts) <= set(people[item.person].values.values())
    else:
        right = text == item.answer.strip()
        form = text.isupper() if item.attribute == "capitals" else right
    return {"pass": float(right), "form": float(form)}


def distinct(texts, n=2):
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): different runs of n words, as a share of all; 0 without any."""
    runs = [run for text in texts for words in [text.split()] for run in zip(*(words[i:] for i in range(n)))]
    return len(set(runs)) / len(runs) if runs else 0.0


def main():
    """The script: see the top of this file, and --help."""
    parser = argparse.ArgumentParser(description="Look at an item of each task.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--show", type=int, default=1, metavar="N", help="items of each task")
    parser.add_argument("--seed", type=int, default=0, help="which world, and which items")
    args = parser.parse_args()
    if args.show < 0:
        raise ValueError(f"--show must be at least 0, got {args.show}")
    people = make_world(WorldConfig(seed=args.seed))
    told = [p for p in people if p.split != "novel"]
    for name in TASKS:
        for item in make_items(name, [p for p in people if p.split == "heldout"], told, args.show, args.seed):
            among = "" if item.options is None else f"    of{','.join(item.options)}"
            print(f"{name:15s} {item.question} ->{item.answer}{among}")


if __name__ == "__main__":
    guard(main)
