"""
The look inside: why attention should choose well - does it? - and what repairs do to attention and activations.

    selectors     one pool, every way to choose from it, and what each costs: attention-max (the paper's rule),
                  attention-min, random, each prompt alone, the best single one (chosen on validation people), all
                  concatenated, ensemble, most confident, and the per-question oracle beside the two floors without
                  which an oracle shows nothing
    correlation   of a prompt's attention score with the log-probability it gives the right answer, question by question
    similarity    of attention rows and block outputs to the dense model's, by layer and head (the paper's section 5)

What it leaves out: causal interventions on single heads.
"""
import numpy as np
import torch
import torch.nn.functional as F

from world.facts import pad
import idp
from model import take
from recover import prompt_init
from study.statistics import interval, resampled
from world.score import Subject, answer, gold_logprobs, is_right, tokenized, until_stop


def always(m):
    """A `choose` that takes row m for every input."""
    return lambda ids, lengths: torch.full((len(ids),), m)


@torch.no_grad()
def under_each(model, pool, facts, encoding):
    """Every fact (N) under every prompt (M) of the pool -> {name: (N, M)}:

    right        1.0 where the answer is right        logprob  of the right answer, nats
    confidence   log-probability of the answer given  attention, attention_last: the score in the first, the last layer
    probe        the score by the pool's probe, if it has one
    """
    filled = idp.prefill(model, pool)
    if facts[0].options is not None:
        return chosen_under_each(model, pool, filled, facts, encoding)
    rows, right, logprob, confidence = tokenized(facts, encoding), [], [], []
    for m in range(len(pool)):
        subject = Subject(model, filled, always(m))
        given = answer(subject, facts, encoding)
        right.append([float(a["correct"]) for a in given])
        logprob.append([a["logprob"] for a in given])
        own = [(question, encoding.encode_ordinary(" " + a["answer"])) for (question, _), a in zip(rows, given)]
        confidence.append(gold_logprobs(subject, own, torch.full((len(own),), m), encoding))
    return {"right": torch.tensor(right).T, "logprob": torch.tensor(logprob).T,
            "confidence": torch.tensor(confidence).T,
            **scores(model, pool, filled, *pad([question for question, _ in rows], encoding))}


def chosen_under_each(model, pool, filled, facts, encoding):
    """`under_each` for facts with options; "shares" has the options' probabilities, for each prompt a list of
    (options,) a fact."""
    given = [answer(Subject(model, filled, always(m)), facts, encoding) for m in range(len(pool))]
    shares = [[torch.tensor(a["logprobs"]).softmax(0) for a in answers] for answers in given]
    rows = [[encoding.eot_token, *encoding.encode_ordinary(f.question)] for f in facts]
    return {"right": torch.tensor([[float(a["correct"]) for a in answers] for answers in given]).T,
            "logprob": torch.tensor([[a["logprob"] for a in answers] for answers in given]).T,
            "confidence": torch.tensor([[float(p.max()) for p in row] for row in shares]).T, "shares": shares,
            **scores(model, pool, filled, *pad(rows, encoding))}


def scores(model, pool, filled, ids, lengths):
    """What a choice can go by before any prompt has been tried: the last three of `under_each`, each (N, M)."""
    first, last = (torch.cat([idp.attention_scores(model, filled, part, n, layer)
                              for part, n in zip(ids.split(250), lengths.split(250))])
                   for layer in (0, len(model.blocks) - 1))  # each (N, M)
    probe = {} if pool.probe is None else {"probe": idp.probed(model, pool, ids, lengths)}
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
        "all concatenated": (under_each(model, joined, facts, encoding)["right"][:, 0], 0),
        "ensemble of probabilities": (ensemble(model, pool, facts, encoding, each), M - 1),
        "oracle": (right.amax(1), M - 1),
        "floor: oracle over an untuned pool": (under_each(model, untuned, facts, encoding)["right"].amax(1), M - 1),
        f"floor: compressed model, gold among its top {M}": (in_top(Subject(model), facts, encoding, M), 0),
    }
    return out, each


