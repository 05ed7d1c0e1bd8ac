"""
The table of rotary angles; and q, k and v while their weights are trained on a CPU: one product, and a rotation that
multiplies complex numbers.

Where both members of a pair (a, b) stand side by side, as a + ib, turning it is multiplying it by cos + i sin: one pass
over memory instead of four, forward and backward alike. So the rows of q's and k's weights are put into that order
first. Attention does not notice, as both are reordered alike; but keys in a cache have the plain order, so that all who
read or write one take the plain form, `Attention.qkv`. tests/test_model.py holds the two together.
"""
import math

import torch

from engine.products import Linear, linear


def rope_table(config):
    """cos and sin of every angle, (context, 2, hs / 2).

    Position t turns pair i by the angle t * theta^(-2i / hs).
    """
    hs = config.head_size
    pair = torch.arange(0, hs, 2, dtype=torch.float64)
    frequency = config.rope_theta ** (-pair / hs)  # (hs / 2,)
    s = config.rope_scaling
    if s:  # Llama 3: slow rotations are slowed by `factor`, fast ones kept, those between blended
        turns = s["original_context"] * frequency / (2 * math.pi)  # in the original context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / s["factor"]
    position = torch.arange(config.context, dtype=torch.float64)
    angle = position[:, None] * frequency  # (context, hs / 2)
    return torch.stack([angle.cos(), angle.sin()], dim=1).float()  # (context, 2, hs / 2)


def trains(attention, x):
    """Whether `qkv` can stand in for `attention.qkv`: q, k and v are plain layers on their way to a gradient.

    Frozen ones are not put together: the copy of their weights would have to be kept until the gradient of x is known.
    """
    layers = attention.q, attention.k, attention.v
    return (torch.is_grad_enabled() and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
            and all(type(layer) is Linear and layer.weight.requires_grad and layer.weight.dtype == torch.float32
                    and not layer._forward_pre_hooks for layer in layers)
            and len({layer.bias is None for layer in layers}) == 1)


def qkv(attention, x, positions):
    """As `attention.qkv(x, positions)`: q (B, nh, T, hs), k, v (B, nkv, T, hs), the pairs of q and k side by side."""
    (B, T, _), hs, turned = x.shape, attention.head_size, attention.rope is not None
    layers = attention.q, attention.k, attention.v
    sizes = [layer.out_features for layer in layers]

    def together(q, k, v):
        """The weights, or the biases, of the three layers as one."""
        return torch.cat([in_pairs(q, hs), in_pairs(k, hs), v] if turned else [q, k, v])

    weight = together(*(layer.weight for layer in layers))  # (sum of sizes, C)
    bias = None if attention.q.bias is None else together(*(layer.bias for layer in layers))
    y = linear(x, weight, bias)  # (B, T, sum of sizes)
    qk, v = y.split([sizes[0] + sizes[1], sizes[2]], dim=2)
    if turned:
        cos, sin = attention.rope[positions].unbind(dim=2)  # each (B or 1, T, hs / 2)
        turn = torch.complex(cos, sin).repeat(1, 1, qk.shape[2] // hs)  # once a head: long rows are multiplied faster
        qk = torch.view_as_real(torch.view_as_complex(qk.unflatten(2, (-1, 2))) * turn).flatten(2)
    return tuple(t.view(B, T, -1, hs).transpose(1, 2) for t in (*qk.split(sizes[:2], dim=2), v))


def in_pairs(t, hs):
    """t (heads * hs, ...) with the rows i and i + hs/2 of each head one behind the other."""
    return t.unflatten(0, (-1, 2, hs // 2)).transpose(1, 2).flatten(0, 2)
