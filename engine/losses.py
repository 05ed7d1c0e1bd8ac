"""
What training minimises: logits (B, T, V) and the batch they came from -> (B, T), one loss a token, in nats.

Distillation asks for the dense model's distribution, its likeliest tokens and one bucket for the rest, instead of the
one token that the text has (Hinton et al. 2015, arXiv 1503.02531).
"""
import torch
import torch.nn.functional as F


def inputs(batch):
    """The ids (B, T) that a model reads of a batch: ids (B, T + 1), or a tuple of `add_targets`."""
    return (batch[0] if isinstance(batch, tuple) else batch)[:, :-1]


def next_token(logits, batch):
    """Cross-entropy of the token that follows."""
    ids = batch[0] if isinstance(batch, tuple) else batch
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return loss.view(logits.shape[:2])  # (B, T)


@torch.no_grad()
def add_targets(teacher, batches, k=64):
    """[(ids (B, T + 1), log-probabilities (B, T, k), their tokens (B, T, k))]: the teacher's k
    likeliest next tokens, computed once a batch, however many students read them.
    """
    out = []
    for ids in batches:
        log_p = F.log_softmax(teacher(ids[:, :-1]).float(), dim=-1)  # (B, T, V)
        out.append((ids, *log_p.topk(min(k, log_p.shape[-1]), dim=-1)))
    return out


def distillation(logits, batch):
    """KL(teacher || student) over the teacher's k likeliest tokens and one bucket for the rest."""
    _, log_p, tokens = batch
    log_q = F.log_softmax(logits.float(), dim=-1).gather(-1, tokens)  # (B, T, k)
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = (1 - p.sum(-1)).clamp_min(1e-6), (1 - q.sum(-1)).clamp_min(1e-6)  # (B, T)
    return (p * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()


def objective(forward, losses=next_token):
    """What `fit` trains on: batch -> scalar, the mean of `losses` of the logits forward(ids)."""
    return lambda batch: losses(forward(inputs(batch)), batch).mean()
