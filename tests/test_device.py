"""Everything that computes, on a device that is not there: a tensor left on the CPU is an error; the numbers agree."""
import copy
import dataclasses

import pytest
import torch

import evaluate
import idp
import recover
from checkpoints.compression import compress_files
from checkpoints.writing import go_on
from compress import compress
from elsewhere import ELSEWHERE, Elsewhere, There, here
from engine.script import guard
from model import GPT, GPTConfig
from study import ask, controls, inside, jobs, mechanism, pools, sweeps, training, trial
from study.repairs import attach, pool_subject, train_repair, unpacked
from study.settings import StudyConfig
from study.steps import Log
from study.taskfiles import continued
from world.facts import WorldConfig, facts_about, make_encoding, make_world, statements, train_bpe
from world.score import Subject, answer, choose_option, perplexity
from world.small import World

PEOPLE = make_world(WorldConfig(seen=4, heldout=2, validation=1, novel=1, vocab_size=300, seed=1))
ENCODING = make_encoding(train_bpe(statements(PEOPLE), 300))
FACTS = facts_about(PEOPLE)[:12]
CHOICES = [f._replace(options=(f.answer, " Tarmere", " baker and miller")) for f in FACTS if f.attribute == "employer"]
IDS = torch.randint(300, (6, 21), generator=torch.Generator().manual_seed(2))
FIT = recover.FitConfig(steps=3, lr=1e-2)
DEVICES = [ELSEWHERE] + [torch.device("cuda")] * torch.cuda.is_available()


def small(**settings):
    config = GPTConfig(vocab_size=300, n_layer=2, n_head=2, n_embd=32, n_kv_head=1, n_hidden=48, activation="swiglu")
    return GPT(GPTConfig(**{**vars(config), **settings})).init_weights(torch.Generator().manual_seed(0))


def moved(model, device):
    model = copy.deepcopy(model).to(device)
    model.tie()
    return model


def back(x):
    """x with every tensor on the CPU."""
    if isinstance(x, (list, tuple)):
        return [back(y) for y in x]
    if isinstance(x, dict):
        return {k: back(y) for k, y in x.items()}
    return here(x.detach()).cpu().clone() if isinstance(x, torch.Tensor) else x


def close(a, b, name=""):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda m: f"{name}: {m}")
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b)):
            close(x, y, f"{name} {i}")
    elif isinstance(a, str):
        assert a == b, name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for k in a:
            close(a[k], b[k], f"{name} {k}")
    else:
        assert a == pytest.approx(b, abs=1e-3, rel=1e-2), name


def pool_of(model):
    generator = torch.Generator().manual_seed(4)
    return idp.PromptPool([recover.prompt_init(model, n, generator) for n in (3, 5)])


def same(work):
    """`work(model, ids)` on the CPU and on each other device there is: the same."""
    other = {"position": "learned", "activation": "relu", "norm": "layernorm", "bias": True, "tied": False}
    for settings in ({}, other):
        model = small(**settings)
        wanted = back(work(model, IDS))
        for device in DEVICES:
            with Elsewhere():
                close(wanted, back(work(moved(model, device), IDS.to(device))), str(device))


def test_a_tensor_on_the_cpu_is_an_error_elsewhere():
    """The test's own test."""
    with Elsewhere():
        model = moved(small(), ELSEWHERE)
        with pytest.raises(RuntimeError, match="on the CPU"):
            model(IDS)
        assert isinstance(model(IDS.to(ELSEWHERE)), There)


