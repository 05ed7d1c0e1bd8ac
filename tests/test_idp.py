"""The choice among prompts against the whole attention matrix, and what follows against the chosen prompt alone."""
import copy

import pytest
import torch

import idp
import recover
from idp import PromptPool, attention_scores, prefill, select
from study.repairs import pool_subject
from test_model import close, family, gpt, naive, naive_layer, tokens

LENGTHS = torch.tensor([3, 6, 5, 1])  # real tokens of four rows


def make_pool(*lengths, seed=3, loud=0.5):
    generator = torch.Generator().manual_seed(seed)
    return PromptPool([loud * torch.randn(n, 32, generator=generator) for n in lengths])


def whole_matrix(model, pool, row, layer=0):
    """A prompt's score by the rule, from one attention matrix over all prompts and the text (N, N).

    Prompts stand side by side, each ending at Pmax; a token of the text sees every prompt and, causally, the text; a
    token of a prompt sees its own prompt so far.
    """
    pieces = [*pool.prompts, model.wte(row)]
    owner = [m for m, piece in enumerate(pieces) for _ in piece]  # len(pool): the text
    longest, text = max(len(p) for p in pool.prompts), len(pool)
    positions = [p for prompt in pool.prompts for p in range(longest - len(prompt), longest)]
    positions += range(longest, longest + len(row))

    def alone(i, j):
        return owner[i] == owner[j] and j <= i

    def all_prompts(i, j):
        return alone(i, j) or (owner[i] == text and owner[j] < text)

    xs = list(torch.cat(pieces).detach().double().numpy())
    if model.config.position == "learned":
        table = model.wpe.weight.detach().double().numpy()
        xs = [x + table[p + model.config.position_offset] for x, p in zip(xs, positions)]
    for block in model.blocks[:layer]:  # to look at a later layer, text and prompts come there on their own
        xs, _ = naive_layer(model.config, block, xs, positions, alone)
    _, attention = naive_layer(model.config, model.blocks[layer], xs, positions, all_prompts)  # (nh, N, N)
    scores = []
    for m in range(len(pool)):
        columns = [j for j, o in enumerate(owner) if o == m]
        rows = [i for i, o in enumerate(owner) if o == text]
        scores.append(sum(attention[h, i, j] for h in range(len(attention)) for i in rows for j in columns)
                      / (len(attention) * len(rows) * len(columns)))
    return torch.tensor(scores)


def alone(model, pool, m, row):
    """Naive logits of a row under prompt m, at the place the pool gives it."""
    prompt, longest = pool.prompts[m], pool.longest
    start = longest - len(prompt)
    return naive(model, torch.cat([prompt, model.wte(row)]), range(start, longest + len(row)))[0][len(prompt):]


# ---- the choice

@family
@pytest.mark.parametrize("layer", [0, 1])
def test_the_choice_is_the_whole_matrixs(name, layer):
    """Mean over heads, real tokens and the prompt's own tokens; pads count for nothing; prompts of unequal length."""
    model, pool, ids = gpt(name), make_pool(4, 2, 5, 4), tokens(4, 6)
    scores = attention_scores(model, prefill(model, pool), ids, LENGTHS, layer)
    expected = torch.stack([whole_matrix(model, pool, row[:n], layer) for row, n in zip(ids, LENGTHS)])
    assert scores.shape == (4, 4)
    close(scores, expected, atol=1e-6)
    if layer == 0:
        assert select(model, pool, ids, LENGTHS).tolist() == expected.argmax(1).tolist()
        close(attention_scores(model, prefill(model, pool), ids[1:2]), expected[1:2], atol=1e-6)  # lengths: all of T


def test_the_rows_of_the_tests_choose_differently():
    model = gpt()
    assert len(set(select(model, make_pool(4, 2, 5, 4), tokens(40, 6)).tolist())) > 2


def test_length_buys_no_votes():
    """With queries of zero attention is even: each slot gets 1 / N, so every prompt the same, whatever its length."""
    model, pool, ids = gpt(), make_pool(1, 7, 3), tokens(2, 4)
    with torch.no_grad():
        model.blocks[0].attn.q.weight.zero_()
    expected = sum(1 / (11 + t + 1) for t in range(4)) / 4
    close(attention_scores(model, prefill(model, pool), ids), torch.full((2, 3), expected), atol=1e-7)


