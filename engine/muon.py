"""
Muon: momentum whose step is made orthogonal, for the matrices of the dense GPT's blocks.

Every direction of a matrix then learns at the same pace, those of rare facts too (Jordan et al. 2024,
kellerjordan.github.io/posts/muon). Embeddings and vectors stay with AdamW. What it leaves out: gradients and products
in bfloat16, which CPUs without that type compute more slowly.
"""
import torch


class Muon(torch.optim.Optimizer):
    """Muon over `parameters`, all of them matrices.

    average <- momentum * average + gradient
    W       <- (1 - lr * weight_decay) W - lr * sqrt(max(1, out / in)) * orthogonal(gradient + momentum * average)
    """

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One update of every parameter from its gradient."""
        for group in self.param_groups:
            shapes = {}  # matrices of one shape take their step together: fewer and larger products
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.mul_(group["momentum"]).add_(p.grad)
                ahead = p.grad.add(average, alpha=group["momentum"])  # Nesterov: the momentum one step on
                shapes.setdefault(p.shape, []).append((p, ahead))
            for (m, n), pairs in shapes.items():
                steps = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                for (p, _), step in zip(pairs, steps):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(step, alpha=-group["lr"] * max(1, m / n) ** 0.5)


def orthogonal(G, steps=5):
    """Matrices near G (..., m, n) whose singular values lie between 0.7 and 1.2, on the same singular vectors.

    Newton-Schulz: X <- aX + bXXᵀX + cXXᵀXXᵀX, `steps` times, from G over its norm.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # raise small singular values fast; these end near 1, not at it
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        S = X @ X.mT
        X = a * X + (b * S + c * S @ S) @ X
    return X.mT if tall else X
