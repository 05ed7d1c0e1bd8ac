"""
How a function becomes machine code, once for each kind of input, and what happens where that is not possible.

What it does: `compiled` hands a function to Inductor, the compiler of torch.compile; `ready` keeps the code of this
process, Inductor's own cache on the disk keeps it for the next one; `or_eager` calls it, and on a machine without a C++
compiler warns once, with the reason, and computes the same in eager PyTorch. `use_compile` is the one switch.

What it leaves out: which functions are compiled (kernels.py, engine/decode.py).
"""
import warnings

import torch
import torch.nn.functional as F

# Inductor's own limits would store the long expression of the fused loop half-way, and write it out again for each of
# a few groups, which takes minutes to compile; "fast" lets it multiply and add in one instruction. The assertions would
# look at the sizes of all tensors at every call.
OPTIONS = {"realize_opcount_threshold": 1 << 20, "realize_reads_threshold": 1 << 20,
           "realize_acc_reads_threshold": 1 << 20, "unroll_reductions_threshold": 1,
           "size_asserts": False, "alignment_asserts": False, "cpp.enable_floating_point_contract_flag": "fast",
           # as wide as torch's own kernels, so that ATEN_CPU_CAPABILITY=avx2 gives the narrow code on every machine
           "cpp.simdlen": {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())}

NARROW = torch.backends.cpu.get_cpu_capability() == "AVX2"  # 16 registers of 8 floats, not 32 of 16

ready = {}  # {all that the code takes for granted: compiled code}


class _State:
    """The one switch, and why compilation was given up, if it was."""
    enabled = False
    failure = None
    tracing = False  # a larger graph, such as a block's, is being recorded


def use_compile(enabled):
    """Whether PackedLinear calls the fused matmul. Off at first: compiling takes seconds, a small model never earns
    them back.
    """
    _State.enabled = bool(enabled)


def compile_enabled():
    """What `use_compile` said last; False at first."""
    return _State.enabled


def compile_failure():
    """Why the eager code computes on this machine although the fused was asked for; None if it did not come to that."""
    return _State.failure


def recording():
    """Whether a larger graph is being recorded: then a layer writes out its own operations, and calls no other code."""
    return _State.tracing


def compiled(f, tensors, dynamic=()):
    """f(*tensors) compiled for tensors such as these: called with a list of them, it returns a tuple of one.

    dynamic  {number of a tensor: its dimension that may have any size}

    This is torch.compile(f) by hand: record the operations, hand them to Inductor. What is left out stands between a
    caller and the code: a dozen Python calls that find out, every time, whether the code fits. While weights stream
    through the cache, Python's own data has to come from memory too, and a small product takes no longer than that. So
    the caller has to know that the code fits: see what kernels.run and engine/decode.py take for a key of `ready`.
    """
    from torch._inductor.compile_fx import compile_fx_inner  # here, as these imports take a second
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
    mode, dynamic = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), dict(dynamic)
    sizes = [[DimDynamic.DYNAMIC if dynamic.get(i) == d else DimDynamic.STATIC for d in range(t.dim())]
             for i, t in enumerate(tensors)]
    fakes = [mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(size)) for t, size in zip(tensors, sizes)]
    # f runs once, on shapes without numbers, and each operation is recorded, also the one that writes into a cache in
    # place: made functional, as is usual, it would copy the whole cache twice a token
    _State.tracing = True
    try:
        graph = make_fx(lambda *given: (f(*given),), select_decomp_table())(*fakes)
    finally:
        _State.tracing = False
    # the last two let the code be kept on the disk
    with torch._inductor.config.patch(OPTIONS), torch._functorch.config.patch(bundled_autograd_cache=False), \
            torch._guards.tracing(torch._guards.TracingContext(mode)):
        return compile_fx_inner(graph, fakes).current_callable


def written_out(x):
    """x itself, but computed once: in a fused loop each block of rows would compute x anew. as_strided needs memory to
    stride over, so Inductor has to write x out.
    """
    return x.as_strided(x.shape, x.stride())


def loaded(words):
    """words (T, NB, ...), to be loaded in one instruction on every CPU.

    In code for AVX2, Inductor copies 32-bit integers to the stack in two halves and loads them from there. That load
    waits until both halves have left the store buffer: a third of the speed. A load under a mask has no copy; padding
    that is cut off again makes every load one.
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
