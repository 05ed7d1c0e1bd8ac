"""The scorer, with answers put into a model's mouth; and with a real model against naive loops over single rows."""
import math

import pytest
import torch

from world.facts import (EOT, Fact, VALUES, WorldConfig, facts_about, make_encoding, make_world, pad, statements,
                         taught_questions, text_batches, train_bpe)
import recover
from idp import PromptPool, choose as choose_prompt, prefill, select
from model import Cache, GPT, GPTConfig
from study import taskfiles
from world.score import (CONTEXT, Subject, answer, choose_option, cut_options, is_right, knowledge,
                         perplexity, say, tokenized)
from test_model import naive

CONFIG = WorldConfig(seen=6, heldout=4, validation=2, novel=3, vocab_size=400, seed=1)
PEOPLE = make_world(CONFIG)
TOLD = [p for p in PEOPLE if p.split != "novel"]
SENTENCES = statements(TOLD) + taught_questions(TOLD)
ENCODING = make_encoding(train_bpe(SENTENCES, CONFIG.vocab_size))
FACTS = facts_about(PEOPLE)


def multiple(question, options, gold):
    """A fact whose answer is chosen among `options`."""
    return Fact("", "", "", question, options[gold] if options else "", tuple(options))


def small(position="rotary", context=64):
    model = GPT(GPTConfig(vocab_size=ENCODING.n_vocab, context=context, n_layer=2, n_head=2, n_embd=32, n_hidden=48,
                          position=position))
    return model.init_weights(torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained():
    """Knows many of its facts, not all."""
    model = small()
    recover.fit(model, model.parameters(), text_batches(SENTENCES, ENCODING, 8, 32, torch.Generator().manual_seed(0)),
                config=recover.FitConfig(steps=250, lr=2e-2, muon=0.1))
    return model


def pool(*lengths):
    generator = torch.Generator().manual_seed(4)
    return PromptPool([0.3 * torch.randn(n, 32, generator=generator) for n in lengths])


def with_pool(model, prompts):
    """A Subject that is IDP over `prompts`."""
    with torch.no_grad():
        filled = prefill(model, prompts)
    return Subject(model, filled, lambda ids, lengths: choose_prompt(model, prompts, ids, lengths, filled))


# ---- what is read

class Parrot:
    """A model that continues each question with the text given for it, and finds every token equally likely."""
    config, wte = GPTConfig(n_layer=1), torch.nn.Embedding(1, 1)

    def __init__(self, replies):
        self.replies, self.asked = replies, []

    def new_cache(self, batch, slots):
        return Cache(GPTConfig(n_layer=1), batch, slots)

    def generate(self, ids, new, lengths, cache, stop, first=None):
        out = torch.cat([ids, ids.new_full((len(ids), new), stop)], dim=1)
        for row, n in zip(out, lengths.tolist()):
            question = ENCODING.decode(row[1:n].tolist())
            self.asked.append(question)
            reply = ENCODING.encode_ordinary(self.replies(question))[:new]
            row[n:] = stop
            row[n:n + len(reply)] = torch.tensor(reply, dtype=torch.long)
        return out

    def __call__(self, ids, cache):
        return torch.zeros(*ids.shape, ENCODING.n_vocab)

    def hidden(self, ids, cache, lengths=None, first=None):
        return torch.zeros(*ids.shape, 1)

    def head(self, x):
        return torch.zeros(*x.shape[:-1], ENCODING.n_vocab)


def scored(replies, facts=FACTS):
    return answer(Subject(Parrot(replies)), facts, ENCODING)


def test_the_right_answer_counts_and_nothing_else_does():
    """E3: the generated part is the value, exactly, up to the first full stop; never the question or a part of it."""
    gold = {fact.question: fact.answer for fact in FACTS}
    assert all(row["correct"] for row in scored(lambda q: gold[q] + "."))
    assert all(row["correct"] for row in scored(lambda q: gold[q]))  # stopped at end-of-text instead
    assert all(row["correct"] for row in scored(lambda q: gold[q] + ". It"))  # what follows is another sentence
    wrong = {"nothing": lambda q: "", "only a stop": lambda q: ".", "spaces": lambda q: "   ", "an echo": lambda q: q,
             "not X": lambda q: " not" + gold[q], "X and more": lambda q: gold[q] + " at",
             "half of it": lambda q: gold[q][:3], "glued": lambda q: gold[q] + "x", "late": lambda q: "." + gold[q]}
    for how, replies in wrong.items():
        rows = scored(replies)
        assert len(rows) == len(FACTS) and not any(row["correct"] for row in rows), how
    letters = [fact for fact in FACTS if fact.attribute != "year"]
    assert not any(row["correct"] for row in scored(lambda q: gold[q].swapcase(), letters))
    assert scored(lambda q: " Tarmere.", FACTS[:1])[0]["answer"] == "Tarmere"


class Speller(Parrot):
    """A Parrot that writes its reply in tokens of one byte each."""

    def generate(self, ids, new, lengths, cache, stop, first=None):
        out = torch.cat([ids, ids.new_full((len(ids), new), stop)], dim=1)
        for row, n in zip(out, lengths.tolist()):
            reply = [ENCODING.encode_single_token(bytes([b])) for b in
                     self.replies(ENCODING.decode(row[1:n].tolist())).encode()][:new]
            row[n:] = stop if len(reply) < new else row[n:]
            row[n:n + len(reply)] = torch.tensor(reply)
        return out


def test_an_answer_in_shorter_tokens_has_twice_the_room_and_two_more():
    """Spelt out it is right as long as it fits with its full stop: 2 n + 2 tokens where the right answer has n."""
    spelt = {True: [], False: []}
    for fact, (_, gold) in zip(FACTS, tokenized(FACTS, ENCODING)):
        row, = answer(Subject(Speller(lambda q: fact.answer + ".")), [fact], ENCODING)
        assert row["correct"] == (len(fact.answer) + 1 <= 2 * len(gold) + 2), (fact, gold)
        spelt[row["correct"]].append((len(gold), len(fact.answer) + 1))
    assert any(n + 2 < size for n, size in spelt[True]) and any(2 * n + 2 < size for n, size in spelt[False])


def test_an_answer_that_goes_on_is_wrong_wherever_it_is_cut():
    """E3: " X y" is not " X", even where the last token there is room for is the space between them."""
    gold = {fact.question: fact.answer for fact in FACTS}
    assert not any(row["correct"] for row in scored(lambda q: gold[q] + " \0"))


def test_a_gold_answer_in_the_question_is_not_read():
    """E3: asked about a value it contains, a silent model is wrong."""
    fact = Fact("Bala Balvek", "seen", "city", "Not Tarmere but Tarmere", " Tarmere")
    assert not scored(lambda q: "", [fact])[0]["correct"] and scored(lambda q: " Tarmere", [fact])[0]["correct"]


@pytest.mark.parametrize("text, gold, right", [
    (" Tarmere", " Tarmere", True), ("Tarmere", " Tarmere", True), (" Tarmere ", " Tarmere", True),
    ("", " Tarmere", False),
    ("", "", False), (" ", " ", False), (" not Tarmere", " Tarmere", False), (" Tarmere Tarmere", " Tarmere", False)])
def test_is_right(text, gold, right):
    assert is_right(text, gold) is right


def test_n_items_divided_by_n():
    """E4: a row a fact, in their order, whatever is left for the last batch; half of them right is a half."""
    gold = {fact.question: fact.answer for fact in FACTS}
    for n, batch_size in ((1, 250), (7, 3), (len(FACTS), 8), (8, 8)):
        parrot = Parrot(lambda q: gold[q] if FACTS.index(next(f for f in FACTS if f.question == q)) % 2 else "no")
        rows = say(Subject(parrot), FACTS[:n], ENCODING, batch_size)
        assert [row["correct"] for row in rows] == [i % 2 == 1 for i in range(n)]
        assert parrot.asked == [fact.question for fact in FACTS[:n]]
    assert {key for row in rows for key in row} == {"answer", "correct", "logprob", "knowledge", "chosen"}


def test_logprob_of_an_even_model():
    for fact, row in zip(FACTS, scored(lambda q: "")):
        tokens = len(ENCODING.encode_ordinary(fact.answer))
        assert row["logprob"] == pytest.approx(-tokens * math.log(ENCODING.n_vocab), rel=1e-6)


def test_questions_are_cut_where_the_answer_begins():
    """E1: tokenized together, the space goes with the answer, an answer is never empty."""
    for fact, (question, gold) in zip(FACTS, tokenized(FACTS, ENCODING)):
        assert question[0] == ENCODING.eot_token and ENCODING.decode(question[1:]) == fact.question
        assert ENCODING.decode(gold) == fact.answer and gold and fact.answer[0] == " "
        assert question[1:] + gold == ENCODING.encode_ordinary(fact.question + fact.answer)
    fact = FACTS[0]
    for question, gold in ((fact.question, ""), (fact.person + " come", "s from Tarmere")):
        with pytest.raises(ValueError, match="does not end where"):
            tokenized([fact._replace(question=question, answer=gold)], ENCODING)


# ---- a real model

def naive_answer(model, fact, prompt=None):
    """Greedy text up to the full stop and log-probability of the gold answer, one row, nothing cached."""
    def logits(ids):
        vectors = model.wte(torch.tensor(ids))
        vectors = vectors if prompt is None else torch.cat([prompt, vectors])
        return naive(model, vectors)[0][-len(ids):]
    question = [ENCODING.eot_token, *ENCODING.encode_ordinary(fact.question)]
    gold, ids = ENCODING.encode_ordinary(fact.answer), list(question)
    log_p = logits(question + gold).log_softmax(-1)
    logprob = sum(log_p[len(question) - 1 + i, token].item() for i, token in enumerate(gold))
    for _ in range(8):
        ids.append(int(logits(ids)[-1].argmax()))
        if ids[-1] == ENCODING.eot_token or "." in ENCODING.decode(ids[-1:]):
            break
    return ENCODING.decode(ids[len(question):]).split(".")[0].replace(EOT, "").strip(), logprob


@pytest.mark.parametrize("prompted", [False, True])
def test_answers_are_the_naive_loops(trained, prompted):
    """P1, P5: cached, padded and batched, with and without a prompt, equal one row at a time in float64."""
    prompts = pool(5)
    subject = with_pool(trained, prompts) if prompted else Subject(trained)
    facts = [*FACTS[:4], *FACTS[31:33]]
    for fact, row in zip(facts, answer(subject, facts, ENCODING)):
        text, logprob = naive_answer(trained, fact, prompts.prompts[0] if prompted else None)
        assert row["logprob"] == pytest.approx(logprob, abs=1e-3) and row["chosen"] == 0
        assert row["answer"] == text[:len(row["answer"])] and (len(text) > 20 or row["answer"] == text)
        assert row["correct"] == (text == fact.answer.strip())


def test_knowledge_is_the_right_values_share_of_all_values():
    """log p(value) - log(sum of p over all values of the attribute), one value at a time: where all values differ in
    their last of two tokens alone, as years do here, and where they do not."""
    years = [f" {year}" for year in VALUES["year"]]
    encoding = make_encoding(train_bpe([*SENTENCES, *[f"It is{year}." for year in years] * 40], 520))
    assert {(len(tokens), tokens[0]) for tokens in encoding.encode_ordinary_batch(years)} == {
        (2, encoding.encode_single_token(" 19"))}
    model = GPT(GPTConfig(vocab_size=520, n_layer=1, n_embd=32)).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # untrained, but far from even
    facts = FACTS[5:15]
    for fact, row in zip(facts, answer(Subject(model), facts, encoding)):
        each = []
        for value in VALUES[fact.attribute]:
            (question, gold), = tokenized([fact._replace(answer=f" {value}")], encoding)
            log_p = model(torch.tensor([question + gold]))[0, len(question) - 1:-1].log_softmax(-1)
            each.append(sum(log_p[i, token].item() for i, token in enumerate(gold)))
        assert row["knowledge"] == pytest.approx(row["logprob"] - math.log(sum(map(math.exp, each))), abs=1e-3), fact


def test_training_shows(trained):
    """Told facts are known, novel people's are not: the scorer sees the difference it is there for."""
    rows = answer(Subject(trained), FACTS, ENCODING)
    told = [row["correct"] for fact, row in zip(FACTS, rows) if fact.split != "novel"]
    novel = [row["correct"] for fact, row in zip(FACTS, rows) if fact.split == "novel"]
    assert sum(told) / len(told) > 0.4 > 0.2 > sum(novel) / len(novel)


def test_an_untrained_model_is_at_chance():
    """E5: recall no better than guessing a value (95 % of a binomial), each token as likely as any other."""
    rows = answer(Subject(small()), FACTS, ENCODING)
    chance = sum(1 / len(VALUES[fact.attribute]) for fact in FACTS) / len(FACTS)
    right = sum(row["correct"] for row in rows) / len(rows)
    assert right <= chance + 1.96 * math.sqrt(chance * (1 - chance) / len(rows))
    per_token = sum(row["logprob"] for row in rows) / sum(len(gold) for _, gold in tokenized(FACTS, ENCODING))
    assert per_token == pytest.approx(-math.log(ENCODING.n_vocab), abs=0.5)


@pytest.mark.parametrize("lengths", [None, (4,), (5, 2, 3)])
def test_batch_size_changes_nothing(trained, lengths):
    """E6: answers the same, log-probabilities to 1e-5, choices the same."""
    subject = Subject(trained) if lengths is None else with_pool(trained, pool(*lengths))
    whole = answer(subject, FACTS, ENCODING)
    for batch_size in (1, 7, 64):
        for a, b in zip(whole, say(subject, FACTS, ENCODING, batch_size), strict=True):
            assert (a["answer"], a["correct"], a["chosen"]) == (b["answer"], b["correct"], b["chosen"])
            assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-5, rel=1e-5)


