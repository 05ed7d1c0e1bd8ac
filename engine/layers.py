"""The linear layers of a model: found by name, watched while it runs, and a report row for each after compression."""
import contextlib
import functools

import torch
import torch.nn as nn

from engine.grids import check_finite

LARGEST = 1e18  # a model's weight: what its report is made of, sums of squares, must be numbers


@contextlib.contextmanager
def watched(block, mask, sums):
    """While open, x xᵀ of each linear layer's inputs where mask (B, T) is true is added to sums[name] (in, in)."""
    seen = [None, None]  # the tensor that came by last, and its sum

    def look(name, layer, inputs):
        if inputs[0] is not seen[0]:
            X = inputs[0][mask]  # (tokens, in)
            X = X if X.dtype == torch.float64 else X.float()
            if name not in sums:
                sums[name] = X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
            seen[:] = inputs[0], sums[name].add_(X.T @ X)
        sums[name] = seen[1]

    hooks = [layer.register_forward_pre_hook(functools.partial(look, name)) for name, layer in linears(block).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linears(block):
    """{name: layer} of a block's linear layers."""
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}


def check_ids(model, ids):
    if ids.dim() != 2 or 0 in ids.shape or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be whole numbers (N, T), at least 1 x 1, got {ids.dtype} of {tuple(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= model.config.vocab_size:
        raise ValueError(f"ids must be in [0, {model.config.vocab_size}), the model's vocabulary, got {int(ids.min())} "
                         f"to {int(ids.max())}")


def find_targets(model, config):
    """{full name: weight} of the layers that config.targets names, by default every linear layer of the blocks.

    Raises ValueError for a name that is none, a layer that is packed already, a weight with NaN or beyond LARGEST.
    """
    if config.n_m and config.n_m[1] > 256:
        raise ValueError("N:M layers are packed with M of at most 256, got {}:{}".format(*config.n_m))
    if isinstance(config.targets, str):
        raise ValueError(f"targets must be a list of layer names, got the text {config.targets!r}")
    if config.targets is not None and not config.targets:
        raise ValueError("targets is an empty list: nothing would be compressed; None means every layer")
    found = {f"blocks.{i}.{name}": layer for i, block in enumerate(model.blocks)
             for name, layer in linears(block).items()}
    packed = {name for name, layer in model.named_modules() if hasattr(layer, "packed")}

    def named(names, target):
        return [name for name in names if name == target or name.endswith("." + target)]
    for target in config.targets or ():
        if named(packed, target):
            raise ValueError(f"{target} is compressed already: {named(packed, target)[0]}; start from the dense model")
        if not named(found, target):
            names = ", ".join(sorted({name.split(".", 2)[2] for name in found}))
            raise ValueError(f"no linear layer {target} to compress; there are {names or 'none'}")
    if not found:
        raise ValueError(f"no linear layer to compress: {len(packed)} are packed already, start from the dense model")
    wanted = {name: layer.weight for name, layer in found.items()
              if config.targets is None or any(named([name], target) for target in config.targets)}
    for name, weight in wanted.items():
        check_finite(weight, f"the weight of {name}")
        largest = max(abs(float(end)) for end in weight.detach().aminmax())
        if largest > LARGEST:
            raise ValueError(f"the weight of {name} holds {largest:.3g}, and squares of more than {LARGEST:g} overflow")
    return wanted


# ---- the report

def output_error(D, H):
    """tr(D H Dᵀ): the mean over tokens of |x Dᵀ|², what a change D (out, in) of a weight does to its output."""
    return float(((D @ H) * D).sum(dtype=torch.float64).clamp(min=0))


def histogram(change, bins=29):
    """{"edges": bins + 1 numbers, "counts": bins whole ones} of the values in `change`: bins of one width, 0 in the
    middle of the middle one, out to the largest change on either side. The edges are rounded to four digits."""
    most = float(change.abs().max()) or 1.0  # nothing changed: any width will do
    parts = change.flatten().split(1 << 24)  # histc counts in float32, which has no whole numbers beyond 2^24
    counts = sum(torch.histc(part.float(), bins, -most, most).long() for part in parts)
    return {"edges": [float(f"{most * (2 * k / bins - 1):.4g}") for k in range(bins + 1)], "counts": counts.tolist()}


def report_row(W, H, swept, plain, factored, config):
    """The row of one weight W (out, in), see `compress`; swept is what has become of it, plain by the simplest way."""
    new, n, rms = swept.dequantize(), W.shape[1], float(W.square().mean().sqrt())
    D = W - new
    zeros, after, size = float((new == 0).float().mean()), output_error(D, H), output_error(W, H)
    return {"shape": list(W.shape), "method": config.method, "bits": config.bits or 32,
            "group_size": min(config.group_size or n, n),
            "zeros": zeros, "sparsity": zeros if swept.keep is not None else 0.0,
            "damp": factored.damp if factored else 0.0, "retries": factored.retries if factored else 0,
            "repeated_rows": swept.repeated,
            "error_before": output_error(W - plain.dequantize(), H), "error_after": after,
            "relative_output_error": (after / size)**0.5 if size else 0.0,
            "weight_change": float(D.norm() / W.norm().clamp(min=1e-30)),
            "histogram": histogram((new - W) / max(rms, 1e-30))}