def test_scores_that_are_no_numbers_choose_nothing():
    """All of a softmax with a NaN in it is NaN, and the highest of nothing would be prompt 0, for every question."""
    model, pool = gpt(), make_pool(4, 2, 5)
    pool.prompts[2].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        select(model, pool, tokens(4, 6))
    for prompts in ([], [torch.zeros(0, 32), torch.ones(2, 32)]):
        with pytest.raises(ValueError, match="at least one prompt, and each prompt a token"):
            PromptPool(prompts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_16_bits_is_compared_in_32(dtype):
    """Prompts that attention tells apart by a thousandth: the probabilities of 16 bits would be the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 2, 5, 8), (4, 1, 5, 8), (3, 1, 2, 8)
    q, k, keys = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    scores = idp.mean_attention(q, k, keys, torch.zeros(3, dtype=torch.long))
    wide = idp.mean_attention(q.float(), k.float(), keys.float(), torch.zeros(3, dtype=torch.long))
    assert scores.dtype == torch.float32 and scores.unique().numel() == 12
    close(scores, wide, atol=2e-2)


def test_a_tie_goes_to_the_lowest_index():
    """Also where the same probabilities are added up in another order: many shapes, and scores made by hand."""
    model = gpt()
    for n, length, T, B in ((5, 4, 5, 8), (3, 5, 12, 1), (9, 2, 7, 3), (12, 1, 16, 1), (2, 16, 3, 8)):
        prompt = make_pool(length).prompts[0]
        assert select(model, PromptPool([prompt] * n), tokens(B, T)).tolist() == [0] * B
    by_hand = torch.tensor([[0.1, 0.3, 0.3 + 1e-7], [0.3, 0.301, 0.2], [-0.2, -0.1, -0.1], [0, 0, 0],
                            [0.3, 0.30003, 0.2]])  # the last: higher by 1e-4 of itself, which is no rounding error
    assert idp.highest(by_hand).tolist() == [1, 1, 1, 0, 1]


@family
def test_order_and_neighbours_do_not_matter(name):
    """P7: shuffle the pool and the same prompts win; leave rows out of the batch and the rest choose as before."""
    model, pool, ids = gpt(name), make_pool(4, 2, 5, 4), tokens(12, 6)
    lengths = torch.tensor([3, 6, 5, 1] * 3)
    chosen, order = select(model, pool, ids, lengths), [2, 0, 3, 1]
    shuffled = PromptPool([pool.prompts[m] for m in order])
    assert [order[m] for m in select(model, shuffled, ids, lengths).tolist()] == chosen.tolist()
    logits = idp.forward(model, pool, ids, lengths)
    close(idp.forward(model, shuffled, ids, lengths), logits, atol=1e-5)
    for rows in ([0], [5, 3], [11, 10, 2]):
        assert select(model, pool, ids[rows], lengths[rows]).tolist() == chosen[rows].tolist()
        close(idp.forward(model, pool, ids[rows], lengths[rows]), logits[rows], atol=1e-5)


def test_the_choice_reads_the_question_only():
    """P8: other tokens behind a row's length - an answer, padding - change no score at all."""
    model, pool, ids = gpt(), make_pool(4, 2, 5), tokens(4, 6)
    filled = prefill(model, pool)
    other = ids.clone()
    for b, n in enumerate(LENGTHS):
        other[b, n:] = (other[b, n:] + 7) % 50
    assert not torch.equal(ids, other)
    close(attention_scores(model, filled, other, LENGTHS), attention_scores(model, filled, ids, LENGTHS), atol=0)
    close(attention_scores(model, filled, ids[:, :3], LENGTHS.clamp_max(3)),
          attention_scores(model, filled, ids, LENGTHS.clamp_max(3)), atol=1e-7)


# ---- what follows

@family
@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 2, 3)])
def test_idp_is_the_chosen_prompt_alone(name, lengths):
    """P7: prefill and decode, in a padded batch, prompts of unequal length, equal that prompt with no pool around."""
    model, pool, ids, more = gpt(name), make_pool(*lengths), tokens(4, 6), tokens(4, 2, seed=5)
    chosen = torch.tensor([1, 2, 0, 1])
    for given in (None, chosen):
        picked = select(model, pool, ids, LENGTHS) if given is None else given
        logits = idp.forward(model, pool, ids, LENGTHS) if given is None else idp.under(
            model, prefill(model, pool), given, ids)
        cache = prefill(model, pool).repeat(picked, 6 + 2)
        close(model(ids, cache=cache, lengths=LENGTHS), logits, atol=1e-5)
        second = torch.cat([model(more[:, :1], cache=cache), model(more[:, 1:], cache=cache)], dim=1)
        assert logits.shape == (4, 6, 50)
        for b, (m, n) in enumerate(zip(picked.tolist(), LENGTHS.tolist())):
            expected = alone(model, pool, m, torch.cat([ids[b, :n], more[b]]))
            close(logits[b, :n], expected[:n])
            close(second[b], expected[n:])