def test_the_same_model_twice_gives_no_flips(trained):
    """E7: nor any other difference, to the last bit."""
    subject = with_pool(trained, pool(5, 2))
    assert answer(subject, FACTS, ENCODING) == answer(subject, FACTS, ENCODING)


def test_the_choice_does_not_see_the_answer(trained):
    """P8: with other gold answers, longer ones too, every question is still put under the same prompt."""
    subject, asked = with_pool(trained, pool(5, 5, 5)), []
    choose = subject.choose

    def spy(ids, lengths):
        asked.extend(ENCODING.decode(row[1:n].tolist()) for row, n in zip(ids, lengths.tolist()))
        return choose(ids, lengths)
    subject.choose = spy
    first = answer(subject, FACTS, ENCODING)
    other = [fact._replace(answer=" Tarmere and Tarmere and Bal") for fact in FACTS]
    second = answer(subject, other, ENCODING)
    assert [row["chosen"] for row in first] == [row["chosen"] for row in second]
    assert len({row["chosen"] for row in first}) > 1
    assert set(asked) == {fact.question for fact in FACTS}  # and a question is all that it was given
    assert [row["logprob"] for row in first] != [row["logprob"] for row in second]


# ---- multiple choice

def naive_choice(model, item, prompt=None):
    """Log-probability of each option, one row and one token at a time, everything tokenized together, in float64."""
    question = [ENCODING.eot_token, *ENCODING.encode_ordinary(item.question)]
    out = []
    for option in item.options:
        whole = [ENCODING.eot_token, *ENCODING.encode_ordinary(item.question + option)]
        vectors = model.wte(torch.tensor(whole))
        vectors = vectors if prompt is None else torch.cat([prompt, vectors])
        log_p = naive(model, vectors)[0][-len(whole):].log_softmax(-1)
        out.append(sum(log_p[t - 1, whole[t]].item() for t in range(len(question), len(whole))))
    return out


