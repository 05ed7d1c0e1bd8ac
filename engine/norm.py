"""
RMSNorm with its gradient written out: autograd walks through memory eight times for it, LayerNorm's kernel once.

With r = (mean x² + eps)^-½ and g the gradient of y = w r x, the gradient of x is r (w g - x r² mean(w g x)). The kernel
computes r (w g - mean(w g) - x r² mean(w g x)) where it is told that the mean of x is 0; what it subtracts too much,
r mean(w g), is added again. tests/test_model.py holds it to the definition, Zhang & Sennrich 2019 (arXiv 1910.07467).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, the same numbers; in float32 on a CPU with a faster gradient, of first order only."""

    def forward(self, x):
        """x (..., C) -> (..., C)."""
        trained = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if trained and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            return Norm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1), without x² in memory
        r = length.square_().div_(len(w)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, w)
        return (x * r).mul_(w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, r, w = ctx.saved_tensors
        zero, wanted = torch.zeros_like(r), [True, ctx.needs_input_grad[1], False]
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(g, x, w.shape, zero, r, w, None, wanted)
        return dx.add_((g @ w / len(w))[..., None] * r), dw, None
