"""
Products in float32 on a CPU by oneDNN, which PyTorch comes with; it asks MKL, which is slower at this study's shapes.

Where both have AVX2 oneDNN is 1.1 to 1.2 times as fast, on AMD with AVX512, where MKL stays with AVX2, 2.1 to 2.2 times
(tests/bench_train.py prints it). It adds in another order: last digits differ.
"""
import torch
import torch.nn.functional as F

HAVE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
LEAST = 1 << 21  # multiplications of a product that is worth the 10 µs of asking


class Linear(torch.nn.Linear):
    """nn.Linear; on a CPU large products in float32 are faster, and so are their gradients, of first order only."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def linear(x, W, bias=None):
    """F.linear: x (..., in), W (out, in), bias (out,) -> (..., out)."""
    fast = (HAVE and x.device.type == "cpu" and x.dtype == W.dtype == torch.float32 and x.numel() * len(W) > LEAST
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())
    return Product.apply(x, W, bias) if fast else F.linear(x, W, bias)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W)
        return by_onednn(x, W, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, W), (dx, dW, db), rows = ctx.saved_tensors, ctx.needs_input_grad, g.flatten(0, -2)  # (n, out)
        dW = by_onednn(rows.mT, x.flatten(0, -2).mT) if dW else None
        return by_onednn(g, W.mT) if dx else None, dW, rows.sum(0) if db else None


def by_onednn(x, W, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