def items_of(facts, n=4):
    """Each fact with n - 1 other values of its attribute, the gold one going round."""
    out = []
    for i, fact in enumerate(facts):
        others = [" " + value for value in VALUES[fact.attribute] if " " + value != fact.answer][i % 7:][:n - 1]
        out.append(multiple(fact.question, others[:i % n] + [fact.answer] + others[i % n:], i % n))
    return out


ITEMS = [*items_of(FACTS[:7]),
         multiple("Bala", [" Balvek was born in Tarmere.", " Corsen", "vek works as a miller"], 1),
         multiple("Bala Balvek", [" works", " was", " and", " the", " is"], 0)]


@pytest.mark.parametrize("prompted", [False, True])
def test_options_are_scored_as_the_naive_loop_does(trained, prompted):
    """P1, E1: questions of any length, options of one token and of many, with and without a prompt in front."""
    prompts = pool(5)
    subject = with_pool(trained, prompts) if prompted else Subject(trained)
    for item, row in zip(ITEMS, choose_option(subject, ITEMS, ENCODING), strict=True):
        assert row["logprobs"] == pytest.approx(naive_choice(trained, item, prompts.prompts[0] if prompted else None),
                                                abs=1e-3)


def test_an_option_is_what_stands_behind_the_question():
    """E1, by hand: a trailing space moves to the option, a token across the border is the question's, none is empty."""
    question, options = cut_options(multiple("Bala Balvek comes from ", ["Tarmere", "Zanburg"], 0), ENCODING, [7])
    assert question == [7, *ENCODING.encode_ordinary("Bala Balvek comes from")]
    assert [ENCODING.decode(option) for option in options] == [" Tarmere", " Zanburg"]
    plain = make_encoding({**{bytes([b]): b for b in range(256)}, b"ab": 256})
    cut = cut_options(multiple("xa", ["by", "c"], 0), plain, [9])
    assert cut == ([9, 120, 97], [[121], [99]])  # xaby is x ab y: two tokens before y
    for bad in (multiple("xa", ["b"], 0), multiple("xa", [""], 0), multiple("xa", [], 0)):
        with pytest.raises(ValueError, match="'xa'"):
            cut_options(bad, plain, [9])
    with pytest.raises(ValueError, match="no question"):
        cut_options(multiple("", [" b"], 0), plain, [])


