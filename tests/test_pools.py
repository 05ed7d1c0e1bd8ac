"""The look inside, against slow loops and cases in which the answer is known beforehand."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

from study import inside, pools, tables
from study.statistics import exact_interval
from world.facts import VALUES, WorldConfig, facts_about, make_encoding, make_world, pad, statements, train_bpe
import idp
from model import GPT, GPTConfig
from recover import prompt_init
from study.repairs import pool_subject
from test_tables import cells
from world.score import Subject, answer, tokenized


@pytest.fixture(scope="module")
def scene():
    """A small random model, its tokenizer, and facts of a few people. Sharp logits, so that answers differ."""
    people = make_world(WorldConfig(seen=8, heldout=8, validation=8, novel=8))
    encoding = make_encoding(train_bpe(statements(people), 700))
    generator = torch.Generator().manual_seed(0)
    config = GPTConfig(vocab_size=encoding.n_vocab, n_layer=2, n_embd=32, n_head=4, n_kv_head=2)
    model = GPT(config).init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    pool = idp.PromptPool([prompt_init(model, n, generator=generator) for n in (3, 5, 5)])
    return model, pool, encoding, facts_about(people[:6])


def test_under_each_is_each_prompt_alone(scene):
    """Column m equals the Subject that has prompt m only, asked by the scorer."""
    model, pool, encoding, facts = scene
    each = pools.under_each(model, pool, facts, encoding)
    for m, prompt in enumerate(pool.prompts):
        alone = answer(pool_subject(model, idp.PromptPool([prompt])), facts, encoding)
        assert each["right"][:, m].tolist() == [float(a["correct"]) for a in alone]
        assert torch.allclose(each["logprob"][:, m], torch.tensor([a["logprob"] for a in alone]), atol=1e-4)


def test_selectors_choose_what_they_say(scene):
    """Every selector's row from a table made up by hand: three prompts, and which is right is known."""
    model, pool, encoding, facts = scene
    pool = idp.PromptPool(list(pool.prompts), torch.randn(3, 32, generator=torch.Generator().manual_seed(4)))
    out, each = pools.selectors(encoding, model, pool, facts, facts, torch.Generator().manual_seed(1))
    right, (chosen, _) = each["right"], pool_subject(model, pool).choose(*pad(
        [question for question, _ in tokenized(facts, encoding)], encoding))
    for n in range(len(facts)):
        best = max(range(3), key=lambda m: each["attention"][n, m].item())
        worst = min(range(3), key=lambda m: each["attention"][n, m].item())
        sure = max(range(3), key=lambda m: each["confidence"][n, m].item())
        assert out["attention-max (the paper's rule)"][0][n] == right[n, best]
        assert out["attention-min"][0][n] == right[n, worst]
        assert out["most confident"][0][n] == right[n, sure]
        assert out["probe trained with the prompts"][0][n] == right[n, chosen[n]]
        assert out["oracle"][0][n] == max(right[n])
        assert out["random"][0][n] == pytest.approx(sum(right[n]).item() / 3)


def test_a_choice_by_the_last_layer_and_one_by_what_a_prompt_draws_more_than_usual(scene, monkeypatch):
    """Two questions and three prompts: prompt 2 is the loudest by far, and each rule has a winner of its own."""
    model, pool, encoding, facts = scene
    each = {"attention": [[0.1, 0.3, 0.9], [0.3, 0.1, 0.8]], "attention_last": [[0.2, 0.7, 0.1], [0.1, 0.5, 0.4]],
            "right": [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], "confidence": [[0.0] * 3] * 2}
    each = {name: torch.tensor(of) for name, of in each.items()}
    monkeypatch.setattr(pools, "under_each", lambda *_: each)
    monkeypatch.setattr(pools, "ensemble", lambda *_: torch.zeros(2))
    out, _ = pools.selectors(encoding, model, pool, facts[:2], facts[:2], torch.Generator().manual_seed(1))
    # the prompts' means are 0.2, 0.2 and 0.85: over these, prompt 1 wins the first question and prompt 0 the second
    assert out["attention-max over a prompt's mean"][0].tolist() == [1, 1]
    assert out["attention-max in the last layer"][0].tolist() == [1, 0]
    assert out["attention-max (the paper's rule)"][0].tolist() == [0, 0]


