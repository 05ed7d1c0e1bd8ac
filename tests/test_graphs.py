"""Recording a step as a CUDA graph: what is recorded is the same loss, and no loss does what a recording forbids."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recover
from elsewhere import ELSEWHERE, Elsewhere
from engine import graphs
from engine.losses import add_targets
from study import repairs
from study.repairs import train_repair
from test_device import FIT, IDS, moved, small

KINDS = [("lora", 2), ("bias", "o down"), ("gains", None), ("prompt", 3), ("prefix", 3),
         *[("idp", (2, 3, way)) for way in ("together", "joint", "competitive", "selected")]]
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.bincount.default,
         torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default}  # what needs a number on the CPU


class Recording(TorchDispatchMode):
    """While open, whatever a GPU cannot record is an error."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in WAITS:
            raise RuntimeError(f"{operation} waits for the GPU")
        out = operation(*args, **(kwargs or {}))
        moved = isinstance(out, torch.Tensor) and out.device == ELSEWHERE
        if moved and operation == torch.ops.aten._to_copy.default and args[0].device != ELSEWHERE:
            raise RuntimeError(f"{operation} takes a tensor from the CPU")
        return out


def teacher_and_student(device):
    """(batches with targets, a model that another one's targets teach): a student that is its own teacher has rounding
    errors for gradients."""
    student = moved(small(), device).requires_grad_(False)
    ids = IDS.to(device)
    batches = add_targets(student, [ids[:4], ids[2:]])
    for p in student.blocks.parameters():
        p.mul_(0.8)
    return batches, student


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations of a step, and the memory of their results, in which they are done
    again."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad():
            for operation, args, kwargs, out in self.done:
                for old, new in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else done in place
                        old.copy_(new)


@pytest.fixture
def taped(monkeypatch):
    """`recorded` that records on a CPU, too."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, what in (("Stream", lambda: stream), ("current_stream", lambda: stream), ("CUDAGraph", Tape),
                       ("stream", lambda stream: nullcontext()), ("graph", lambda tape: tape)):
        monkeypatch.setattr(torch.cuda, name, what)

    def recorded(loss, parameters, batch):
        run = graphs.record(loss, parameters, batch)
        return lambda batch: graphs.Replayed.apply(run, batch, *parameters)
    return recorded


@pytest.mark.parametrize("kind, size", KINDS)
def test_a_step_that_is_replayed_trains_the_same(kind, size, taped, monkeypatch):
    """Batches differ: a tape that keeps its first one, or whose loss is not each step's own, would not."""
    batches, model = teacher_and_student("cpu")
    seen = {}

    def trained(how, name):
        """The repair's tensors; the losses of its steps are kept."""
        def watched(*given):
            loss = how(*given)
            return lambda batch: (seen.setdefault(name, []).append(value := loss(batch)), value)[1]
        monkeypatch.setattr(repairs, "recorded", watched)
        return train_repair(model, kind, size, batches, recover.distillation, FIT, 0)
    plain, replayed = trained(lambda loss, *_: loss, "plain"), trained(taped, "replayed")
    for a, b in zip(plain, replayed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.stack(seen["plain"]), torch.stack(seen["replayed"]))


def test_gradients_are_multiplied_by_what_is_done_with_the_loss(taped):
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = taped(lambda batch: (x * batch[0]).sum(), [x], (torch.zeros(2),))
    (5 * loss((torch.tensor([1.0, 7.0]),))).backward()
    assert x.grad.tolist() == [5, 35]


def test_a_batch_of_another_shape_is_refused(taped):
    x = torch.ones(3, requires_grad=True)
    loss = taped(lambda batch: (batch[0] * x).sum(), [x], (torch.ones(4, 3),))
    assert float(loss((torch.full((4, 3), 2.0),)).detach()) == 24
    with pytest.raises(ValueError, match="cannot be replayed"):
        loss((torch.ones(1, 3),))


@pytest.mark.parametrize("kind, size", KINDS)
def test_no_loss_waits_for_a_gpu_or_takes_a_tensor_from_the_cpu(kind, size, monkeypatch):
    seen = []

    def watched(loss, parameters, batch):
        """The loss, watched."""
        def watch(batch):
            with Recording():
                seen.append(loss(batch))
                return seen[-1]
        return watch
    monkeypatch.setattr(repairs, "recorded", watched)
    with Elsewhere():
        batches, model = teacher_and_student(ELSEWHERE)
        train_repair(model, kind, size, batches, recover.distillation, FIT, 0)
    assert len(seen) == FIT.steps


def test_recording_forbids_what_a_gpu_cannot_record():
    """The test's own test."""
    with Elsewhere():
        x = torch.ones(3, device=ELSEWHERE)
        with Recording():
            for work in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.ones(3).to(ELSEWHERE)):
                with pytest.raises(RuntimeError, match="waits for the GPU|from the CPU"):
                    work()
            more = x + 1
        assert float(more.here.sum()) == 6


def test_nothing_is_recorded_on_a_cpu():
    def loss(batch):
        return batch[0].sum()
    assert graphs.recorded(loss, [], (IDS,)) is loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind, size", KINDS)
def test_a_recorded_step_trains_what_the_plain_one_does(kind, size, monkeypatch):
    batches, model = teacher_and_student("cuda")
    trained = train_repair(model, kind, size, batches, recover.distillation, FIT, 0)
    monkeypatch.setattr(repairs, "recorded", lambda loss, parameters, batch: loss)
    for a, b in zip(trained, train_repair(model, kind, size, batches, recover.distillation, FIT, 0), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