class Fixed:
    """A model that finds token id likelier by weight[id], wherever it stands."""
    config, wte = GPTConfig(n_layer=1), torch.nn.Embedding(1, 1)

    def __init__(self, weight):
        self.weight = weight

    def new_cache(self, batch, slots):
        return Cache(GPTConfig(n_layer=1), batch, slots)

    def hidden(self, ids, cache, lengths=None, first=None):
        return torch.zeros(*ids.shape, 1)

    def head(self, x):
        return self.weight.expand(*x.shape[:-1], len(self.weight))


def test_acc_norm_divides_by_characters():
    """E2, by hand: " aa" costs 2 tokens of ln 4, " b" and " c" one of ln 8 each; a character, " aa" is the cheapest.

    A tie goes to the first; the leading space is not counted.
    """
    plain = make_encoding({**{bytes([b]): b for b in range(256)}, b" a": 256, b" b": 257, b" c": 258})
    weight = torch.full((260,), -50.0)
    weight[[256, 97]], weight[[257, 258]] = math.log(1 / 4), math.log(1 / 8)
    weight[0] = math.log(1 - 1 / 4 - 1 / 4 - 1 / 8 - 1 / 8)
    row, = choose_option(Subject(Fixed(weight)), [multiple("x", [" aa", " b", " c"], 1)], plain)
    assert row["logprobs"] == pytest.approx([-2 * math.log(4), -math.log(8), -math.log(8)], abs=1e-4)
    assert (row["picked"], row["picked_norm"]) == (1, 0)
    # a character, " b" costs 2.08 and " aaa" 1.39; with the space counted it would be 1.04 and 1.04
    row, = choose_option(Subject(Fixed(weight)), [multiple("x", [" b", " aaa"], 0)], plain)
    assert row["logprobs"] == pytest.approx([-math.log(8), -3 * math.log(4)], abs=1e-4) and row["picked_norm"] == 1