def test_the_forward_pass_and_generation():
    lengths = torch.tensor([3, 21, 5, 7, 9, 1])
    same(lambda model, ids: [model(ids), model.generate(ids, 5, lengths=lengths.to(ids.device)),
                             model.generate(ids, 4, stop=7, prompt=model.wte(ids[0, :3]))])
    same(lambda model, ids: model.generate(ids, 3, temperature=1.0, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("method, settings", [
    ("rtn", {"bits": 3, "group_size": 16}), ("gptq", {"bits": 3, "group_size": 16, "search": False}),
    ("gptq", {"bits": 4, "act_order": True, "refit": True}), ("sparsegpt", {"sparsity": 0.5}),
    ("sparsegpt", {"n_m": (2, 4), "bits": 4}), ("magnitude", {"sparsity": 0.5}), ("wanda", {"sparsity": 0.5})])
def test_calibration_and_every_compressor(method, settings):
    def work(model, ids):
        """The ids are the world's, on the CPU."""
        small, report = compress(model, IDS, method, lengths=[21, 3, 9, 21, 21, 1], **settings)
        return [unpacked(small)(ids), small(ids), [row["error_after"] for row in report]]
    same(work)


@pytest.mark.parametrize("kind, size", [
    ("lora", 2), ("lora", (1, "o")), ("bias", "o down"), ("prefix", 3), ("prompt", 4),
    *(("idp", (2, 3, way)) for way in ("together", "joint", "competitive", "selected"))])
def test_every_repair(kind, size):
    def work(model, ids):
        batches = recover.add_targets(model, [ids[:3], ids[3:]], k=8)
        model = copy.deepcopy(model)  # damaged: a student that is its own teacher has rounding errors for gradients
        for p in model.blocks.parameters():
            p.data.mul_(0.8)
        tensors = train_repair(model, kind, size, batches, recover.distillation, FIT, 0)
        given = answer(attach(model, kind, size, tensors), FACTS, ENCODING)
        return [a["logprob"] for a in given]  # tensors differ more: AdamW's first steps enlarge rounding errors
    same(work)


def test_training_with_muon():
    def work(model, ids):
        model = copy.deepcopy(model)
        return recover.fit(model, model.parameters(), [ids], config=recover.FitConfig(steps=3, lr=1e-3, muon=0.01))
    same(work)


def test_the_pool_chooses():
    same(lambda model, ids: [idp.select(model, pool_of(model), ids), idp.forward(model, pool_of(model), ids)])
    same(lambda model, ids: idp.attention_scores(model, idp.prefill(model, pool_of(model)), ids, layer=1))


def test_the_scorer():
    def work(model, ids):
        for subject in (Subject(model), pool_subject(model, pool_of(model))):
            yield [answer(subject, FACTS, ENCODING), choose_option(subject, CHOICES, ENCODING),
                   perplexity(subject, IDS),
                   continued(subject, CHOICES, ENCODING)]
    same(lambda model, ids: list(work(model, ids)))


def test_what_the_study_looks_at_beside_answers():
    def work(model, ids):
        pool, generator = pool_of(model), torch.Generator().manual_seed(3)
        subject = pool_subject(model, pool)
        return [*(pools.selectors(ENCODING, model, pool, facts[:6], facts[6:], generator)
                  for facts in (FACTS, CHOICES * 5)),
                inside.similarity(subject, inside.inside(Subject(model), IDS), IDS)]
    same(work)


CONFIG = StudyConfig(world=WorldConfig(seen=8, heldout=8, validation=2, novel=12, vocab_size=300), repair_batch=(4, 16),
                     pretrain=recover.FitConfig(steps=3, lr=1e-3, muon=0.01), pretrain_batch=(4, 16), repair_steps=2,
                     gpt={"n_layer": 1, "n_head": 2, "n_embd": 32})


class Made:
    """What steps of the study read of a Run."""
    config, world, log = CONFIG, World(CONFIG), Log()


def test_training_the_dense_gpt(monkeypatch):
    """The trained tensors themselves differ: Muon and AdamW's first steps enlarge rounding errors."""
    monkeypatch.setattr(Made, "config", dataclasses.replace(CONFIG, device=str(ELSEWHERE)))
    with Elsewhere():
        made = training.train_dense(Made())
        assert isinstance(made.wte.weight.data, There) and isinstance(made(IDS.to(ELSEWHERE)), There)


def test_controls_and_their_teacher():
    fast = recover.FitConfig(steps=2, lr=1e-3)
    how = controls.ControlConfig(key=2, lock=fast, lock_batch=(4, 16), tell=fast, tell_batch=(4, 16), old_batch=(2, 16))

    def work(model, ids):
        generator = torch.Generator().manual_seed(5)
        key = recover.prompt_init(model, how.key, generator=generator)
        locked = controls.train_lock(model, key, Made.world, how, generator)
        told = controls.tell(model, Made.world, how, generator)
        reference = attach(locked, "prompt", how.key, [key])
        batches = controls.control_batches(Made, controls.Control(reference, Subject(told), {}, Made.world.repair_text))
        return [locked(ids), told(ids), controls.add_rank_one(model, how, generator)(ids), batches]
    same(work)


def test_the_fair_trial_and_why():
    how = trial.TrialConfig(key=2, prompt=2, lock=recover.FitConfig(steps=2, lr=1e-3), lock_batch=(4, 16), steps=2,
                            rows=4)

    def work(model, ids):
        generator = torch.Generator().manual_seed(5)
        keys = [recover.prompt_init(model, how.key, generator=generator) for _ in trial.SETS]
        locks = trial.train_locks(model, keys, Made.world, how, generator)
        batches = trial.taught_by([trial.opener(locks, key) for key in keys],
                                  trial.rows_of_groups(trial.SETS, Made.world, how, 0, ids.device))
        pool = trial.new_pool(locks, 2, how.prompt, generator, probe=True)
        trial.train_pool(locks, pool, "selected", batches, how)
        small = unpacked(compress(model, IDS, "rtn", bits=3)[0])
        return [locks(ids), *pool.prompts, mechanism.error_shape(small, model, IDS, 2),
                *recover.correct_biases(small, model, IDS.to(ids.device), recover.LINEARS)]
    same(work)


@pytest.mark.parametrize("job", [
    lambda nowhere: compress_files(["--in", "a", "--text", "b", "--method", "rtn", "--bits", "3", *nowhere], compress),
    lambda nowhere: go_on(["--model", "a", *nowhere]), jobs.train_job, jobs.compress_job, jobs.repair_job, ask.main,
    mechanism.main, trial.main, lambda nowhere: sweeps.main(["bits", *nowhere])])
def test_an_absent_device_is_one_line(job):
    """The real study's is in test_real.py."""
    for device in ("nowhere", "meta", "cuda")[:2 + (not torch.cuda.is_available())]:
        with pytest.raises(ValueError, match=f"--device {device}: [^\\n]+$"):
            job(["--device", device])


def test_the_studys_absent_device_has_status_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--device", "nowhere"])
    with pytest.raises(SystemExit) as stopped:
        guard(evaluate.main)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("evaluate.py: --device nowhere: ")


def test_half_precision():
    """`--dtype bfloat16`: a model in bfloat16 is compressed, repaired and asked in its own dtype."""
    with Elsewhere():
        model = moved(small().to(torch.bfloat16), ELSEWHERE)
        made = unpacked(compress(model, IDS, "gptq", bits=4)[0])
        assert made.blocks[0].mlp.down.weight.dtype == torch.bfloat16
        batches = recover.add_targets(model, list(IDS.to(ELSEWHERE).split(3)), k=8)
        for kind, size in (("lora", 2), ("bias", "o down"), ("gains", None), ("prompt", 4), ("prefix", 2),
                           *(("idp", (2, 3, way)) for way in ("together", "joint", "competitive", "selected"))):
            tensors = train_repair(made, kind, size, batches, recover.distillation, FIT, 0)
            assert len(answer(attach(made, kind, size, tensors), CHOICES, ENCODING)) == len(CHOICES), kind