def ensemble(model, pool, facts, encoding, each, batch_size=250):
    """(N,) right or not by the mean of the M prompts' probabilities: of the options (`each` is what `under_each` gave),
    or of the next token, decoding greedily."""
    if facts[0].options is not None:
        return torch.tensor([float(int(sum(p).argmax()) == f.gold) for f, *p in zip(facts, *each["shares"])])
    filled, rows, out = idp.prefill(model, pool), tokenized(facts, encoding), []
    longest = max(len(gold) for _, gold in rows) + 1
    for i in range(0, len(rows), batch_size):
        part = rows[i:i + batch_size]
        ids, lengths = pad([question for question, _ in part], encoding)  # (B, T)
        caches = [take(filled, torch.full((len(part),), m), ids.shape[1] + longest) for m in range(len(pool))]
        x = [model.hidden(ids, cache=c, lengths=lengths)[torch.arange(len(part)), lengths - 1][:, None] for c in caches]
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
        ids, lengths = pad([question + gold[:-1] for question, gold in part], encoding)
        chosen = subject.pick(ids, lengths)
        logits = subject.model(ids, cache=subject.cache(chosen, ids.shape[1]))  # (B, T, V)
        logits = logits[torch.arange(len(part)), lengths - 1]  # (B, V)
        gold = torch.tensor([gold[-1] for _, gold in part])
        out.append((logits.topk(M, dim=-1).indices == gold[:, None]).any(-1).float())
    return torch.cat(out)


def rank_correlation(a, b):
    """(N,) Spearman's correlation of each row of a (N, M) with the same row of b (N, M)."""
    ranks = [x.argsort(1).argsort(1).double() - (x.shape[1] - 1) / 2 for x in (a, b)]
    return (ranks[0] * ranks[1]).sum(1) / ranks[0].square().sum(1)


# ---- what repairs do inside