def test_batch_size_and_neighbours_change_no_choice(trained):
    """E6, E4, P8: batches of any size give the same to 1e-5; the pool's choice is the question's; a row an item."""
    for subject in (Subject(trained), with_pool(trained, pool(5, 2, 3))):
        whole = choose_option(subject, ITEMS, ENCODING)
        assert len(whole) == len(ITEMS) and whole == choose_option(subject, ITEMS, ENCODING)  # E7: to the last bit
        for batch_size in (1, 4):
            for a, b in zip(whole, choose_option(subject, ITEMS, ENCODING, batch_size), strict=True):
                assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
                assert (a["picked"], a["picked_norm"], a["chosen"]) == (b["picked"], b["picked_norm"], b["chosen"])
        other = choose_option(subject, [item._replace(options=[" miller"] * 2) for item in ITEMS], ENCODING)
        assert [row["chosen"] for row in other] == [row["chosen"] for row in whole]


# ---- perplexity

WINDOWS = next(text_batches(SENTENCES, ENCODING, 7, 24, torch.Generator().manual_seed(2)))


def naive_perplexity(model, windows, prompts=None, starts=None):
    """exp(sum of text losses / number of text tokens), one window and one position at a time."""
    total, count = 0.0, 0
    for b, row in enumerate(windows):
        prompt = None if prompts is None else prompts[b]
        vectors = model.wte(row[:-1]) if prompt is None else torch.cat([prompt, model.wte(row[:-1])])
        start = 0 if starts is None else starts[b]
        logits = naive(model, vectors, range(start, start + len(vectors)))[0][len(vectors) - len(row) + 1:]
        for t in range(CONTEXT, len(row) - 1):
            total -= logits[t].log_softmax(-1)[row[t + 1]].item()
            count += 1
    return math.exp(total / count)


