"""
Why one compressor's damage is displaced and another's is not: the shape of each layer's output error.

A layer W (out, in) became W'. On inputs with second moments H = E[x xT] its output error D x, with D = W - W', has the
energy E|D x|^2 = trace(D H DT). Two questions about this energy:

    mean        which share is the same for every input, |D E[x]|^2? A constant added to the output takes it away:
                bias correction, b = D E[x] (Nagel et al. 2019, arXiv 1906.04721)
    directions  which share lies in the r strongest directions of D H^(1/2)? One LoRA of rank r takes it away, and its
                matrices have a closed form: with L (out, r) the left singular vectors, B = L and A = LT D. Nothing is
                trained and no answer is looked at (the same as EoRA, Liu et al. 2024, arXiv 2410.21271)

Rounding to nearest makes a D of independent errors, so D H^(1/2) has the directions of the inputs, and these are few.
GPTQ and SparseGPT make D = E U, with E independent errors and U the Cholesky factor of the inverse Hessian: then
D H DT = E ET, and the directions of the inputs are gone from it. What a small repair could bring back, error feedback
has taken already.

    python -m study why

What it leaves out: how errors of several layers add up.
"""
import torch

from engine.wrapping import shared_copy
from recover import LINEARS, add_lora, correct_biases
from study.repairs import attach, unpacked
from study.settings import config_of, job_parser
from study.statistics import Estimate, by_person, resampled, share_of
from study.steps import Run
from study.subjects import compressed_subject, dense_subject
from study.tables import markdown, share
from world.score import Subject, answer
from world.small import World

RANK = 8
PEOPLE = 200  # of each split who are asked about


# ---- one layer

def spectrum(D, H):
    """The energies of the output error D x in its principal directions, the strongest first: (min(out, in),), their sum
    is trace(D H DT); and the directions (out, min(out, in)). D (out, in), H (in, in); in float64.
    """
    values, vectors = torch.linalg.eigh(H.double())
    half = vectors * values.clamp_min(0).sqrt()  # half halfT = H
    L, S, _ = torch.linalg.svd(D.double() @ half, full_matrices=False)
    return S.square(), L


def mean_share(D, X):
    """The share of the energy of D x over inputs X (n, in) that is the same for all of them."""
    errors = X.double() @ D.double().T  # (n, out)
    return float(errors.mean(0).square().sum() / errors.square().sum(1).mean())


# ---- a whole model

@torch.no_grad()
def walk(model, dense, ids):
    """(layer, W, X) of every linear layer of the blocks, in order: the layer, the dense model's weight, what it reads.

    ids (N, T); X (N T, in). Whoever walks may change a layer: later blocks then read what the changed block gives.
    """
    x = model.embed(ids.to(model.wte.weight.device))
    for block, original in zip(model.blocks, dense.blocks):
        pairs = [(layer, original.get_submodule(name).weight) for name, layer in block.named_modules()
                 if name.split(".")[-1] in LINEARS]
        inputs = []
        hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
                 for layer, _ in pairs]
        block(x)
        for hook in hooks:
            hook.remove()
        for (layer, W), X in zip(pairs, inputs):
            yield layer, W, X
        x = block(x)


@torch.no_grad()
def error_shape(model, dense, ids, rank=RANK):
    """The shape of the output errors of `model` on ids, averaged over its layers: {"error", "mean", "first",
    "directions", "inputs"}, all shares in [0, 1]: of the output's energy that is error; of the error's energy, the
    mean, the strongest direction and the `rank` strongest; of the inputs' energy, the `rank` strongest.
    """
    rows = []
    for layer, W, X in walk(model, dense, ids):
        D, H = W - layer.weight, X.double().T @ X.double() / len(X)
        energies, own = spectrum(D, H)[0], torch.linalg.eigvalsh(H).flip(0)
        total = energies.sum()
        rows.append([total / spectrum(W, H)[0].sum(), mean_share(D, X), energies[0] / total,
                     energies[:rank].sum() / total, own[:rank].sum() / own.sum()])
    means = torch.tensor([[float(share) for share in row] for row in rows]).mean(0).tolist()
    return dict(zip(("error", "mean", "first", "directions", "inputs"), means))


