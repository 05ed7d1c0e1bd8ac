"""
Training the dense GPT of the small world: one recipe of three ingredients, each of which can be left out.
"""
import time
from dataclasses import replace
from itertools import islice

import torch

import recover
from model import GPT, GPTConfig
from world.facts import text_batches

RECIPE = {  # what the dense GPT is trained with, and what each ingredient is for
    "muon": "Muon on the blocks' matrices; without it AdamW takes all, at half the rate",
    "growth": "a tenth of the people first, then more and more of them: see GROWTH",
    "aligned": "every row of a batch begins with a document, as every question does",
}
GROWTH = ((0.15, 0.1), (0.15, 0.25), (0.15, 0.5), (0.55, 1.0))  # shares of the steps, and of the people, by split


def train_dense(run):
    """The dense GPT, trained on everybody but the novel people, with all of RECIPE but config.without.

    A model learns how to look a fact up from few people told often, and then learns the others' much faster (Zucchet et
    al. 2025, arXiv 2503.21676); it must not forget how when the many come.
    """
    config, world = run.config, run.world
    generator, began = torch.Generator().manual_seed(config.draw_seed), time.time()
    model = GPT(GPTConfig(vocab_size=world.encoding.n_vocab, **config.gpt)).init_weights(generator).to(config.device)
    steps, fit = config.pretrain.steps, config.pretrain
    if config.without == "muon":
        fit = replace(fit, lr=fit.lr / 2, muon=0.0)

    def stream():
        """The batches of all stages; the last stage has no end."""
        for part, share in GROWTH if config.without != "growth" else GROWTH[-1:]:
            batches = text_batches(world.pretraining(share), world.encoding, *config.pretrain_batch, generator,
                                   aligned=config.without != "aligned")
            yield from (ids.to(config.device) for ids in islice(batches, None if share == 1 else round(part * steps)))
    recover.fit(model, model.parameters(), stream(), config=fit,
                progress=run.log.progress("dense" + config.draw_suffix, steps))
    tokens = steps * config.pretrain_batch[0] * config.pretrain_batch[1]
    run.log.say(f"dense: {tokens:,} tokens, {tokens / (time.time() - began):,.0f} a second")
    return model