@family
def test_one_prompt_in_the_pool_is_the_plain_prompt(name):
    """P7: to 1e-6 in float32, prefill and generation."""
    model, pool, ids = gpt(name), make_pool(5), tokens(3, 6)
    assert select(model, pool, ids).tolist() == [0, 0, 0]
    close(idp.forward(model, pool, ids), model(ids, prompt=pool.prompts[0]), atol=1e-5)
    assert (idp.forward(model, pool, ids) - model(ids, prompt=pool.prompts[0])).abs().max() < 1e-5
    lengths = torch.tensor([2, 6, 4])
    cache = prefill(model, pool).repeat(torch.zeros(3, dtype=torch.long), 6 + 4)
    plain = model.generate(ids, 4, lengths, prompt=pool.prompts[0])
    assert torch.equal(model.generate(ids, 4, lengths, cache=cache), plain)


@family
@torch.no_grad()
def test_the_choice_hands_the_first_layer_on(name):
    """Choose, gather and generate in one: the same tokens, cache and hidden states, bit for bit, as step by step."""
    model, pool, ids = gpt(name), make_pool(4, 2, 5), tokens(4, 6)
    filled = prefill(model, pool)
    chosen, first = idp.choose(model, pool, ids, LENGTHS, filled)
    assert chosen.tolist() == select(model, pool, ids, LENGTHS).tolist()
    cache, plain = filled.repeat(chosen, 6 + 3), filled.repeat(chosen, 6 + 3)
    assert torch.equal(model.hidden(ids, None, copy.deepcopy(cache), LENGTHS, first),
                       model.hidden(ids, None, copy.deepcopy(plain), LENGTHS))
    given, expected = (model.generate(ids, 3, LENGTHS, cache=c, first=f) for c, f in ((cache, first), (plain, None)))
    assert torch.equal(given, expected) and all(map(torch.equal, cache.kv, plain.kv))
    x, qkv = first
    other = x, [t + 1 for t in qkv]  # and what is handed on is used: another q, k, v is another answer
    assert not torch.equal(model.hidden(ids, None, filled.repeat(chosen, 6), LENGTHS, other),
                           model.hidden(ids, None, filled.repeat(chosen, 6), LENGTHS))


def test_equal_lengths_are_the_prompt_alone_in_float64():
    """The same sums in another shape: in double precision nothing but the last bits can differ."""
    model, pool, ids = gpt().double(), make_pool(4, 4).double(), tokens(3, 6)
    chosen = torch.tensor([1, 0, 1])
    logits = idp.under(model, prefill(model, pool), chosen, ids)
    for b, m in enumerate(chosen.tolist()):
        torch.testing.assert_close(logits[b], model(ids[b:b + 1], prompt=pool.prompts[m])[0], atol=1e-12, rtol=0)


def test_the_pools_cache_is_a_constant():
    """Answering reads it and never writes it: the winner's rows are copies."""
    model, pool, ids = gpt(), make_pool(4, 2), tokens(3, 5)
    with torch.no_grad():
        filled = prefill(model, pool)
    before = copy.deepcopy(filled)
    assert filled.kv[0].shape == (2, 2, 4, 4, 8)
    assert filled.first.tolist() == [0, 2] and filled.length.tolist() == [4, 4]
    cache = filled.repeat(torch.tensor([1, 0, 1]), 8)
    assert cache.kv[1].shape == (2, 3, 4, 12, 8) and (cache.slots, cache.used) == (12, 4)
    assert cache.first.tolist() == [2, 0, 2]
    assert torch.equal(cache.kv[1][:, 0, :, :4], filled.kv[1][:, 1]) and cache.kv[0][..., 4:, :].abs().max() == 0
    model.generate(ids, 3, cache=cache)
    filled.repeat(torch.tensor([0]), 0).kv[0].fill_(9)
    assert all(map(torch.equal, filled.kv, before.kv))
    assert torch.equal(filled.length, before.length) and torch.equal(filled.first, before.first)
    assert filled.used == before.used and filled.slots == before.slots
    with torch.no_grad():
        chosen = select(model, pool, ids, filled=filled)
        close(idp.under(model, filled, chosen, ids), idp.forward(model, pool, ids), atol=0)