def test_perplexity_is_the_naive_loop(trained):
    """P2: divided by the text tokens that are scored, with a prompt in front as without."""
    bare = perplexity(Subject(trained), WINDOWS)
    assert bare == pytest.approx(naive_perplexity(trained, WINDOWS), rel=1e-5)
    prompts = pool(5)
    assert perplexity(with_pool(trained, prompts), WINDOWS) == pytest.approx(
        naive_perplexity(trained, WINDOWS, [prompts.prompts[0]] * 7), rel=1e-5)
    for batch_size in (1, 3):
        assert perplexity(Subject(trained), WINDOWS, batch_size) == pytest.approx(bare, rel=1e-6)


def test_perplexity_of_a_pool_chooses_on_the_beginning(trained):
    """P8: by the first CONTEXT tokens, which are not scored."""
    prompts, read = pool(5, 2, 3), []
    subject = with_pool(trained, prompts)
    choose = subject.choose
    subject.choose = lambda ids, lengths: (read.append((ids, lengths)), choose(ids, lengths))[1]
    chosen = select(trained, prompts, WINDOWS[:, :CONTEXT]).tolist()
    assert len(set(chosen)) > 1
    expected = naive_perplexity(trained, WINDOWS, [prompts.prompts[m] for m in chosen],
                                [prompts.longest - len(prompts.prompts[m]) for m in chosen])
    assert perplexity(subject, WINDOWS) == pytest.approx(expected, rel=1e-5)
    (ids, lengths), = read
    assert torch.equal(ids, WINDOWS[:, :CONTEXT]) and lengths.tolist() == [CONTEXT] * 7


def test_a_prompt_that_does_nothing_leaves_perplexity_alone(trained):
    """P2: attention switched off, so prompts of any length cannot matter - and a longer one does not look better."""
    deaf = small()
    with torch.no_grad():
        for block in deaf.blocks:
            block.attn.o.weight.zero_()
    bare = perplexity(Subject(deaf), WINDOWS)
    for length in (1, 8, 30):
        assert perplexity(with_pool(deaf, pool(length)), WINDOWS) == pytest.approx(bare, rel=1e-6)


def test_perplexity_of_an_even_model_is_the_vocabulary():
    assert perplexity(Subject(Parrot(str)), WINDOWS) == pytest.approx(ENCODING.n_vocab, rel=1e-5)


def test_windows_with_nothing_to_score_are_refused(trained):
    with pytest.raises(ValueError, match=str(CONTEXT)):
        perplexity(Subject(trained), WINDOWS[:, :CONTEXT + 1])


