"""
One pool of prompts, every way to choose from it: does attention choose well?

    attention-max (the paper's rule), attention-min, random, each prompt alone, the best single one (chosen on
    validation people), all concatenated, ensemble, most confident, and the per-question oracle beside the two floors
    without which an oracle shows nothing; and the rank correlation of a prompt's attention score with the
    log-probability that it gives the right answer, question by question.

What it leaves out: a choice made again during the answer.
"""
import math

import torch

import idp
from recover import prompt_init
from study.repairs import make_pool
from study.statistics import by_person, interval, rank_correlation, recall_interval, resampled
from world.facts import pad
from world.score import Subject, always, answer, choose_option, is_right, tokenized, until_stop


def under_each_prompt(model, pool):
    """M Subjects: the model behind each prompt of the pool, whatever is asked."""
    filled = idp.prefill(model, pool)
    return [Subject(model, filled, always(m)) for m in range(len(pool))]


@torch.no_grad()
def under_each(model, pool, facts, encoding):
    """Every fact (N) under every prompt (M) of the pool -> {name: (N, M)}:

    right        1.0 where the answer is right        logprob  of the right answer, nats
    confidence   log-probability of the answer given; of facts with options its probability among these
    attention, attention_last  the score in the first, the last layer
    probe        the score by the pool's probe, if it has one

    Facts with options also have "shares": for each prompt a list of the options' probabilities, (options,) a fact.
    """
    subjects, confidence = under_each_prompt(model, pool), []
    given = [answer(subject, facts, encoding) for subject in subjects]  # M lists of N
    each = {name: torch.tensor([[float(a[key]) for a in answers] for answers in given]).T
            for name, key in (("right", "correct"), ("logprob", "logprob"))}
    if facts[0].options is None:
        rows = [question for question, _ in tokenized(facts, encoding)]
        for subject, answers in zip(subjects, given):
            own = [f._replace(options=(" " + a["answer"],)) for f, a in zip(facts, answers)]
            confidence.append([a["logprobs"][0] for a in choose_option(subject, own, encoding)])
    else:
        rows = [[encoding.eot_token, *encoding.encode_ordinary(f.question)] for f in facts]
        each["shares"] = [[torch.tensor(a["logprobs"]).softmax(0) for a in answers] for answers in given]
        confidence = [[float(p.max()) for p in shares] for shares in each["shares"]]
    return {**each, "confidence": torch.tensor(confidence).T,
            **scores(model, pool, subjects[0].filled, *pad(rows, encoding, model.wte.weight.device))}


@torch.no_grad()
def right_under_each(model, pool, facts, encoding):
    """(N, M) of `under_each` alone: 1.0 where a fact is answered right under a prompt."""
    given = [answer(subject, facts, encoding) for subject in under_each_prompt(model, pool)]
    return torch.tensor([[float(a["correct"]) for a in answers] for answers in given]).T


def scores(model, pool, filled, ids, lengths):
    """What a choice can go by before any prompt has been tried: the last three of `under_each`, each (N, M)."""
    first, last = (torch.cat([idp.attention_scores(model, filled, part, n, layer)
                              for part, n in zip(ids.split(250), lengths.split(250))]).cpu()
                   for layer in (0, len(model.blocks) - 1))  # each (N, M)
    probe = {} if pool.probe is None else {"probe": idp.probed(model, pool, ids, lengths).cpu()}
    return {"attention": first, "attention_last": last, **probe}


@torch.no_grad()
def selectors(encoding, model, pool, facts, validation, generator):
    """Every way to choose from one pool on the same questions: {name: (right (N,) in [0, 1], extra passes a
    question)}, and the table of `under_each` behind it.

    facts       to answer
    validation  other people's facts, which choose the best single prompt and tell how loud each prompt is
    """
    each, tuning = (under_each(model, pool, f, encoding) for f in (facts, validation))
    right, M = each["right"], len(pool)

    def took(score):
        return right.gather(1, idp.highest(score)[:, None])[:, 0]
    loudness = tuning["attention"].mean(0)  # (M,) the attention a prompt draws whatever is asked
    joined = idp.PromptPool([torch.cat(list(pool.prompts))])
    untuned = idp.PromptPool([prompt_init(model, len(p), generator=generator) for p in pool.prompts])
    out = {
        "attention-max (the paper's rule)": (took(each["attention"]), 0),
        "attention-min": (took(-each["attention"]), 0),
        "attention-max over a prompt's mean": (took(each["attention"] / loudness), 0),
        "attention-max in the last layer": (took(each["attention_last"]), 1),
        **({"probe trained with the prompts": (took(each["probe"]), 0)} if "probe" in each else {}),
        "random": (right.mean(1), 0),
        **{f"prompt {m} alone": (right[:, m], 0) for m in range(M)},
        "best single on validation": (right[:, tuning["right"].mean(0).argmax()], 0),
        "most confident": (took(each["confidence"]), M - 1),
        "all concatenated": (right_under_each(model, joined, facts, encoding)[:, 0], 0),
        "ensemble of probabilities": (ensemble(model, pool, facts, encoding, each), M - 1),
        "oracle": (right.amax(1), M - 1),
        "floor: oracle over an untuned pool": (right_under_each(model, untuned, facts, encoding).amax(1), M - 1),
        f"floor: compressed model, gold among its top {M}": (in_top(Subject(model), facts, encoding, M), 0),
    }
    return out, each