@torch.no_grad()
def correct_directions(model, dense, ids, rank=RANK):
    """LoRA without training: the tensors A = LT D, B = L of each layer, as `study.repairs.attach` takes them.

    `model` is not modified. Every layer is corrected on what the corrected blocks in front of it give.
    """
    model = shared_copy(model)
    tensors = add_lora(model, rank)
    for layer, W, X in walk(model, dense, ids):
        D = (W - layer.base.weight).double()
        L = spectrum(D, X.double().T @ X.double())[1][:, :rank]
        layer.A.copy_(L.T @ D)
        layer.B.copy_(L)
    return [p.detach() for p in tensors]


# ---- the job

def recalled(subject, run):
    """{split: (N,) 1.0 where the fact is answered rightly} on seen and held-out people."""
    return {split: torch.tensor([float(a["correct"]) for a in answer(subject, facts, run.world.encoding)])
            for split, facts in facts_to_ask(run).items()}


def facts_to_ask(run):
    """{split: facts} that the job asks about."""
    return {split: run.world.facts(split, PEOPLE) for split in ("seen", "heldout")}


def returned(dense, damaged, repaired, run, seed=31):
    """{split: [share, low, high]} of what the damage took that a repair without training brings back; None where the
    damage took nothing for sure.
    """
    out, generator = {}, torch.Generator().manual_seed(seed)
    for split, facts in facts_to_ask(run).items():
        sums, sizes = by_person([right[split].tolist() for right in (dense, damaged, repaired)], facts)
        drawn = resampled(sums, 10_000, generator, sizes).numpy()  # (10000, 3)
        whole, less, back = (Estimate(float(sums[:, i].sum() / sizes.sum()), drawn[:, i:i + 1]) for i in range(3))
        found = share_of(back - less, whole - less)
        out[split] = [found.value, *found.interval()] if found else None
    return out


def main(arguments):
    """python -m study why: for each compressor the shape of its output error, and what comes back without training."""
    parser = job_parser("study why", "Why one compressor's damage is displaced and another's is not.")
    args = parser.parse_args(arguments)
    config = config_of(args)
    run = Run(config, World(config))
    print(compressor_table(run, dense_subject(run)))


def compressor_table(run, dense):
    """The job's Markdown table, a row a compressor."""
    calibration, before = run.world.calibration(run.config), recalled(dense, run)
    head, rows = ["compressed", "held-out %", "error, % of the output's energy", "of it the mean %",
                  "the first direction %", f"{RANK} directions %", f"{RANK} directions of the inputs %",
                  "bias correction: held-out back % [95 %]",
                  f"LoRA rank {RANK} in closed form: held-out back % [95 %]", "and of seen facts % [95 %]"], []
    for tag in run.config.compressions:
        model = unpacked(compressed_subject(run, dense, tag).model)
        shape, after = error_shape(model, dense.model, calibration), recalled(Subject(model), run)
        biases = correct_biases(shared_copy(model), dense.model, calibration.to(dense.device), LINEARS)
        lora = correct_directions(model, dense.model, calibration)
        means, directions = (returned(before, after, recalled(subject, run), run) for subject in
                             (attach(model, "correction", LINEARS, biases), attach(model, "lora", RANK, lora)))
        cells = [f"{100 * float(after['heldout'].mean()):.1f}"] + [f"{100 * part:.1f}" for part in shape.values()]
        cells += [share(found) if found else "too little was lost"
                  for found in (means["heldout"], directions["heldout"], directions["seen"])]
        rows.append([tag, *cells])
    return markdown(head, rows)