def test_what_all_concatenated_and_the_floor_are_made_of(scene, monkeypatch):
    """One prompt of all prompts' vectors in their order; and as many untrained prompts of the same lengths."""
    model, pool, encoding, facts = scene
    asked = []

    def right_under_each(model, pool, facts, encoding):
        """Notes the pool."""
        asked.append([p.detach().clone() for p in pool.prompts])
        return torch.zeros(len(facts), len(pool))
    monkeypatch.setattr(pools, "right_under_each", right_under_each)
    pools.selectors(encoding, model, pool, facts[:3], facts[:3], torch.Generator().manual_seed(1))
    (joined,), untuned = asked
    assert joined.tolist() == [row for p in pool.prompts for row in p.tolist()]
    assert [len(p) for p in untuned] == [3, 5, 5]
    tokens = {tuple(row) for row in model.wte.weight.tolist()}
    assert all(tuple(row) in tokens for p in untuned for row in p.tolist())
    assert not any(torch.equal(a, b) for a, b in zip(untuned, pool.prompts))


def test_right_under_each_has_a_column_a_prompt(scene, monkeypatch):
    """Prompt m is right on every third fact, from the mth on."""
    model, pool, encoding, facts = scene

    def answer(subject, asked, encoding):
        """Right where the prompt that stands in front has the number of the fact, modulo 3."""
        (m,), _ = subject.choose(torch.zeros(1, 1), None)
        return [{"correct": n % 3 == m} for n in range(len(asked))]
    monkeypatch.setattr(pools, "answer", answer)
    right = pools.right_under_each(model, pool, facts, encoding)
    assert right.tolist() == [[float(n % 3 == m) for m in range(3)] for n in range(len(facts))]


def test_the_best_single_prompt_is_chosen_on_other_people(scene, monkeypatch):
    """Prompt 2 is the best on validation people, prompt 0 on those who are asked: their answers are prompt 2's."""
    model, pool, encoding, facts = scene
    given, others = facts[:10], facts[10:20]
    whole = pools.under_each

    def under_each(model, pool, asked, encoding):
        """The scores of `pools.under_each` with answers that are made up."""
        each = whole(model, pool, asked, encoding)
        best = 2 if asked is others else 0
        each["right"] = torch.zeros_like(each["right"])
        each["right"][:9, min(best, len(pool) - 1)] = 1.0
        each["right"][9, len(pool) - 1] = 1.0
        return each
    monkeypatch.setattr(pools, "under_each", under_each)
    out, _ = pools.selectors(encoding, model, pool, given, others, torch.Generator().manual_seed(1))
    assert out["best single on validation"][0].tolist() == [0.0] * 9 + [1.0] == out["prompt 2 alone"][0].tolist()


def test_of_many_questions_every_prompt_keeps_its_points(monkeypatch):
    attention = [[1.0, 2.0, 3.0]] * 200
    tried, _ = tried_by_hand(monkeypatch, attention, attention)
    assert tried["points"] == [[1.0, -1.0], [2.0, 0.0], [3.0, 1.0]] * 100  # every second question


