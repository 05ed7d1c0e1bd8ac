"""
Makes tests/golden/adapters/: adapters that PEFT wrote for two tiny random models, and what PEFT computes with them.

    python -m venv out/golden && . out/golden/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 accelerate peft==0.21.2 tiktoken
    python tests/golden/make_adapters.py

It then goes the other way too: adapters of every kind that adapters.py wrote are loaded with PeftModel.from_pretrained,
and the two must agree to 1e-5. These packages are no part of the study (it runs on four): they are imported by name.

    llama, opt                       the bases, as transformers saves them
    llama-lora, ..., opt-prefix      the adapters, as PEFT saves them, without its README.md
    logits.npz                       ids (2, 12), and by adapter the logits (2, 12, V) of the text
"""
import importlib
import os
import pathlib
import shutil
import sys
import tempfile

import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parent / "adapters"
SHAPE = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
             bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=True)
BASES = {"llama": ("Llama", dict(SHAPE, intermediate_size=24, num_key_value_heads=2)),
         "opt": ("OPT", dict(SHAPE, word_embed_proj_dim=16, ffn_dim=24))}
ADAPTERS = {
    "llama-lora": ("LoraConfig", dict(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])),
    "llama-lora-partly": ("LoraConfig", dict(r=3, lora_alpha=4, use_rslora=True, target_modules=["o_proj", "gate_proj"],
                                             layers_to_transform=[1])),
    "llama-prompt": ("PromptTuningConfig", dict(num_virtual_tokens=3)),
    "llama-prefix": ("PrefixTuningConfig", dict(num_virtual_tokens=3)),
    "opt-lora": ("LoraConfig", dict(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "v_proj", "out_proj",
                                                                         "fc1", "fc2"])),
    "opt-prompt": ("PromptTuningConfig", dict(num_virtual_tokens=3)),
    "opt-prefix": ("PrefixTuningConfig", dict(num_virtual_tokens=3)),
    "llama-gains": ("LNTuningConfig", dict(target_modules=["input_layernorm", "post_attention_layernorm", "norm"])),
}


def randomize(torch, parameters, seed, std):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * std)


def logits(torch, model, ids):
    """Logits (2, 12, V) of the text; those of prompt tokens, which PEFT also returns, are cut off."""
    with torch.no_grad():
        return model.eval()(ids).logits[:, -ids.shape[1]:].numpy()


def record(torch, transformers, peft, ids):
    """Write bases, adapters and logits; returns {base name: folder}."""
    arrays = {"ids": ids.numpy()}
    for i, (name, (family, settings)) in enumerate(BASES.items()):
        model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**settings))
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
        randomize(torch, model.parameters(), i, 0.3)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    for i, (name, (kind, settings)) in enumerate(ADAPTERS.items()):
        base = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / name.partition("-")[0])
        model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
        randomize(torch, [p for p in model.parameters() if p.requires_grad], 10 + i, 0.3)
        model.peft_config["default"].base_model_name_or_path = name.partition("-")[0]  # not a folder of this machine
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink()
        arrays[name] = logits(torch, model, ids)
    np.savez_compressed(FOLDER / "logits.npz", **arrays)


def check_ours(torch, transformers, peft, ids):
    """Adapters written by the study - PEFT's own, read and written again, and others - give the same logits in PEFT."""
    sys.path.insert(0, str(FOLDER.parents[2]))
    modules = "checkpoints.adapters", "recover", "checkpoints.weights"
    adapters, recover, weights = map(importlib.import_module, modules)
    cases = [(name.partition("-")[0], name) for name in ADAPTERS]
    cases += [(base, kind) for base in BASES for kind in adapters.PEFT_TYPES]
    for base, name in cases:
        model, _ = weights.load_pretrained(FOLDER / base)
        c, repair, kind = model.config, None, name
        if name in ADAPTERS:
            kind, repair = adapters.load_adapter(FOLDER / name, model)
        elif kind == "lora":
            randomize(torch, recover.add_lora(model, 4, alpha=6), 20, 0.3)
        elif kind == "prompt":
            repair = torch.randn(5, c.n_embd)
        elif kind == "prefix":
            repair = recover.Prefix(torch.randn(c.n_layer, 2, c.n_kv_head, 5, c.head_size))
        elif kind == "gains":
            repair = recover.own_gains(model)
            randomize(torch, repair, 21, 0.3)
        else:
            continue  # PEFT has no pools and no biases alone
        with torch.no_grad():
            ours = (model(ids, cache=repair.cache(model, *ids.shape)) if kind == "prefix" else
                    model(ids, prompt=getattr(repair, "weight", repair) if kind == "prompt" else None)).numpy()
        if kind == "gains":
            repair = dict(zip(adapters.norm_names(model), repair))
        with tempfile.TemporaryDirectory() as folder:
            adapters.save_adapter(folder, model, kind, repair)
            theirs = logits(torch, peft.PeftModel.from_pretrained(
                transformers.AutoModelForCausalLM.from_pretrained(FOLDER / base), folder), ids)
        difference = np.abs(ours - theirs).max()
        print(f"{base}, {name}: logits up to {np.abs(theirs).max():.2f}, largest difference {difference:.1e}")
        assert difference < 1e-5


def main():
    torch, transformers, peft = map(importlib.import_module, ("torch", "transformers", "peft"))
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.makedirs(FOLDER)
    ids = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(5))
    record(torch, transformers, peft, ids)
    check_ours(torch, transformers, peft, ids)


if __name__ == "__main__":
    main()
