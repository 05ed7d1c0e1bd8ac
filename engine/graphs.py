"""
A training step recorded as a CUDA graph: a GPU runs it as one piece.

The forward and backward pass of a repair are thousands of kernels of a few microseconds each; Python needs longer to
ask for one than the GPU to run it. Recorded once and replayed, they follow one another without Python. A graph reads
its batch from memory that stays where it is, so each batch is copied there first: all batches have one shape, and a
loss may neither wait for the GPU nor take tensors from the CPU.

The same kernels in the same order: the numbers are those of the plain loss. On a CPU nothing is recorded.

Source: Ng et al. 2021, "Accelerating PyTorch with CUDA Graphs", pytorch.org/blog. What it leaves out: the optimizer's
step, which stays outside.
"""
import torch

WARM = 3  # steps before the recording: libraries set themselves up in the first


class Replayed(torch.autograd.Function):
    """The value of a run that knows its gradients already."""

    @staticmethod
    def forward(ctx, run, batch, *parameters):
        value, ctx.grads = run(batch)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return None, None, *torch._foreach_mul(ctx.grads, g)


def recorded(loss, parameters, batch):
    """`loss`, batch -> scalar, recorded where its tensors lie on a GPU; a loss of first derivatives only.

    parameters  those that get a gradient: nothing else may be trained with it
    batch       a tuple of tensors, which every later batch resembles in shape and dtype
    """
    if batch[0].device.type != "cuda":
        return loss
    run = record(loss, parameters, batch)
    return lambda batch: Replayed.apply(run, batch, *parameters)


def record(loss, parameters, batch):
    """batch -> (loss, gradients), in memory that the next call overwrites."""
    held = tuple(t.clone() for t in batch)

    def step():
        value = loss(held)
        return value.detach(), torch.autograd.grad(value, parameters)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grads = step()

    def run(batch):
        for mine, new in zip(held, batch, strict=True):
            if mine.shape != new.shape:  # copy_ would repeat one row
                raise ValueError(f"a batch of {tuple(new.shape)} cannot be replayed in a graph of {tuple(mine.shape)}")
            mine.copy_(new)
        graph.replay()
        return value, grads
    return run
