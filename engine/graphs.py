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
import torch.nn as nn


class Step(nn.Module):
    """A loss as a module: what it trains are its parameters, a batch's tensors are its arguments."""

    def __init__(self, loss, parameters):
        super().__init__()
        self.loss, self.trained = loss, nn.ParameterList(parameters)

    def forward(self, *batch):
        return self.loss(batch)


def recorded(loss, parameters, batch):
    """`loss`, batch -> scalar, recorded where its tensors lie on a GPU.

    parameters  those that get a gradient: nothing else may be trained with it
    batch       a tuple of tensors, which every later batch resembles in shape and dtype
    """
    if batch[0].device.type != "cuda":
        return loss
    graph = torch.cuda.make_graphed_callables(Step(loss, parameters), tuple(t.clone() for t in batch))
    return lambda batch: graph(*batch)
