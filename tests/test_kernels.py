"""kernels.py against plain loops and the float64 product with the dequantized weight."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import idp
import kernels
import model
import recover
from checkpoints import load, save
from checkpoints.writing import go_on, packed_model
from engine import compiling, decode, packing
from engine.decode import choose_decode, compile_decode
from engine.grids import Quantized
from engine.packing import LANES, to_words
from kernels import Packed, PackedLinear, from_spec, matmul, pack, pack_sparse, unpack
from world.facts import make_encoding, train_bpe

SHAPES = [(1, 1), (5, 7), (16, 128), (33, 100), (40, 384)]


def quantized(N, K, bits, group_size=None, act_order=False, seed=0):
    """Random codes: what a compressor would hand over, with every code and every zero-point possible."""
    g = torch.Generator().manual_seed(seed)
    group = torch.arange(K) // (group_size or K)
    G = int(group[-1]) + 1
    if act_order:
        group = group[torch.randperm(K, generator=g)]
    codes, zero = (torch.randint(0, 2**bits, (N, n), generator=g, dtype=torch.uint8) for n in (K, G))
    return Quantized(codes, torch.rand(N, G, generator=g) + 0.1, zero, group, bits)


def keep(N, K, n, m, seed=0):
    """A random n:m mask (N, K); the last, incomplete cell may keep fewer."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.rand(N, K + -K % m, generator=g).view(N, -1, m).argsort(-1).argsort(-1)
    return (rank < n).flatten(1)[:, :K]


def same(a, b):
    return all(x == y if isinstance(x, int) else torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b))


def relative_error(y, x, W):
    """Largest error against the float64 product, relative to the largest sum of absolute products: rounding's unit."""
    exact = x.double() @ W.double().T
    return float((y.double() - exact).abs().max() / (x.double().abs() @ W.double().abs().T).max().clamp_min(1e-30))


@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_and_back_is_exact(bits):
    for N, K in SHAPES + [(17, 4200)]:
        for group_size in (None, 16, 32, 50, 64, 128):
            for act_order in (False, True):
                q = quantized(N, K, bits, group_size, act_order)
                p = pack(q)
                assert same(unpack(p), q), (N, K, group_size, act_order)
                assert torch.equal(p.dequantize(), q.scale[:, q.group] * (q.codes.float() - q.zero[:, q.group].float()))


def test_pack_unequal_and_empty_groups():
    q = quantized(20, 9, 3, 3)._replace(group=torch.tensor([2, 0, 0, 2, 2, 2, 2, 0, 2]))  # 3, 0 and 6 columns
    assert same(unpack(pack(q)), q)
    q = q._replace(group=torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 1]))  # the last group has none
    assert same(unpack(pack(q)), q)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_words_by_hand(bits):
    """Each row's codes, written as one long binary number, lowest code first; at 3 bits all but two codes of 32."""
    q = quantized(LANES, 32, bits)
    words = to_words(q.codes, bits).long() & 0xFFFFFFFF  # (1, n, 16)
    for row in range(LANES):
        codes = q.codes[row].tolist()
        if bits == 3:
            a, b = codes[30], codes[31]
            tops = (a & 3, (a >> 2) | ((b & 1) << 1), b >> 1)
            naive = [sum(codes[10 * w + i] << (3 * i) for i in range(10)) | tops[w] << 30 for w in range(3)]
        else:
            number = sum(c << (bits * i) for i, c in enumerate(codes))
            naive = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(bits)]
        assert words[0, :, row].tolist() == naive


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_a_code_costs_its_bits(bits):
    p = pack(quantized(64, 256, bits, 64))
    assert p.codes.numel() * 4 == 64 * 256 * bits // 8 and p.nbytes == p.codes.numel() * 4 + 64 * 4 * (4 + 1)
    assert pack(quantized(64, 256, 6, 64)).nbytes == pack(quantized(64, 256, 8, 64)).nbytes  # 5 to 7 are stored as 8