def tried_by_hand(monkeypatch, attention, logprob, **scores):
    """`try_selectors` where each fact's scores and log-probabilities under three prompts are given."""
    people = make_world(WorldConfig(seen=2, heldout=2, validation=2, novel=2))
    facts = [f for f in facts_about(people[2:4]) if f.attribute in ("city", "year")]  # Ada's city and year, Ben's
    facts *= len(attention) // 4
    each = {name: torch.tensor(of) for name, of in {"attention": attention, "logprob": logprob, **scores}.items()}
    out = {"the rule": (torch.tensor([1.0, 0.0, 0.0, 0.0]), 0), "oracle": (torch.tensor([1.0, 1.0, 1.0, 0.0]), 2)}
    monkeypatch.setattr(pools, "selectors", lambda *given: (out, each))
    run = SimpleNamespace(config=SimpleNamespace(selector_people=2, seed=0),
                          world=SimpleNamespace(encoding=None, facts=lambda split, people: facts))
    about = {"operation": {"parameters": {"size": (3, 2, "together")}}, "tensors": [torch.zeros(2, 4)] * 3}
    tried = pools.try_selectors(run, SimpleNamespace(about=about), SimpleNamespace(model=None))
    return json.loads(json.dumps(tried, allow_nan=False)), facts


def test_what_prompts_gain_is_against_their_mean_on_the_same_question(monkeypatch):
    """Three prompts and four questions, of which the second is hard under every prompt: its gains are small."""
    attention = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.125], [0.125, 0.25, 0.5], [0.5, 0.25, 0.125]]
    logprob = [[-1.0, -2.0, -3.0], [-30.0, -30.0, -33.0], [-1.0, -1.0, -1.0], [-3.0, -2.0, -1.0]]
    tried, facts = tried_by_hand(monkeypatch, attention, logprob)
    gains = [1, 0, -1, 1, 1, -2, 0, 0, 0, -1, 0, 1]
    assert tried["points"] == [[a, g] for a, g in zip(sum(attention, []), gains)]
    assert tried["chosen"] == [2, 1, 1] and tried["by_attribute"] == {"city": [1, 0, 1], "year": [1, 1, 0]}
    # ranks of the first question: 2, 0.5, 0.5 and 2, 1, 0; of the second 1, 2, 0 and 1.5, 1.5, 0; the third has none
    assert tried["rho"] == pytest.approx([3 ** 0.5 / 2, 3 ** 0.5 / 2, None, -1])
    found = pools.with_intervals(tried, facts, 0)
    assert found["correlation"]["rho"] == pytest.approx((3 ** 0.5 - 1) / 3)  # of three questions, not of four
    low, high = found["correlation"]["interval"]  # Ada twice, both, or Ben twice
    assert (low, high) == pytest.approx((-1, 3 ** 0.5 / 2))
    rule, oracle = found["selectors"]
    assert (rule["recall"], oracle["recall"]) == (0.25, 0.75) and rule["over_rule"] == [0, 0]
    assert oracle["over_rule"] == [0.5, 0.5]  # one question more for Ada, and one for Ben
    assert rule["interval"] == exact_interval(0.75, 3) and oracle["interval"] == exact_interval(2.25, 3)  # few
    assert (rule["extra_passes"], oracle["extra_passes"]) == (0, 2)


def test_a_pool_with_a_probe_is_told_by_what_its_probe_took(monkeypatch):
    """Attention would take prompts 0, 1, 2, 0."""
    attention, logprob = [[0.5, 0.2, 0.2], [0.2, 0.5, 0.1], [0.1, 0.2, 0.5], [0.5, 0.2, 0.1]], [[-1.0, -2.0, -3.0]] * 4
    tried, _ = tried_by_hand(monkeypatch, attention, logprob, probe=[[0.0, 1.0, 2.0]] * 4)
    assert tried["chosen"] == [0, 0, 4] and tried["by_attribute"] == {"city": [0, 0, 2], "year": [0, 0, 2]}


def test_a_pool_whose_prompts_are_all_alike_has_no_correlation(monkeypatch):
    """Its table and its page are written all the same."""
    tried, facts = tried_by_hand(monkeypatch, [[0.25] * 3] * 4, [[-1.0, -2.0, -3.0]] * 4)
    found = pools.with_intervals(tried, facts, 0)
    assert tried["rho"] == [None] * 4 and found["correlation"] is None
    results = {"models": [{"id": "p", "idp": found}]}
    assert cells(tables.pool_table(results).splitlines()[-1])[-1] == ""
    assert "log-probability: none; chosen: [4, 0, 0]" in tables.selector_table(results["models"][0])


