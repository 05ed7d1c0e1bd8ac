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
                shapes.setdefault(p.shape, []).append(p)
            for (m, n), matrices in shapes.items():
                gradients = torch.stack([p.grad for p in matrices])  # (matrices, m, n)
                state = self.state[matrices[0]]  # the first of a shape keeps the averages of all
                if "average" not in state:
                    state["average"] = torch.zeros_like(gradients)
                average = state["average"].mul_(group["momentum"]).add_(gradients)
                ahead = gradients.add(average, alpha=group["momentum"])  # Nesterov: the momentum one step on
                for p, step in zip(matrices, orthogonal(ahead)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(step, alpha=-group["lr"] * max(1, m / n) ** 0.5)


def orthogonal(G, steps=5):
    """Matrices near G (..., m, n) whose singular values lie between 0.7 and 1.2, on the same singular vectors.

    Newton-Schulz: X <- PX with P = aI + bS + cSS and S = XXᵀ, `steps` times, from G over its norm. Where X is twice
    as wide as high, it is cheaper to follow S alone, S <- PSP, and to multiply X by all the P at the end.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # raise small singular values fast; these end near 1, not at it
    *shape, m, n = G.shape
    G = G.reshape(-1, m, n)
    tall = m > n
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    S = X @ X.mT
    if max(m, n) >= 2 * min(m, n):
        product = None
        for i in range(steps):
            P = torch.baddbmm(S, S, S, beta=b, alpha=c)
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            product = P if product is None else P @ product
            S = P @ S @ P if i + 1 < steps else None
        X = product @ X
    else:
        for i in range(steps):
            X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=b, alpha=c), X, beta=a)
            S = X @ X.mT if i + 1 < steps else None
    X = X.mT if tall else X
    return X.reshape(*shape, m, n)


def make_optimizers(model, parameters, config):
    """[AdamW], or with config.muon [AdamW, Muon], which takes the matrices of the blocks."""
    blocks = {id(p) for p in model.blocks.parameters() if p.dim() == 2} if config.muon > 0 else ()
    hidden = [p for p in parameters if id(p) in blocks]
    rest = [p for p in parameters if id(p) not in blocks]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    optimizers = []
    if groups:
        fused = all(p.device.type in ("cpu", "cuda", "mps") for p in rest)  # one pass over memory
        optimizers.append(torch.optim.AdamW(groups, config.lr, config.betas, fused=fused))
    if hidden:
        optimizers.append(Muon(hidden, config.muon, config.weight_decay))
    return optimizers
