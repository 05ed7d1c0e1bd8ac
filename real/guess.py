"""
What can be guessed about an entity that one does not know: answers that are frequent, and the spelling of its name.

A model that has lost a fact can still answer rightly: China has many cities, and Zhuzhou is spelled like one of them.
A repair that reads about seen cities can learn, or bring back, just that. So the study of a real model says twice what
came back: of all held-out facts, and of those that cannot be guessed, which this guesser gets wrong. It knows the
answers about the seen entities and no language model; an entity's own answer is left out when it is guessed itself.

    score(option) = log(seen entities with this answer + 1/2)
                    + weight * sum over the name's letter pairs and triples of log(p(letters | option) / p(letters))

p(letters | option) is that of the names with this answer, drawn towards that of all names by PRIOR letters (Dirichlet
smoothing, Zhai & Lafferty 2004); the weight is the best on validation entities. A repair that does no more than prefer
frequent answers loses facts of the second kind: they are a strict test.

What it leaves out: what a name means (Lagos de Moreno is Spanish), and clusters of entities with one answer.
"""
import math
from collections import Counter, defaultdict

WEIGHTS = (0.0, 0.05, 0.1, 0.2)
PRIOR = 50  # letter groups of all names that every answer's names are mixed with


def letters(name):
    """Every two and three letters in a row of a name, with marks at its ends."""
    name = f"^{name.lower()}$"
    return [name[i:i + n] for n in (2, 3) for i in range(len(name) - n + 1)]


class Guesser:
    """Guesses by the answers about other entities, `facts`: the entities of each answer, and their names' letters."""

    def __init__(self, facts):
        self.known = {(f.person, f.answer) for f in facts}
        self.entities, self.of, self.all = Counter(), defaultdict(Counter), Counter()
        for entity, answer in self.known:
            self.entities[answer] += 1
            self.of[answer].update(letters(entity))
        for counts in self.of.values():
            self.all.update(counts)
        self.size = self.all.total() + len(self.all) / 2

    def score(self, fact, option, weight):
        """How plausible an option is for a fact; the fact's own entity does not count."""
        name, own = letters(fact.person), (fact.person, option) in self.known
        counts, less = self.of.get(option, {}), Counter(name) if own else {}
        total = sum(counts.values()) - sum(less.values())
        score = math.log(self.entities[option] - own + 0.5)
        for each in name if weight else ():
            usual = (self.all[each] + 0.5) / self.size
            found = counts.get(each, 0) - less.get(each, 0)
            score += weight * math.log((found + PRIOR * usual) / (total + PRIOR) / usual)
        return score

    def right(self, facts, weight):
        """Whether the most plausible option of each fact, the first of several, is its answer."""
        return [max(f.options, key=lambda option: self.score(f, option, weight)) == f.answer for f in facts]


def guessed(split, asked):
    """({split: whether each fact of `asked` {split: facts} is guessed}, the line that says how many); None in place of
    the first where a split has no other facts.

    split  {"seen": facts, "validation": facts, ...}
    """
    guesser, facts = Guesser(split["seen"]), asked["heldout"]
    weight = max(WEIGHTS, key=lambda w: sum(guesser.right(split["validation"], w)))
    found = {name: guesser.right(of, weight) for name, of in asked.items()}
    often, spelled = (sum(right) / len(facts) for right in (guesser.right(facts, 0.0), found["heldout"]))
    some = found if not any(map(all, found.values())) else None
    return some, (f"of {len(facts):,} held-out facts {often:.1%} can be guessed by how often an answer is right about "
                  f"seen entities, {spelled:.1%} with the spelling of names (weight {weight:g})")