@torch.no_grad()
def inside(subject, ids):
    """What happens in each layer on text ids (B, T): attention rows over text tokens, renormalised (L, B, nh, T, T),
    and block outputs (L, B, T, C).
    """
    model, (B, T) = subject.model, ids.shape
    cache = subject.cache(subject.pick(ids, torch.full((B,), T)), T)
    positions = cache.length[:, None] + torch.arange(T)  # (B, T)
    slot = torch.arange(cache.slots)
    mask = ((slot <= positions[:, :, None]) & (slot >= cache.first[:, None, None]))[:, None]  # (B, 1, T, S)
    x, attention, outputs = model.place(model.wte(ids), positions), [], []
    for i, block in enumerate(model.blocks):
        q, _, _ = block.attn.qkv(block.norm1(x), positions)  # (B, nh, T, hs)
        x = block(x, positions, mask, (cache.k[i], cache.v[i]))  # fills the cache with this layer's keys
        k = cache.k[i].repeat_interleave(q.shape[1] // cache.k[i].shape[1], dim=1)  # (B, nh, S, hs)
        score = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        attention.append(score[..., -T:].softmax(-1))  # text alone: what a loud prompt leaves may be 0.0
        outputs.append(x)
    return torch.stack(attention), torch.stack(outputs)


def similarity(subject, dense, ids):
    """Cosine similarity to the dense model on ids (B, T): {"attention": [[a head] a layer], "output": [a layer]}, and
    the means over layers and heads, one a text: {"texts": {"attention": [..], "output": [..]}}.
    """
    (a, x), (b, y) = inside(subject, ids), inside(dense, ids)
    rows = F.cosine_similarity(a, b, dim=-1)[..., 1:].mean(-1)  # (L, B, nh); the first row has one entry only
    outputs = F.cosine_similarity(x, y, dim=-1).mean(-1)  # (L, B)
    return {"attention": rows.mean(1).tolist(), "output": outputs.mean(1).tolist(),
            "texts": {"attention": rows.mean(dim=(0, 2)).tolist(), "output": outputs.mean(0).tolist()}}


def nearer(after, before, seed):
    """How much nearer to the dense model a repair brought attention and outputs: {name: 95 % interval} over texts."""
    generator = torch.Generator().manual_seed(seed)
    change = np.array([np.subtract(after[name], before[name]) for name in ("attention", "output")]).T  # (texts, 2)
    samples = resampled(change, 10_000, generator).numpy()
    return {name: interval(samples[:, i]) for i, name in enumerate(("attention", "output"))}


# ---- of results.json, as Markdown tables

def pool_table(results):
    """Every pool in one row: what its choice reaches, and what the best choice would, beside an oracle's floor."""
    short = {"rule": "attention-max (the paper's rule)", "probe": "probe trained with the prompts",
             "best single": "best single on validation", "oracle": "oracle",
             "floor": "floor: oracle over an untuned pool"}
    lines = [f"| pool | {' | '.join(short)} | rank correlation |", "|---" + "|---:" * (1 + len(short)) + "|"]
    for m in results["models"]:
        if m.get("idp"):
            rows, c = {row["name"]: row for row in m["idp"]["selectors"]}, m["idp"]["correlation"]
            cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (rows[n]["recall"], *rows[n]["interval"])))
                     if n in rows else "" for n in short.values()]
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(c["rho"], *c["interval"]))
            lines.append(f"| {m['id']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def twin_table(results):
    """Each repair trained by distillation beside its twin on the next token: what came back and what was re-learned."""
    where = {m["id"]: m for m in results["models"]}
    lines = ["| repair | displaced %, distilled | next token | re-learned %, distilled | next token |",
             "|---|---:|---:|---:|---:|"]
    for name, m in where.items():
        twin = where.get(f"{name}-next-token")
        if twin:
            cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (t["metrics"][key], *t["intervals"][key])))
                     if t["metrics"][key] is not None else "" for key in ("displaced", "relearned") for t in (m, twin)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def inside_table(results):
    """How near each model's attention and block outputs are to the dense model's, as a Markdown table."""
    lines = ["| model | attention | change by repair | output | change by repair |", "|---" + "|---:" * 4 + "|"]
    for m in results["models"][1:]:
        cells = []
        for name in ("attention", "output"):
            bounds = m["similarity"].get("nearer", {}).get(name)
            cells.append(f"{np.mean(m['similarity']['texts'][name]):.4f} | "
                         + ("[{:+.4f}, {:+.4f}]".format(*bounds) if bounds else ""))
        lines.append(f"| {'' if m['base'] == 'dense' else '+ '}{m['tag']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def attribute_table(results):
    """Recall by attribute, seen and held-out together, as a Markdown table."""
    names = list(results["models"][0]["attributes"])
    lines = [f"| model | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    for m in results["models"]:
        tag = m["tag"] if m["base"] in (None, "dense") else "+ " + m["tag"]
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in m["attributes"][name])) for name in names]
        lines.append(f"| {tag} | {' | '.join(cells)} |")
    return "\n".join(lines)


def file_table(results):
    """The scores on task files, as a Markdown table, a row a model."""
    names = [m["name"] for m in results["metrics"] if m["name"].split(" ")[0] in results["files"]]
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for m in results["models"]:
        cells = [f"{m['metrics'][name]:.3f} [{m['intervals'][name][0]:.3f}, {m['intervals'][name][1]:.3f}]"
                 for name in names]
        lines.append(f"| {m['id']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def selector_table(model):
    """The ways to choose from one pool, as a Markdown table."""
    lines = ["| choice | held-out % | over the paper's rule, points | extra passes |", "|---|---:|---:|---:|"]
    for row in model["idp"]["selectors"]:
        low, high = row["interval"]
        over = "[{:+.1f}, {:+.1f}]".format(*(100 * x for x in row["over_rule"]))
        lines.append(f"| {row['name']} | {100 * row['recall']:.1f} [{100 * low:.1f}, {100 * high:.1f}] "
                     f"| {over} | {row['extra_passes']} |")
    c = model["idp"]["correlation"]
    bounds = "[{:+.3f}, {:+.3f}]".format(*c["interval"])
    return "\n".join(lines) + (f"\n\nrank correlation of attention with the right answer's log-probability: "
                              f"{c['rho']:+.3f} {bounds}; chosen: {model['idp']['chosen']}")