def ensemble(model, pool, facts, encoding, each):
    """(N,) right or not by the mean of the M prompts' probabilities: of the options (`each` is what `under_each` gave),
    or of the next token, decoding greedily."""
    if facts[0].options is not None:
        return torch.tensor([float(int(sum(p).argmax()) == f.gold) for f, *p in zip(facts, *each["shares"])])
    filled, rows, out = idp.prefill(model, pool), tokenized(facts, encoding), []
    longest = max(len(gold) for _, gold in rows) + 1
    for i in range(0, len(rows), 250):
        part = rows[i:i + 250]
        ids, lengths = pad([question for question, _ in part], encoding, model.wte.weight.device)  # (B, T)
        last = torch.arange(len(part), device=ids.device), lengths - 1
        caches = [filled.repeat(torch.full((len(part),), m, device=ids.device), ids.shape[1] + longest)
                  for m in range(len(pool))]
        x = [model.hidden(ids, cache=c, lengths=lengths)[last][:, None] for c in caches]
        tokens = []
        for _ in range(longest):
            p = torch.stack([model.head(x_m)[:, -1].softmax(-1) for x_m in x]).mean(0)  # (B, V)
            tokens.append(p.argmax(-1))
            x = [model.hidden(tokens[-1][:, None], cache=c) for c in caches]
        for b, row in enumerate(torch.stack(tokens, dim=1).tolist()):
            text, ended = until_stop(row, encoding)
            out.append(float(ended and is_right(text, facts[i + b].answer)))
    return torch.tensor(out)


def in_top(subject, facts, encoding, M):
    """(N,) whether the right option, or the last token of the right answer, the tokens before it given, is among the M
    likeliest."""
    if facts[0].options is not None:
        return torch.tensor([float(sum(p > a["logprob"] for p in a["logprobs"]) < M)
                             for a in answer(subject, facts, encoding)])
    rows, out = tokenized(facts, encoding), []
    for i in range(0, len(rows), 250):
        part = rows[i:i + 250]
        ids, lengths = pad([question + gold[:-1] for question, gold in part], encoding, subject.device)
        logits = subject.logits(ids)  # (B, T, V)
        logits = logits[torch.arange(len(part), device=ids.device), lengths - 1]  # (B, V)
        gold = torch.tensor([gold[-1] for _, gold in part]).to(ids.device)
        out.append((logits.topk(M, dim=-1).indices == gold[:, None]).any(-1).float().cpu())
    return torch.cat(out)


def try_selectors(run, subject, base):
    """Every way to choose from a repaired subject's pool on each fact, and attention against log-probability."""
    world, people = run.world, run.config.selector_people
    facts, validation = (world.facts(split, people) for split in ("heldout", "validation"))
    pool = make_pool("idp", subject.about["operation"]["parameters"]["size"], subject.about["tensors"])
    generator = torch.Generator().manual_seed(run.config.seed + 4)
    out, each = selectors(world.encoding, base.model, pool, facts, validation, generator)
    chosen = idp.highest(each.get("probe", each["attention"]))  # what the subject itself goes by
    by_attribute = {a: torch.bincount(chosen[[f.attribute == a for f in facts]], minlength=len(pool)).tolist()
                    for a in dict.fromkeys(f.attribute for f in facts)}
    gain = each["logprob"] - each["logprob"].mean(1, keepdim=True)
    points = torch.stack([each["attention"], gain], dim=-1)  # (N, M, 2)
    points = points[::max(1, gain.numel() // 250)].flatten(0, 1)  # of fewer questions, every prompt
    rho = rank_correlation(each["attention"], each["logprob"])
    return {"rows": [{"name": name, "right": right.tolist(), "passes": n} for name, (right, n) in out.items()],
            "rho": [None if math.isnan(r) else r for r in rho.tolist()],
            "chosen": torch.bincount(chosen, minlength=gain.shape[1]).tolist(), "by_attribute": by_attribute,
            "points": points.tolist()}


def with_intervals(tried, facts, seed):
    """What `try_selectors` found, with intervals over people in place of single facts; `facts` are those it asked. The
    correlation is a mean over the facts that have one, and None where there is none: all prompts alike to every fact.
    """
    def over_people(columns, facts):
        """Sums by person (people, columns), the facts of each (people,), and (resamples, columns) of the means."""
        people, sizes = by_person(columns, facts)
        drawn = resampled(people, 10_000, torch.Generator().manual_seed(seed + 5), sizes).numpy()
        return people, sizes, drawn
    right, sizes, samples = over_people([row["right"] for row in tried["rows"]], facts)
    rule, correlation = samples[:, 0], None
    rows = [{"name": row["name"], "recall": float(right[:, i].sum() / sizes.sum()),
             "interval": recall_interval(right[:, i], sizes, samples[:, i]),
             "over_rule": interval(samples[:, i] - rule), "extra_passes": row["passes"]}
            for i, row in enumerate(tried["rows"])]
    ranked = [(rho, fact) for rho, fact in zip(tried["rho"], facts) if rho is not None]
    if ranked:
        sums, asked, drawn = over_people([[rho for rho, _ in ranked]], [fact for _, fact in ranked])
        correlation = {"rho": float(sums.sum() / asked.sum()), "interval": interval(drawn[:, 0])}
    return {"selectors": rows, "correlation": correlation,
            **{key: tried[key] for key in ("chosen", "by_attribute", "points")}}