def test_a_pool_checks_what_it_is_given():
    """P4: no prompts, prompts that do not fit the context."""
    with pytest.raises(ValueError, match="at least one"):
        PromptPool([])
    with pytest.raises(ValueError, match="33.*32"):
        prefill(gpt(), make_pool(2, 33))
    given = torch.ones(3, 32)
    pool = PromptPool([given, given])
    with torch.no_grad():
        pool.prompts[0].zero_()
    assert given.min() == 1 and pool.prompts[1].min() == 1 and (len(pool), pool.longest) == (2, 3)


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_a_text_that_leaves_no_room_is_an_error(name):
    """P4: prompts of up to 8 and a text of 25 tokens do not fit 32 positions; the message has the numbers."""
    model, pool = gpt(name), make_pool(3, 8)
    assert idp.forward(model, pool, tokens(1, 24)).shape == (1, 24, 50)
    for run in (lambda: idp.forward(model, pool, tokens(1, 25)), lambda: select(model, pool, tokens(1, 25)),
                lambda: prefill(model, pool).repeat(torch.tensor([0]), 25)):
        with pytest.raises(ValueError, match="32"):
            run()


# ---- training a pool

def by_hand(model, pool, batch):
    """Loss (M, B) of each row under each prompt: mean cross-entropy of its tokens, one row and one prompt at a time."""
    out = torch.zeros(len(pool), len(batch), dtype=torch.float64)
    for m in range(len(pool)):
        for b, row in enumerate(batch):
            log_p = alone(model, pool, m, row[:-1]).log_softmax(-1)
            out[m, b] = -sum(log_p[t, row[t + 1]] for t in range(len(row) - 1)) / (len(row) - 1)
    return out


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_competitive_is_the_lowest_loss(name):
    """Each row's loss is its minimum over the pool, and only the prompts that won a row get a gradient."""
    model, pool, batch = gpt(name).requires_grad_(False), make_pool(4, 2, 5, 3), tokens(3, 7)
    each = by_hand(model, pool, batch)
    value = idp.competitive(model, pool, recover.next_token)(batch)
    assert value.item() == pytest.approx(each.min(0).values.mean().item(), abs=1e-5)
    value.backward()
    winners = set(each.argmin(0).tolist())
    assert 0 < len(winners) < 4
    for m, prompt in enumerate(pool.prompts):
        assert (prompt.grad is not None and prompt.grad.abs().max() > 0) == (m in winners)


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_joint_is_the_selected_prompts_loss_and_a_balance(name):
    """The choice is made on the first `look` tokens; load = M sum_m (share of rows) (mean share of the score)."""
    model, pool, batch = gpt(name).requires_grad_(False), make_pool(4, 2, 5, 3), tokens(6, 7)
    scores = torch.stack([whole_matrix(model, pool, row[:3]) for row in batch])
    chosen, each = scores.argmax(1), by_hand(model, pool, batch)
    load = torch.tensor([(chosen == m).double().mean() for m in range(4)])
    share = (scores / scores.sum(1, keepdim=True)).mean(0)
    expected = each[chosen, torch.arange(6)].mean() + 0.3 * 4 * (load * share).sum()
    value = idp.joint(model, pool, recover.next_token, look=3, balance=0.3)(batch)
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    value.backward()
    assert all(prompt.grad.abs().max() > 0 for prompt in pool.prompts)  # the balance reaches those never chosen


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_side_by_side_trains_each_prompt_at_its_place(name):
    """Where it will stand: a shorter prompt of a model with learned positions too."""
    model, pool, batch = gpt(name).requires_grad_(False), make_pool(4, 2), tokens(3, 7)
    each = by_hand(model, pool, batch)
    value = idp.side_by_side(model, pool, recover.next_token)(batch)
    assert value.item() == pytest.approx((each[0, ::2].mean() + each[1, 1]).item(), abs=1e-5)
    value.backward()
    assert all(prompt.grad.abs().max() > 0 for prompt in pool.prompts)


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_selected_is_a_mixture_of_experts(name):
    """-log sum of gate times likelihood, a row at a time in float64; the gate reads the first `look` tokens."""
    model, pool, batch = gpt(name).requires_grad_(False), make_pool(4, 2, 5), tokens(5, 7)
    pool = PromptPool(list(pool.prompts), 9 * torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
    each, expected = by_hand(model, pool, batch), 0
    for b, row in enumerate(batch):
        x = torch.stack([model.blocks[0].norm1(model.wte(token)) for token in row[:3]]).mean(0).double() / 32
        gate = (pool.probe.double() @ x).softmax(0)
        expected -= sum(gate[m] * (-6 * each[m, b]).exp() for m in range(3)).log() / 6 / 5
    value = idp.selected(model, pool, recover.next_token, look=3)(batch)
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    value.backward()
    assert all(p.grad.abs().max() > 0 for p in pool.parameters()) and len(list(pool.parameters())) == 4


def test_the_probe_reads_the_question_only():
    """Other tokens behind a row's length, other neighbours: the same scores. A pool with a probe answers by it."""
    model, pool, ids = gpt(), make_pool(4, 2, 5), tokens(4, 6)
    pool = PromptPool(list(pool.prompts), torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
    scores = idp.probed(model, pool, ids, LENGTHS)
    other = torch.where(torch.arange(6) < LENGTHS[:, None], ids, (ids + 7) % 50)
    assert not torch.equal(ids, other)
    close(idp.probed(model, pool, other, LENGTHS), scores, atol=1e-7)
    for b, n in enumerate(LENGTHS.tolist()):
        close(idp.probed(model, pool, ids[b:b + 1, :n])[0], scores[b], atol=1e-7)
    chosen, _ = pool_subject(model, pool).choose(ids, LENGTHS)
    assert chosen.tolist() == scores.argmax(-1).tolist() and len(set(chosen.tolist())) > 1
    assert select(model, pool, ids, LENGTHS).tolist() == chosen.tolist()
    without = PromptPool(list(pool.prompts))
    chosen, _ = pool_subject(model, without).choose(ids, LENGTHS)
    assert chosen.tolist() == select(model, without, ids, LENGTHS).tolist()


def test_side_by_side_is_each_prompt_alone_on_its_rows():
    """Three prompts in one fit, and each in a fit of its own on every third row: the same loss, the same prompts."""
    model, batch, losses = gpt(), tokens(7, 9), recover.next_token
    together, apart = make_pool(4, 2, 5), make_pool(4, 2, 5)
    config = recover.FitConfig(steps=6, lr=3e-2, clip=0.01, clip_each=True)  # a clip that is always at work
    given = recover.fit(model, together.parameters(), [batch], idp.side_by_side(model, together, losses), config)
    alone = [recover.fit(model, [p], [batch[m::3]], recover.objective(lambda ids, p=p: model(ids, prompt=p), losses),
                         config) for m, p in enumerate(apart.prompts)]
    assert given == pytest.approx([sum(each) for each in zip(*alone)], abs=1e-4)
    for a, b, start in zip(together.prompts, apart.prompts, make_pool(4, 2, 5).prompts):
        close(a, b, atol=1e-5)
        assert (a - start).abs().max() > 1e-2
    with pytest.raises(ValueError, match="3 prompts take turns at a batch of 2 rows"):  # the mean over no row is NaN
        idp.side_by_side(model, together, losses)(batch[:2])


def test_fit_trains_the_pool_and_nothing_else():
    model, pool, batch = gpt(), make_pool(4, 2, 5), tokens(8, 9)
    before, start = copy.deepcopy(model.state_dict()), [p.detach().clone() for p in pool.prompts]
    for loss in (idp.joint(model, pool, recover.next_token), idp.competitive(model, pool, recover.next_token)):
        losses = recover.fit(model, pool.parameters(), [batch], loss, recover.FitConfig(steps=15, lr=3e-2))
        assert losses[-1] < losses[0]
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(start, pool.prompts))
    assert all(p.grad is None for p in model.parameters())


def test_choosing_leaves_no_graph():
    model, pool = gpt(), make_pool(4, 2)
    assert not select(model, pool, tokens(2, 4)).requires_grad
    prefill(model, pool).kv[0][0].sum().backward()  # but training can go through the pool's keys
    assert all(p.grad.abs().max() > 0 for p in pool.prompts)


def test_rows_taken_twice_are_those_of_the_cache_in_hand():
    """What was written behind a prompt is taken along, not what stood in the pool's own cache."""
    model = gpt().requires_grad_(False)
    pool = PromptPool([torch.randn(n, model.config.n_embd, generator=torch.Generator().manual_seed(n)) for n in (2, 3)])
    with torch.no_grad():
        cache = prefill(model, pool).repeat(torch.tensor([1, 0]), 4)
        model.hidden(torch.tensor([[5, 6], [7, 8]]), cache=cache)
        again = cache.repeat(torch.tensor([1]), 1)
    for once, twice in zip(cache.kv, again.kv):
        assert torch.equal(twice[:, 0, :, :once.shape[3]], once[:, 1])