@pytest.mark.parametrize("prompted", [False, True])
def test_a_question_that_does_not_fit_is_an_error(prompted):
    """P4: never cut."""
    model = small(context=20)
    subject = with_pool(model, pool(16)) if prompted else Subject(model)
    with pytest.raises(ValueError, match="20"):
        answer(subject, [FACTS[0]._replace(question=FACTS[0].question * 4)], ENCODING)


@pytest.mark.parametrize("where", ["embedding", "block", "head"])
def test_a_model_that_gives_no_numbers_is_named(where):
    """E5: every comparison with NaN is false, so it would be found to choose the first option, and to say token 0."""
    model = GPT(GPTConfig(vocab_size=ENCODING.n_vocab, n_layer=2, n_embd=32, context=64, tied=False))
    model.init_weights(torch.Generator().manual_seed(0))
    weight = {"embedding": model.wte, "block": model.blocks[1].mlp.down, "head": model.lm_head}[where].weight
    with torch.no_grad():
        weight.fill_(math.nan)
    for name, (things, score) in scorers(Subject(model, about={"id": "gptq-2-bits"})).items():
        if name != "pick":
            with pytest.raises(ValueError, match="gptq-2-bits gives log-probabilities that are not numbers"):
                score(things)


def test_items_that_fit_alone_fit_together():
    """E3, E2: a long question with short options, and a short one with long options, each as long as the context."""
    long = ENCODING.decode(list(range(97, 123)) * 2)
    items = [multiple(long[:37], [" x", " y"], 0), multiple("x", [f" {long[:36]}", " y"], 1),
             multiple("y", [" x", " z"], 0)]
    cuts = [cut_options(item, ENCODING, [ENCODING.eot_token]) for item in items]
    context = max(len(question) + max(map(len, options)) - 1 for question, options in cuts)
    subject = Subject(small(context=context))
    together = choose_option(subject, items, ENCODING)
    for row, item in zip(together, items):
        alone, = choose_option(subject, [item], ENCODING)
        assert row["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-4) and row["picked"] == alone["picked"]
    said = [Fact("", "", "", question, gold)
            for question, gold in ((long[:30], " x"), ("x", f" {long[:12]}"), ("y", " z"))]
    for row, fact in zip(answer(subject, said, ENCODING), said):
        assert row["logprob"] == pytest.approx(answer(subject, [fact], ENCODING)[0]["logprob"], abs=1e-4)


@pytest.mark.parametrize("gold, right, wrong", [
    (" St. Elmere", [" St. Elmere.", " St. Elmere. It", " St. Elmere"], [" St.", " St. Elm.", " St. Elmere at."]),
    (" 5 a.m.", [" 5 a.m.", " 5 a.m. It"], [" 5 a.", " 5 a.x.", " 5 p.m."]), (" 3.14", [" 3.14."], [" 3.", " 3.1."])])
def test_an_answer_may_hold_full_stops(gold, right, wrong):
    """E10: it is read up to the first full stop behind as many as are part of it."""
    fact = FACTS[0]._replace(answer=gold)
    found = [scored(lambda q: text, [fact])[0]["correct"] for text in right + wrong]
    assert found == [True] * len(right) + [False] * len(wrong)


def test_what_is_continued_ends_where_the_text_does():
    """E1: end-of-text is no part of an answer: the tokens behind it are not read, nor is it written out."""
    facts = [f._replace(options=(f.answer,)) for f in FACTS[:4]]
    def gold(question):  # the parrot reads a question from its second token on, and ends every answer with end-of-text
        return next(fact.answer for fact in facts if fact.question.endswith(question))
    for replies in (gold, lambda question: ""):
        for fact, tokens in zip(facts, taskfiles.continued(Subject(Parrot(replies)), facts, ENCODING)):
            assert tokens == ENCODING.encode_ordinary(replies(fact.question))
    assert taskfiles.score(Subject(Parrot(gold)), "triviaqa", facts, ENCODING) == {"exact_match": [1.0] * 4}


# ---- no result depends on its neighbours

def scorers(subject):
    """{name: (what is scored, list of these -> a number, a word or several for each)}: all that scores in batches."""
    said = [*FACTS, FACTS[0]._replace(answer=" St. Elmere and a long way from there"), FACTS[1]._replace(answer=" x")]
    aliases = [Fact(f.person, "", "triviaqa", f.question, f.answer, (f.answer, *more)) for f, more in
               zip(FACTS, [()] * 5 + [(" a much longer alias of the same",)] + [(" x",)] * len(FACTS))]
    rows = tokenized(said, ENCODING)

    def per_window(windows):
        return [perplexity(subject, window[None]) for window in windows]

    def pick(questions):
        ids, lengths = pad(questions, ENCODING)
        return subject.choose(ids, lengths)[0].tolist()
    return {"say": (said, lambda facts: [tuple(row.values()) for row in say(subject, facts, ENCODING)]),
            "choose_option": (ITEMS, lambda items: [
                (*row["logprobs"], row["picked"], row["picked_norm"], row["chosen"])
                for row in choose_option(subject, items, ENCODING)]),
            "answer": (ITEMS, lambda items: [(row["answer"], row["logprob"], row["knowledge"])
                                             for row in answer(subject, items, ENCODING)]),
            "continued": (aliases, lambda facts: [tuple(t) for t in taskfiles.continued(subject, facts, ENCODING)]),
            "triviaqa": (aliases, lambda facts: taskfiles.score(subject, "triviaqa", facts, ENCODING)["exact_match"]),
            "webqs": (aliases, lambda facts: taskfiles.score(subject, "webqs", facts, ENCODING)["exact_match"]),
            "lambada": (aliases, lambda facts: taskfiles.score(subject, "lambada", facts, ENCODING)["loss"]),
            "pick": ([question for question, _ in rows], pick),
            "perplexity": (list(WINDOWS), per_window)}


@pytest.mark.parametrize("lengths", [(), (5,), (5, 5, 5), (3, 4, 2)])
def test_no_result_depends_on_its_neighbours(trained, lengths):
    """Whatever is asked in another order, and split into parts anywhere, gets the same answer, choice and number."""
    subject = with_pool(trained, pool(*lengths)) if lengths else Subject(trained)
    generator = torch.Generator().manual_seed(0)
    for name, (things, score) in scorers(subject).items():
        whole = score(things)
        for _ in range(3):
            order = torch.randperm(len(things), generator=generator).tolist()
            cut = int(torch.randint(1, len(things), (1,), generator=generator))
            parts = [*score([things[i] for i in order[:cut]]), *score([things[i] for i in order[cut:]])]
            assert len(parts) == len(things)
            for i, found in zip(order, parts):
                for a, b in zip(whole[i], found, strict=True) if isinstance(found, tuple) else [(whole[i], found)]:
                    assert a == (pytest.approx(b, abs=1e-4, rel=1e-4) if isinstance(b, float) else b), (name, things[i])


def test_perplexity_of_parts_is_that_of_the_whole(trained):
    """The mean loss over all text tokens, in whatever batches: windows of one length, so the mean of their means."""
    for subject in (Subject(trained), with_pool(trained, pool(5, 5, 5))):
        each = [math.log(perplexity(subject, window[None])) for window in WINDOWS]
        whole = pytest.approx(math.exp(sum(each) / len(each)), rel=1e-5)
        for batch_size in (1, 3, 250):
            assert perplexity(subject, WINDOWS.flip(0), batch_size) == whole


def test_knowledge_by_hand():
    """Options of 0.2, 0.1 and 0.1 of the whole vocabulary: the right one has half of what the options have. What
    doubles the chance of every option changes nothing."""
    assert knowledge([math.log(p) for p in (0.2, 0.1, 0.1)], 0) == pytest.approx(math.log(0.5))
    assert knowledge([math.log(p) for p in (0.4, 0.2, 0.2)], 0) == pytest.approx(math.log(0.5))
    assert knowledge([math.log(p) for p in (0.1, 0.2, 0.1)], 0) == pytest.approx(math.log(0.25))
    assert knowledge([-1000.0, -1001.0], 0) == pytest.approx(-math.log1p(math.exp(-1))) and knowledge([-3.0], 0) == 0
    assert knowledge([-math.inf, 0.0], 0) == -math.inf
