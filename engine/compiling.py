"""
How a function becomes machine code, once for each kind of input, and what happens where that is not possible.

`compiled` hands a function to AOTInductor, torch's compiler ahead of time, and keeps the code in a file, so that the
next process only loads it; `ready` keeps what this process has loaded; `or_eager` calls it, and without a C++ compiler
warns once and computes the same in eager PyTorch. Which functions are compiled: kernels.py, engine/decode.py.

Why not `torch.compile`: it records the function anew in every process. SmolLM2-135M's shape at 4 bits, one busy thread
of a CPU with AVX512, code on the disk: the first token after 25 s and 31.9 ms a token, against 6.9 s (1.9 s since no
compiler is imported to load code) and 29.8 ms here; medians, in turns; fullgraph, dynamic=False, guards skipped, a
block at a time. With nested_compile_region, a token in one call, torch 2.13 loses the constants of the region.
"""
import functools
import hashlib
import os
import pathlib
import tempfile
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# Inductor's own limits would store the long expression of the fused loop half-way, and write it out again for each of
# a few groups, which takes minutes to compile; "fast" lets it multiply and add in one instruction
OPTIONS = {"realize_opcount_threshold": 1 << 20, "realize_reads_threshold": 1 << 20,
           "realize_acc_reads_threshold": 1 << 20, "unroll_reductions_threshold": 1,
           "size_asserts": False, "alignment_asserts": False, "cpp.enable_floating_point_contract_flag": "fast",
           # as wide as torch's own kernels, so that ATEN_CPU_CAPABILITY=avx2 gives the narrow code on every machine
           "cpp.simdlen": {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())}

ROOT = pathlib.Path(__file__).resolve().parent.parent
NARROW = torch.backends.cpu.get_cpu_capability() == "AVX2"  # 16 registers of 8 floats, not 32 of 16
ready = {}  # {all that the code takes for granted: compiled code}


class _State:
    """Why compilation was given up, if it was."""
    failure = None


def compile_failure():
    """Why the eager code computes on this machine although the fused was asked for; None if it did not come to that."""
    return _State.failure


class Function(nn.Module):
    """A function of a list of tensors as a module, which torch.export wants."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, tensors):
        return self.f(*tensors)


def compiled(f, tensors, key, dynamic=(), instead=()):
    """f(*tensors) compiled for tensors such as these: called with a list of them, it returns a list of one.

    key      all that the code takes for granted: it names the file. Nothing is looked at again when the code is called
    dynamic  {number of a tensor: its dimension that may have any size}, the same size for all of them
    instead  {operator of PyTorch: function that stands in its place}
    """
    # Inductor keeps its files there, too; to ask it where takes the second of its import
    default = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.environ.get('USER', '')}")
    path = os.path.join(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", default), f"knowledge-{code_name(key)}.pt2")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        slots, dynamic = torch.export.Dim("slots"), dict(dynamic)
        sizes = [{dynamic[i]: slots} if i in dynamic else {} for i in range(len(tensors))]
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 warns of itself
            program = torch.export.export(Function(f), (tensors,), dynamic_shapes=(sizes,))
            if instead:
                program = program.run_decompositions(instead)
            part = f"{path}.{os.getpid()}.pt2"
            torch._inductor.aoti_compile_and_package(program, package_path=part, inductor_configs=dict(OPTIONS))
        os.replace(part, path)
    # what torch._inductor.aoti_load_package returns at last, after it imported the compiler and asked g++ for the CPU
    try:
        return torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1).boxed_run
    except RuntimeError:
        os.remove(path)
        raise OSError(f"{path} was damaged and is removed: the next run compiles it anew") from None


def code_name(key):
    """A fingerprint of a key and of what else decides about the code: torch, the CPU's registers, our own source."""
    ours = [source(str(path)) for path in (ROOT / "kernels.py", *sorted(ROOT.glob("engine/*.py")))]
    machine = torch.__version__, torch.backends.cpu.get_cpu_capability(), OPTIONS
    return hashlib.sha256(repr((key, machine, ours)).encode()).hexdigest()[:32]


@functools.cache
def source(path):
    """A fingerprint of a file of source."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]


def written_out(x):
    """x itself, but computed once: in a fused loop each block of rows would compute x anew. as_strided needs memory to
    stride over, so Inductor has to write x out.
    """
    return x.as_strided(x.shape, x.stride())


def loaded(words):
    """words (T, NB, ...), to be loaded in one instruction on every CPU.

    For AVX2, Inductor copies 32-bit integers to the stack in two halves, and loading them from there waits for both: a
    third of the speed. A load under a mask has no copy; padding that is cut off again makes every load one.
    """
    if not NARROW:
        return words
    return F.pad(words, (0, 0) * (words.dim() - 2) + (0, 1))[:, :words.shape[1]]


def or_eager(compiled, eager, *arguments):
    """compiled(*arguments); on a machine that cannot compile, eager(*arguments), with one warning."""
    if _State.failure is None:
        try:
            return compiled(*arguments)
        except (RuntimeError, OSError) as error:  # OSError: the folder of the compiled code cannot be written
            if isinstance(error, RuntimeError) and type(error).__name__ != "InductorError":  # its import takes a second
                raise
            _State.failure = str(error).strip().splitlines()[0]
            warnings.warn(f"no fused matmul, the eager one instead: {_State.failure}", RuntimeWarning, stacklevel=3)
    return eager(*arguments)