def test_ensemble_of_one_is_that_one(scene):
    model, pool, encoding, facts = scene
    one = idp.PromptPool([pool.prompts[1]])
    with torch.no_grad():
        got = pools.ensemble(model, one, facts, encoding, None)
    assert got.tolist() == [float(a["correct"]) for a in answer(pool_subject(model, one), facts, encoding)]


def test_ensemble_is_the_mean_of_the_prompts_probabilities(scene, monkeypatch):
    """Each question alone, one token after another, under each prompt without any cache; and of options by hand."""
    model, pool, encoding, facts = scene
    rows, alone = [], []
    monkeypatch.setattr(pools, "until_stop", lambda tokens, encoding: (rows.append(tokens), ("", False))[1])
    with torch.no_grad():
        assert pools.ensemble(model, pool, facts, encoding, None).tolist() == [0.0] * len(facts)
        for fact, row in zip(facts, rows, strict=True):
            ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(fact.question)]])
            for token in row:
                p = [model(ids, prompt=prompt)[0, -1].softmax(-1) for prompt in pool.prompts]  # 3 of (V,)
                assert token == int(sum(p).argmax())
                alone.append(token == int(p[0].argmax()))
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert not all(alone)  # the first prompt alone would have written something else
    item = facts[0]._replace(options=(" a", " b", " c"), answer=" b")
    shares = [[torch.tensor([0.6, 0.4, 0.0])], [torch.tensor([0.1, 0.5, 0.4])], [torch.tensor([0.2, 0.3, 0.5])]]
    assert pools.ensemble(model, pool, [item], encoding, {"shares": shares}).tolist() == [1.0]  # 0.9, 1.2 and 0.9


def test_in_top_counts_the_gold_tokens_rank(scene):
    """Oracle: sort the logits of each question run alone. With M = V everything is in the top."""
    model, _, encoding, facts = scene
    for M in (1, 20, 200, encoding.n_vocab):
        with torch.no_grad():
            got = pools.in_top(Subject(model), facts, encoding, M)
            for fact, found in zip(facts, got):
                whole = [encoding.eot_token, *encoding.encode_ordinary(fact.question + fact.answer)]
                logits = model(torch.tensor([whole[:-1]]))[0, -1]
                assert bool(found) == (int((logits > logits[whole[-1]]).sum()) < M)
    assert got.all()


def test_in_top_counts_the_right_options_rank(scene):
    """Oracle: each option's log-probability from the whole sequence alone, token by token; four options, every M."""
    model, _, encoding, facts = scene
    asked, above = [], []
    for fact in facts[:6]:
        wrong = [" " + value for value in VALUES[fact.attribute] if " " + value != fact.answer][:3]
        asked.append(fact._replace(options=(*wrong, fact.answer)))
        question = [encoding.eot_token, *encoding.encode_ordinary(fact.question)]
        sums = []
        for option in asked[-1].options:
            whole = [encoding.eot_token, *encoding.encode_ordinary(fact.question + option)]
            with torch.no_grad():
                log_p = model(torch.tensor([whole]))[0].log_softmax(-1)
            sums.append(sum(log_p[t - 1, whole[t]].item() for t in range(len(question), len(whole))))
        above.append(sum(p > sums[3] for p in sums[:3]))
    assert len(set(above)) > 1
    for M in (1, 2, 3, 4):
        assert pools.in_top(Subject(model), asked, encoding, M).tolist() == [float(n < M) for n in above]


