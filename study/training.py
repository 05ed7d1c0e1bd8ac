"""
Training the dense GPT of the small world: one recipe of three ingredients, each of which can be left out.
"""
import time
from dataclasses import replace

import torch

import recover
from model import GPT, GPTConfig
from world.facts import text_batches

RECIPE = {  # what the dense GPT is trained with, and what each ingredient is for
    "muon": "Muon on the blocks' matrices; without it AdamW takes all, at half the rate",
    "few": "the first tenth of the steps reads a tenth of the people",
    "aligned": "every row of a batch begins with a document, as every question does",
}


def train_dense(run):
    """The dense GPT, trained on everybody but the novel people, with all of RECIPE but config.without.

    The first tenth of the steps reads a tenth of the people, of every split alike: a model learns how to look a fact up
    from few people told often, and then learns the others' much faster (Zucchet et al. 2025, arXiv 2503.21676).
    """
    config, world = run.config, run.world
    generator, began = torch.Generator().manual_seed(config.seed), time.time()
    model = GPT(GPTConfig(vocab_size=world.encoding.n_vocab, **config.gpt)).init_weights(generator).to(config.device)
    few, everybody = (text_batches(text, world.encoding, *config.pretrain_batch, generator,
                                   aligned=config.without != "aligned") for text in (world.first_text, world.text))
    steps, fit = config.pretrain.steps, config.pretrain
    first = 0 if config.without == "few" else steps // 10
    if config.without == "muon":
        fit = replace(fit, lr=fit.lr / 2, muon=0.0)
    stream = (next(few if i < first else everybody).to(config.device) for i in range(steps))
    recover.fit(model, model.parameters(), stream, config=fit, progress=run.log.progress("dense", steps))
    tokens = steps * config.pretrain_batch[0] * config.pretrain_batch[1]
    run.log.say(f"dense: {tokens:,} tokens, {tokens / (time.time() - began):,.0f} a second")
    return model