def test_pack_refuses():
    q = quantized(4, 8, 4)
    with pytest.raises(ValueError, match="16 does not fit 4 bits"):
        pack(q._replace(codes=torch.full((4, 8), 16, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"\[2, 8\], got 1"):
        pack(q._replace(bits=1))
    with pytest.raises(ValueError, match=r"x must be floats \(..., 8\), got torch.float32 \(2, 3\)"):
        matmul(torch.zeros(2, 3), pack(q))
    with pytest.raises(ValueError, match="got torch.int64"):  # the weight would be rounded to whole numbers
        matmul(torch.full((2, 8), 10), pack(q))


@pytest.mark.parametrize("n_m", [(2, 4), (4, 8), (1, 4), (1, 2), (3, 16), (3, 32)])
def test_sparse_and_back_is_exact(n_m):
    for N, K in SHAPES:
        mask = keep(N, K, *n_m)
        W = torch.where(mask, torch.randn(N, K, generator=torch.Generator().manual_seed(1)), 0.0)
        assert torch.equal(pack_sparse(W, n_m).dequantize(), W)
        for bits in (2, 3, 4, 8):
            for group_size in (None, *(size for size in (16, 48, 64) if size % n_m[1] == 0)):
                q = quantized(N, K, bits, group_size)
                q = q._replace(codes=torch.where(mask, q.codes, q.zero[:, q.group]))
                p = pack_sparse(q, n_m)
                assert same(unpack(p), q), (N, K, bits, group_size)
                assert torch.equal(p.dequantize(), pack(q).dequantize())


def test_sparse_sizes():
    W = torch.where(keep(64, 256, 2, 4), 1.0, 0.0)
    # half the floats, and 2 bits for the place of each
    assert pack_sparse(W, (2, 4)).nbytes == 64 * 256 // 2 * 4 + 64 * 256 // 2 // 4
    q = quantized(64, 256, 4, 64)
    q = q._replace(codes=torch.where(W == 1, q.codes, q.zero[:, q.group]))
    assert pack_sparse(q, (2, 4)).nbytes == 64 * 256 // 2 * 6 // 8 + 64 * 4 * 5  # 4 + 2 bits for each one kept


def test_sparse_refuses():
    W = torch.ones(2, 8)
    with pytest.raises(ValueError, match="not 2:4 sparse: 4 of 4"):
        pack_sparse(W, (2, 4))
    with pytest.raises(ValueError, match="got 4:4"):
        pack_sparse(W, (4, 4))
    q = quantized(2, 64, 4, 16, act_order=True)
    with pytest.raises(ValueError, match="act_order"):
        pack_sparse(q._replace(codes=q.zero[:, q.group]), (2, 4))
    with pytest.raises(ValueError, match="float values"):
        unpack(pack_sparse(torch.zeros(2, 8), (2, 4)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_eager_matmul(bits, shape):
    for M in (1, 3, 128):
        x = torch.randn(M, shape[1], generator=torch.Generator().manual_seed(2))
        p = pack(quantized(*shape, bits, 32))
        assert relative_error(matmul(x, p, fused=False), x, p.dequantize()) < 1e-6
        y = matmul(x.bfloat16(), p, fused=False)
        assert y.dtype == torch.bfloat16 and relative_error(y, x, p.dequantize()) < 2e-2


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_fused_loop_equals_the_product(bits):
    """K1. What is compiled is plain PyTorch: run as it stands, over more shapes than there is time to compile."""
    for N, K in SHAPES + [(16, 2304), (17, 3000)]:
        for group_size, act_order in ((None, False), (16, False), (48, True), (128, False)):
            p = pack(quantized(N, K, bits, group_size, act_order))
            for M in (1, 2, 4):
                x = torch.randn(M, K, generator=torch.Generator().manual_seed(M))
                assert relative_error(kernels._fused(x, p), x, p.dequantize()) < 1e-6, (N, K, group_size, M)


@pytest.mark.parametrize("bits", range(2, 9))
def test_slabs_are_the_dequantized_weight(bits, monkeypatch):
    """What many rows of x are multiplied with, to the last bit, whatever the number of threads."""
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        for N, K in SHAPES + [(33, 4200), (17, 3000)]:
            for group_size, act_order in ((None, False), (16, True), (120, False)):
                p = pack(quantized(N, K, bits, group_size, act_order))
                slabs, order = kernels._slabs(torch.ones(1), p), p.order
                assert len(slabs) == (threads if N in (33, 40) else 1)
                at = torch.arange(K) if order is None else torch.stack([(order == k).nonzero()[0, 0] for k in range(K)])
                assert torch.equal(torch.cat([*slabs], dim=1)[at, :N].T, p.dequantize()), (N, K, group_size)
    assert torch.equal(kernels._run(kernels._slabs, torch.ones(1), p)[0, at, :N].T, p.dequantize())


@pytest.mark.parametrize("n_m", [(2, 4), (4, 8), (1, 4), (3, 32)])
def test_fused_sparse_loop_equals_the_product(n_m):
    for N, K in SHAPES + [(17, 4200)]:
        mask = keep(N, K, *n_m)
        W = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
        packed = [pack_sparse(torch.where(mask, W, 0.0), n_m)]
        for bits in (2, 3, 4, 8):
            q = quantized(N, K, bits, 64)
            packed.append(pack_sparse(q._replace(codes=torch.where(mask, q.codes, q.zero[:, q.group])), n_m))
        x = torch.randn(2, K, generator=torch.Generator().manual_seed(2))
        for p in packed:
            assert relative_error(kernels._fused(x, p), x, p.dequantize()) < 1e-6, (N, K, p.bits)


def test_tiles_cut_no_group():
    for span, groups in ((128, 86), (4096, 1), (64, 9), (4096, 2), (8, 1), (3008, 1), (32, 37)):
        T = packing.n_tiles(span, groups, 8)
        tile = span * groups // T
        assert span * groups % T == 0 and tile % (span if groups > 1 else 8) == 0
        assert tile <= max(2048, span) or span * groups == 32 * 37


def test_compiled_equals_eager_without_recompiling():
    """K1 and K2: one graph for a single row, one for a few, one to dequantize; other numbers of rows reuse them."""
    p = pack(quantized(40, 20, 4, 8, act_order=True))
    compiling.ready.clear()
    for M in (1, 2, 3, 4, 5, 17, 128):
        x = torch.randn(M, 20, generator=torch.Generator().manual_seed(M))
        assert relative_error(matmul(x, p), x, p.dequantize()) < 1e-6
    assert len(compiling.ready) == 3
    y = matmul(x[:1].bfloat16(), p)
    assert y.dtype == torch.bfloat16 and relative_error(y, x[:1], p.dequantize()) < 2e-2
    assert kernels.compile_failure() is None


def test_code_of_one_weight_is_not_run_for_another_that_fills_as_many_words(monkeypatch):
    """Of 40 and of 33 rows, of 1:2 and of 2:4: the words have one shape, and code knows how many rows and which places.
    Here `compiled` gives the Python function, which holds the weight that it was made for, as compiled code does."""
    monkeypatch.setattr(kernels, "ready", {})
    monkeypatch.setattr(kernels, "compiled", lambda f, tensors, key, dynamic=(): lambda given: [f(*given)])
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    sparse = [pack_sparse(torch.where(keep(32, 64, n, m), W, 0.0), (n, m)) for n, m in ((1, 2), (2, 4))]
    for pair in ([pack(quantized(N, 64, 4, 32)) for N in (40, 33)], sparse):
        assert len({p.words.shape for p in pair}) == 1
        for p in (*pair, *pair):
            for M in (1, 3):
                x = torch.randn(M, 64, generator=torch.Generator().manual_seed(M))
                y = matmul(x, p)
                assert y.shape == (M, p.shape[0]) and relative_error(y, x, p.dequantize()) < 1e-5


def test_compiled_code_is_kept_on_the_disk_and_fits(monkeypatch):
    """What a process compiled the next one finds; rows of a longer weight lie apart in memory, and are not mixed up."""
    p = pack(quantized(40, 4200, 4, 600))
    rows = p.rows(0, 2)
    assert rows.shape == (32, 4200) and p.rows(2, 3).shape == (8, 4200)
    assert torch.equal(p.rows(1, 3).dequantize(), p.dequantize()[16:])
    whole = rows._replace(**{name: t.contiguous() for name in Packed.TENSORS if (t := getattr(rows, name)) is not None})
    assert whole.words.shape == rows.words.shape and whole.words.stride() != rows.words.stride()
    x = torch.randn(1, 4200, generator=torch.Generator().manual_seed(0))
    for export in (torch.export.export, None):  # the second time nothing is recorded
        compiling.ready.clear()
        monkeypatch.setattr(torch.export, "export", export)
        for part in (whole, rows):
            assert relative_error(matmul(x, part), x, p.dequantize()[:32]) < 1e-6


def test_code_made_of_other_source_has_another_file(monkeypatch):
    block, wider = (model.Block(model.GPTConfig(n_embd=n)) for n in (32, 48))
    key = decode.kind(block)
    names = {compiling.code_name(key), compiling.code_name(decode.kind(wider))}
    with monkeypatch.context() as changed:  # a file of engine/ is another
        changed.setattr(compiling, "source", lambda path: "other")
        names.add(compiling.code_name(key))
    monkeypatch.setattr(decode, "source", lambda path: "other")  # the file of a block's classes is another
    names.add(compiling.code_name(decode.kind(block)))
    assert len(names) == 4


def test_compiled_code_is_given_only_what_it_was_made_for(monkeypatch):
    """Compiled code takes strides for granted: a cache whose keys lie otherwise in memory is compiled anew."""
    made = []

    def compiled(function, tensors, key, dynamic, instead):
        """Stands in for the compiler: refuses what is laid out otherwise than when it was made."""
        strides = [t.stride() for t in tensors[:-1]]  # the last, the cache, is of any length

        def code(given):
            assert [t.stride() for t in given[:-1]] == strides and given[-1].is_contiguous() == whole
            return [function(*given)]
        whole = tensors[-1].is_contiguous()
        made.append(whole)
        return code
    monkeypatch.setattr(decode, "compiled", compiled)
    monkeypatch.setattr(decode, "ready", {})
    gpt = compile_decode(model.GPT(model.GPTConfig(vocab_size=40, n_layer=1, n_embd=32)))
    expected, ids = model.GPT.step, torch.tensor([[7]])
    for turned in (False, True, False):
        caches = [gpt.new_cache(1, 5) for _ in range(2)]
        if turned:
            for cache in caches:
                cache.kv = [kv.transpose(2, 3).contiguous().transpose(2, 3) for kv in cache.kv]
        assert torch.allclose(gpt.step(ids, caches[0]), expected(gpt, ids, caches[1]), atol=1e-6)
    assert made.count(False) == 1


def test_few_rows_in_parts_equal_all_rows(monkeypatch):
    """Dequantizing in chunks of rows, also where the last chunk is smaller."""
    monkeypatch.setattr(kernels, "CHUNK", 32 * 100)
    monkeypatch.setattr(kernels, "_run", lambda f, x, packed: f(x, packed))
    for p in (pack(quantized(75, 100, 3, 32)), pack_sparse(torch.where(keep(75, 100, 2, 4), 0.5, 0.0), (2, 4))):
        x = torch.randn(9, 100, generator=torch.Generator().manual_seed(9))
        assert relative_error(matmul(x, p), x, p.dequantize()) < 1e-6


WITHOUT_COMPILER = """
import warnings, torch, kernels, compress
q = compress.rtn(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), 4, 32)
x, layer = torch.ones(1, 64), kernels.PackedLinear(kernels.pack(q))
eager = layer(x)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    same = all(torch.equal(kernels.matmul(x, layer.packed), eager) for _ in range(3))
said = [str(w.message) for w in caught if "no fused matmul" in str(w.message)]
print(same, len(said), kernels.compile_failure() is not None and kernels.compile_failure() in said[0])
"""


@pytest.mark.parametrize("missing", ("compiler", "folder"))
def test_no_compiler_one_warning_same_numbers(missing, tmp_path):
    """K3, on a machine whose C++ compiler does not exist, or that cannot write what it compiled: simulated."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if missing == "compiler":
        env["CXX"] = "/nonexistent/g++"
    else:
        (tmp_path / "file").touch()
        env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "file" / "below")
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True,
                          cwd=pathlib.Path(kernels.__file__).parent)
    assert done.stdout.split() == ["True", "1", "True"], done.stderr


def test_compiled_code_that_was_cut_off_is_removed(tmp_path, monkeypatch):
    """The eager numbers and a warning in this process; the next one compiles anew."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling._State, "failure", None)
    monkeypatch.setattr(kernels, "ready", {})
    p, x = pack(quantized(32, 64, 4, 32)), torch.ones(1, 64)
    exact = matmul(x, p)
    file, = tmp_path.glob("knowledge-*.pt2")
    file.write_bytes(file.read_bytes()[:1000])
    kernels.ready.clear()
    with pytest.warns(RuntimeWarning, match="was damaged and is removed"):
        torch.testing.assert_close(matmul(x, p), exact, rtol=1e-4, atol=1e-4)
    assert not file.exists()


def test_an_error_of_another_kind_is_not_taken_for_a_missing_compiler(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")
    monkeypatch.setattr(kernels, "_run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        matmul(torch.ones(1, 20), pack(quantized(40, 20, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_loop_on_a_gpu():
    p = pack(quantized(40, 100, 4, 32))
    on_gpu = p._replace(**{name: t.cuda() for name in Packed.TENSORS if (t := getattr(p, name)) is not None})
    x = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    assert relative_error(matmul(x.cuda(), on_gpu).cpu(), x, p.dequantize()) < 1e-6


def layers():
    """One PackedLinear of each kind, and the float weight each stands for."""
    mask = keep(24, 64, 2, 4)
    q = quantized(24, 64, 3, 32, act_order=True)
    s = quantized(24, 64, 4, 32)
    s = s._replace(codes=torch.where(mask, s.codes, s.zero[:, s.group]))
    return [pack(q), pack(s), pack_sparse(s, (2, 4)), pack_sparse(torch.where(mask, 0.5, 0.0), (2, 4))]


def test_layer_holds_packed_tensors_only():
    for p in layers():
        layer = PackedLinear(p, torch.ones(24))
        assert not list(layer.parameters())
        held = sum(b.nbytes for b in layer.buffers()) - layer.bias.nbytes
        assert held == p.nbytes and not hasattr(layer, "weight")
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(layer(x), x @ p.dequantize().T + 1, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_gives_the_dtype_it_was_given(dtype):
    """A bias that was stored in float32 must not turn a half-precision model's activations into float32."""
    for p in layers():
        layer = PackedLinear(p, torch.arange(24.0) / 3)
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
        y = layer(x)
        assert y.dtype == dtype and layer.bias.dtype == torch.float32
        exact = x.double() @ p.dequantize().double().T + layer.bias.double()
        assert float((y.double() - exact).abs().max() / exact.abs().max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("fused", (False, True))
def test_gradient_reaches_the_input_and_keeps_no_float_weight(fused):
    """While gradients are recorded the eager twin computes."""
    for p in layers():
        layer = PackedLinear(p, torch.ones(24))
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4), requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = matmul(x, p) + 1 if fused else layer(x)
        assert sum(t.numel() for t in saved) < p.shape[0] * p.shape[1]
        y.square().sum().backward()
        W = p.dequantize()
        assert torch.allclose(x.grad, 2 * (x.detach() @ W.T + 1) @ W, rtol=1e-4, atol=1e-3)
        assert all(b.grad is None and not b.requires_grad for b in layer.buffers())


def test_spec_rebuilds_every_layer():
    for p in layers():
        for bias in (None, torch.arange(24.0)):
            layer = PackedLinear(p, bias)
            again = from_spec(json.loads(json.dumps(layer.spec())))
            again.load_state_dict(layer.state_dict(), strict=True, assign=True)
            x = torch.randn(2, 64, generator=torch.Generator().manual_seed(5))
            assert torch.equal(again(x), layer(x)) and again.packed.nbytes == p.nbytes
            assert isinstance(again.packed, Packed) and repr(again) == repr(layer)


def test_spec_refuses():
    spec = PackedLinear(layers()[0]).spec()
    unknown = ({"words": [[1], "complex64"]}, {"other": [[1], "int32"]})
    for bad in (7, {**spec, "bits": None, "buffers": {"words": 3}}, *({**spec, "buffers": b} for b in unknown)):
        with pytest.raises(ValueError, match="not the specification"):
            from_spec(bad)
    with pytest.raises(ValueError, match="no words"):
        from_spec({**spec, "buffers": {}})
    for bad in ({}, {**spec, "layout": packing.LAYOUT - 1}):
        with pytest.raises(ValueError, match="compress the model again"):
            from_spec(bad)


def test_a_compressed_model_survives_the_disk(tmp_path):
    gpt = model.GPT(model.GPTConfig(vocab_size=32, context=16, n_layer=2, n_head=2, n_embd=32, n_hidden=64))
    gpt.init_weights(torch.Generator().manual_seed(0))
    for block in gpt.blocks:
        block.attn.q = PackedLinear(pack(quantized(32, 32, 3, 16, act_order=True)))
        block.mlp.up = PackedLinear(pack_sparse(torch.where(keep(64, 32, 2, 4), 0.1, 0.0), (2, 4)))
    save(gpt, tmp_path / "small")
    ids = torch.arange(12)[None]
    assert torch.equal(load(tmp_path / "small")(ids), gpt(ids))
    gpt.blocks[1].attn.q = PackedLinear(pack(quantized(64, 32, 3, 16)))  # 64 rows where the model needs 32
    save(gpt, tmp_path / "small")
    with pytest.raises(ValueError, match=r"'blocks.1.attn.q': .*\(32, 64\), the model needs \(32, 32\)"):
        load(tmp_path / "small")


def small_packed_model():
    config = model.GPTConfig(vocab_size=32, context=24, n_layer=3, n_head=2, n_kv_head=1, n_embd=16, n_hidden=32)
    gpt = model.GPT(config)
    gpt.init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    for block in gpt.blocks:
        q = quantized(16, 16, 4, 8)
        block.attn.q = PackedLinear(pack(q._replace(scale=q.scale / 10)))
        block.mlp.down = PackedLinear(pack_sparse(torch.where(keep(16, 32, 2, 4), block.mlp.down.weight, 0.0), (2, 4)))
    gpt.lm_head = PackedLinear(pack(quantized(32, 16, 8, 16)))
    return gpt


def test_compiled_decode_writes_the_same_tokens(monkeypatch, tmp_path):
    """One compiled block serves every layer, every prompt and cache size; a wide batch takes the ordinary way."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where nothing is compiled yet
    gpt = small_packed_model()
    prompt = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 32, (6, 5), generator=torch.Generator().manual_seed(2))
    calls = [(ids[:1], 6, None), (ids[:1], 9, None), (ids[1:2, :3], 4, prompt), (ids[2:3], 11, None), (ids, 3, None),
             (ids[3:5], 7, None)]
    expected = [gpt.generate(i, n, prompt=p) for i, n, p in calls]
    compiling.ready.clear()
    fused, traced = kernels._fused, []
    monkeypatch.setattr(kernels, "_fused", lambda x, packed: traced.append(packed.shape) or fused(x, packed))
    query, attended = decode.one_query, []
    monkeypatch.setattr(decode, "one_query", lambda q, *a, **k: attended.append(len(q)) or query(q, *a, **k))
    compile_decode(gpt)
    for (i, n, p), want in zip(calls, expected):
        assert torch.equal(gpt.generate(i, n, prompt=p), want)
    assert len(compiling.ready) == 4  # the head and the block, for one row and for two
    assert set(attended) == {1, 2}  # rows: it stands in the place of PyTorch's attention
    assert traced == [(16, 16), (16, 32), (32, 16), (16, 16), (32, 16)]  # of two rows 2:4 does not take the fused loop
    other = compile_decode(small_packed_model())  # another model of this kind: its tensors, the same code
    for block in other.blocks:
        block.attn.rope = block.attn.rope.flip(0)
    other.norm.weight.mul_(torch.arange(16.0))
    got = other.generate(ids[2:3], 11)
    compile_decode(other, False)
    assert torch.equal(got, other.generate(ids[2:3], 11)) and not torch.equal(got, expected[3])
    assert len(compiling.ready) == 4
    for linear in (other.blocks[1].attn.v, other.blocks[1].attn.o, other.blocks[1].mlp.up):
        linear.weight.data = linear.weight.mul_(9).T.contiguous().T  # stored in another order
    got = other.generate(ids[2:3], 11)
    assert torch.equal(compile_decode(other).generate(ids[2:3], 11), got)
    seen = [expected[3].tolist()]
    for change in range(3):  # what no guard looks at any more has to be seen all the same
        if change == 0:
            gpt.blocks[0].norm1.eps = 30.0
        if change == 1:
            for p in recover.add_lora(gpt, 2, targets=("k", "up"))[1::2]:
                p.data.normal_(generator=torch.Generator().manual_seed(5))
        if change == 2:
            gpt.blocks[1].mlp.up.scale *= 50
        decoder = vars(gpt).pop("step")
        want = gpt.generate(ids[2:3], 11)
        gpt.step = decoder
        assert torch.equal(gpt.generate(ids[2:3], 11), want)
        seen.append(want.tolist())
    assert len({str(tokens) for tokens in seen}) > 2

    assert "step" not in vars(compile_decode(gpt, False))


@pytest.mark.parametrize("heads, kv_heads, dtype", [(6, 2, torch.float32), (3, 3, torch.float32),
                                                    (4, 1, torch.bfloat16)])
def test_attention_of_one_query_is_pytorchs(heads, kv_heads, dtype):
    """Of rows of unequal length, with slots before them and behind them that must not count, however large."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, slots, 8, generator=generator, dtype=dtype)
               for n, slots in ((heads, 1), (kv_heads, 11), (kv_heads, 11)))
    mask = torch.zeros(2, 1, 1, 11, dtype=torch.bool)
    mask[0, ..., 2:7], mask[1, ..., 10:] = True, True
    k[0, :, 7:], v[0, :, :2] = 100, 100
    q[0, 0] *= 300  # products beyond the largest exponent
    got = decode.one_query(q, k, v, mask, enable_gqa=kv_heads != heads)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), attn_mask=mask, enable_gqa=kv_heads != heads)
    assert got.dtype == dtype and got.shape == q.shape
    assert torch.allclose(got.double(), want, atol=1e-4 if dtype == torch.float32 else 0.01)


def test_compiled_decode_of_every_repair():
    """IDP, a prompt, a prefix and LoRA beneath them all go through one block, and write the tokens of the eager way."""
    gpt = small_packed_model()
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 32, (1, 5), generator=g)
    pool = idp.PromptPool([torch.randn(n, 16, generator=g) for n in (2, 4, 3)])
    prefix = recover.Prefix(torch.randn(3, 2, 1, 4, 8, generator=g))
    plain = gpt.generate(ids, 6)
    with torch.no_grad():
        for p in recover.add_lora(gpt, 2, targets=("q", "up"), generator=g):
            p.normal_(generator=g)

        def answers():
            filled = idp.prefill(gpt, pool)
            chosen = idp.select(gpt, pool, ids, filled=filled)
            return [gpt.generate(ids, 6),
                    gpt.generate(ids, 6, cache=filled.repeat(chosen, 11)),
                    gpt.generate(ids, 6, prompt=pool.prompts[1]),
                    gpt.generate(ids, 6, cache=prefix.cache(gpt, 1, 11))]

        expected = answers()
        assert not torch.equal(plain, expected[0])
        compiling.ready.clear()
        compile_decode(gpt)
        for got, want in zip(answers(), expected):
            assert torch.equal(got, want)
    assert len(compiling.ready) == 2  # the head, the block


NARROW_BODY = """
import torch, tests.test_kernels as here
from engine import compiling
from kernels import _fused, _run, _slabs, matmul, pack
torch.set_num_threads(1)
assert compiling.NARROW
for bits in (2, 3, 4, 8):
    for N, K in here.SHAPES + [(64, 256)]:
        for M in (1, 4):
            p, x = pack(here.quantized(N, K, bits, 32)), torch.randn(M, K, generator=torch.Generator().manual_seed(M))
            assert here.relative_error(_fused(x, p), x, p.dequantize()) < 1e-6, (N, K, bits, M)
p, x = pack(here.quantized(64, 256, 4, 64)), torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
assert here.relative_error(matmul(x, p), x, p.dequantize()) < 1e-6 and len(compiling.ready) == 1
assert torch.equal(_run(_slabs, x, p)[0].T, p.dequantize())
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU runs the narrow body above")
def test_the_narrow_body_gives_the_same_numbers():
    """K1 and K2 of the loop that CPUs without AVX512 run, on one that has it."""
    done = subprocess.run([sys.executable, "-c", NARROW_BODY], env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
                          capture_output=True, text=True, cwd=pathlib.Path(kernels.__file__).parent)
    assert done.returncode == 0, done.stderr


def test_the_command_goes_on_with_a_text(tmp_path, capsys):
    """Dense and packed at 8 bits write the same text; what is packed already has no dense row."""
    encoding = make_encoding(train_bpe(["one two three four"] * 3, 270))
    gpt = model.GPT(model.GPTConfig(vocab_size=encoding.n_vocab, context=24, n_layer=2, n_head=2, n_embd=32))
    save(gpt.init_weights(torch.Generator().manual_seed(0)), tmp_path / "dense", encoding)
    wanted = encoding.encode_ordinary("one two")
    go_on(["--model", str(tmp_path / "dense"), "--text", "one two", "--tokens", "5", "--bits", "8", "--no-compile"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("dense, float32") and printed[2] == "not compiled, as asked"
    assert printed[3].startswith("packed, 8 bits") and printed[1] == printed[4]
    text = encoding.decode(load(tmp_path / "dense").generate(torch.tensor([wanted]), 5)[0].tolist())
    assert printed[1].strip() == repr(text)
    with pytest.raises(ValueError, match="the context of 24"):
        go_on(["--model", str(tmp_path / "dense"), "--tokens", "30"])
    save(packed_model(gpt, 8), tmp_path / "packed", encoding)
    go_on(["--model", str(tmp_path / "packed"), "--text", "one two", "--tokens", "5", "--no-compile"])
    assert [line.strip() for line in capsys.readouterr().out.splitlines()][2:] == [repr(text)]


def test_compiling_is_worth_it_for_much_work():
    gpt = small_packed_model()
    for tokens, asked, compiles in ((10, None, False), (10**9, None, True), (10, True, True), (10**9, False, False)):
        line = choose_decode(gpt, tokens, asked)
        assert ("step" in vars(gpt)) is compiles and line.startswith("compiled" if compiles else "not compiled")