def test_a_model_is_like_itself_and_only_itself(scene):
    model, pool, encoding, _ = scene
    ids = torch.randint(600, (3, 12), generator=torch.Generator().manual_seed(2))
    same = inside.similarity(Subject(model), inside.inside(Subject(model), ids), ids)
    assert all(abs(x - 1) < 1e-5 for row in [*same["attention"], same["output"]] for x in row)
    prompted = inside.similarity(pool_subject(model, pool), inside.inside(Subject(model), ids), ids)
    assert min(prompted["output"]) < 0.999
    heads = [x for row in prompted["attention"] for x in row]
    for name, whole in (("attention", heads), ("output", prompted["output"])):
        assert len(prompted["texts"][name]) == 3  # one mean a text: over all of them it is the mean of the whole
        assert sum(prompted["texts"][name]) / 3 == pytest.approx(sum(whole) / len(whole), abs=1e-6)


def test_inside_attention_is_the_softmax_row_by_row(scene):
    """One head of the first layer, one row at a time, with a prompt in front: softmax over prompt and text, text part
    renormalised.
    """
    model, pool, _, _ = scene
    subject = pool_subject(model, idp.PromptPool([pool.prompts[2]]))
    ids = torch.randint(600, (1, 6), generator=torch.Generator().manual_seed(3))
    attention, outputs = inside.inside(subject, ids)
    x = torch.cat([pool.prompts[2], model.wte(ids)[0]])[None]  # (1, 5 + 6, C)
    block = model.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(x), torch.arange(11)[None])
    for head in range(4):
        for t in range(6):
            logits = [(q[0, head, 5 + t] @ k[0, head // 2, s]).item() / math.sqrt(8) for s in range(5 + t + 1)]
            weights = [math.exp(v) for v in logits][5:]
            expected = [w / sum(weights) for w in weights]
            assert attention[0, 0, head, t, :t + 1].tolist() == pytest.approx(expected, abs=1e-5)
    for block, out in zip(model.blocks, outputs):
        x = block(x)
        assert torch.allclose(out[0], x[0, 5:], atol=1e-4)


def test_the_tables_beside_the_table_by_hand():
    """One base, LoRA and a pool: texts of which one or both are drawn, a twin on the next token."""
    nearer = inside.nearer({"attention": [0.5, 0.7], "output": [0.9, 0.9]},
                           {"attention": [0.4, 0.4], "output": [1.0, 0.8]}, 0)
    assert nearer["attention"] == pytest.approx([0.1, 0.3]) and nearer["output"] == pytest.approx([-0.1, 0.1])

    def model(name, base, extra, ms, **more):
        return {"id": name, "tag": name, "base": base, "operation": {"parameters": {}}, **more,
                "metrics": {"extra_parameters": extra, "ms_per_question": ms, "displaced": 0.25, "relearned": None},
                "intervals": {"displaced": [0.2, 0.3], "relearned": [None, None]},
                "similarity": {"texts": {"attention": [0.5, 0.7], "output": [0.9, 1.0]}, "nearer": nearer}}
    rows = [{"name": n, "recall": r, "interval": [r, r]} for n, r in (("attention-max (the paper's rule)", 0.5),
                                                                      ("oracle", 0.75))]
    pool = {"selectors": rows, "correlation": {"rho": 0.5, "interval": [0.25, 0.75]}}
    lora = [model(name, "b", 4200, 10) for name in ("b-lora-rank-8", "b-lora-rank-8-next-token")]
    results = {"models": [model("dense", None, 0, 1), model("b", "dense", 0, 1), *lora,
                          model("b-idp-4-x-8", "b", 200, 4, idp=pool)]}
    def last(table):
        return cells(table.splitlines()[-1])
    assert last(tables.pool_table(results)) == ["b-idp-4-x-8", "50.0 [50.0, 50.0]", "", "", "75.0 [75.0, 75.0]", "",
                                                "+0.500 [+0.250, +0.750]"]
    assert last(tables.twin_table(results)) == ["b-lora-rank-8", "25.0 [20.0, 30.0]", "25.0 [20.0, 30.0]", "", ""]
    assert cells(tables.inside_table(results).splitlines()[3]) == [
        "b-lora-rank-8", "0.6000", "[+0.1000, +0.3000]", "0.9500", "[-0.1000, +0.1000]"]
