"""
One token through a whole model in compiled code: dense, compressed or adapted models alike.

Each linear layer compiled alone loses time to calls, and to activations written out between the layers; the whole model
as one graph takes minutes to compile. So one block is compiled, once, with its weights as arguments, and called for
every layer. Keys, values and the token's position stay in tensors: the loop of `GPT.generate` waits for a device only
to see whether every row has written its `stop`.

    model = compile_decode(model)      # model.generate(...) from now on
"""
import copy
import inspect
import weakref

import torch
import torch.nn as nn

from engine.compiling import compiled, or_eager, ready, source

# estimates: seconds to unpack a weight in eager code, and to compile a block and a head
UNPACK, COMPILE = 4e-9, 60
ROWS = 4  # most rows of a batch that compiled code is made for; more take the eager way


class Together(nn.ModuleList):
    """A block, or the final norm and the head: modules as one function of tensors."""

    def forward(self, x, positions=None, mask=None, *past):
        if past:
            return self[0](x, positions, mask, *past)
        norm, lm_head = self
        return lm_head(norm(x))


class Decoder:
    """Stands in the place of `GPT.step`: one token of a few rows through compiled blocks and a compiled head.

    While it goes on with one cache, the model is taken to stay as it is.
    """

    def __init__(self, model):
        self.model, self.cache = model, None
        self.known = {}  # {a module's id: its tensors, its compiled code}, while the cache is the same

    def __deepcopy__(self, memo):
        return Decoder(copy.deepcopy(self.model, memo))

    def __call__(self, ids, cache):
        """Logits (B, V) behind one more token a row, ids (B, 1)."""
        if self.cache is None or self.cache() is not cache:
            self.known, self.cache = {}, weakref.ref(cache)
        model, positions = self.model, cache.positions(1)
        mask, x = cache.mask(positions), model.place(model.wte(ids), positions)
        for block, kv in zip(model.blocks, cache.kv):
            x = self.run((block,), x, positions, mask, kv)
        cache.advance(1)
        return self.run((model.norm, model.lm_head), x)[:, -1]

    def run(self, modules, *given):
        """What a block, or the final norm and the head, make of the given tensors."""
        if len(given[0]) > ROWS:
            return self.eager(modules, *given)
        return or_eager(self.compiled, self.eager, modules, *given)

    def eager(self, modules, *given):
        """`run` in eager code."""
        return Together(modules)(*given)

    def compiled(self, modules, *given):
        """`run` in compiled code, which is made or loaded at the first call."""
        name = id(modules[0])
        if name not in self.known:
            step = Together(modules)
            held = {name: t for named in (step.named_parameters, step.named_buffers)
                    for name, t in named(remove_duplicate=False)}
            key = (kind(step), torch.get_num_threads(), *map(layout, given))
            if key not in ready:
                def function(*tensors):
                    return torch.func.functional_call(step, dict(zip(held, tensors)), tensors[len(held):])
                dynamic = {len(held) + i: dim for i, dim in ((2, 3), (3, 3))}  # mask and cache: of any length
                plain = torch.ops.aten.scaled_dot_product_attention.default
                instead = {plain: one_query} if given[0].device.type == "cpu" else {}
                ready[key] = compiled(function, [*held.values(), *given], key, dynamic, instead)
            self.known[name] = list(held.values()), ready[key]
        tensors, code = self.known[name]
        return code([*tensors, *given])[0]


def one_query(q, k, v, attn_mask, enable_gqa=False):
    """F.scaled_dot_product_attention for one token a row, as sums that the compiler fuses with what stands around them:
    on a CPU PyTorch's kernel is made for many tokens, and takes longer to begin than one needs.

    q (B, nh, 1, hs); k, v (B, nkv, S, hs); attn_mask (B, 1, 1, S) -> (B, nh, 1, hs)
    """
    (B, nh, _, hs), nkv = q.shape, k.shape[1]
    heads = q.float().view(B, nkv, 1, nh // nkv, hs) * hs ** -0.5  # those that share keys: each key is read once
    score = (heads * k.float()[:, :, :, None]).sum(-1).mT  # (B, nkv, nh / nkv, S)
    score = score.masked_fill(~attn_mask, -torch.inf)
    weight = (score - score.amax(-1, keepdim=True)).exp()
    y = (weight[..., None] * v.float()[:, :, None]).sum(-2) / weight.sum(-1, keepdim=True)  # (B, nkv, nh / nkv, hs)
    return y.view(q.shape).to(q.dtype)


def layout(t):
    """What compiled code takes for granted of a tensor given to it: all but the length of a mask and a cache."""
    return t.dtype, t.device, len(t), None if t.is_contiguous() else t.stride()


def kind(module):
    """All that compiled code takes for granted of a module: its parts, the source of their classes, their plain
    attributes, their tensors' layout.
    """
    plain = (int, float, str, tuple, type(None))
    parts = [(name, type(m).__qualname__, source(inspect.getfile(type(m))),
              *((k, v) for k, v in vars(m).items() if isinstance(v, plain))) for name, m in module.named_modules()]
    tensors = [(name, t.shape, t.stride(), t.dtype, t.device)
               for named in (module.named_parameters, module.named_buffers)
               for name, t in named(remove_duplicate=False)]
    return tuple(parts), tuple(tensors)


def compile_decode(model, enabled=True):
    """Let `model.generate` run its tokens through one compiled block; enabled=False takes that back. Returns the model.

    The first token waits for the compiler, once a process and kind of block, whatever the size of the cache; much less
    where a process before left its code on the disk. The numbers are those of the eager code up to the order of
    additions.
    """
    vars(model).pop("step", None)
    if enabled:
        model.step = Decoder(model)
    return model


def worth_compiling(model, tokens):
    """Whether a packed model that will write so many tokens earns back the time of the compiler."""
    weights = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "packed"))
    return UNPACK * weights * tokens > COMPILE


def choose_decode(model, tokens, asked=None):
    """Let a model that will write so many tokens do it the faster way; returns a line that says which, and why.

    asked  True or False: what the caller wants; None: compiled where a packed model earns the compiler's time back
    """
    fast = worth_compiling(model, tokens) if asked is None else asked
    compile_decode(model, fast)
    chosen, time = ("compiled", "more") if fast else ("not compiled", "less")
    if asked is not None:
        return f"{chosen}, as asked"
    return f"{chosen}: for {tokens} tokens the weights are unpacked in {time} time than the {COMPILE} s of the compiler"
