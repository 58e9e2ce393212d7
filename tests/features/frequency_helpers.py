"""A language model with a clock: units that fire at every fourth and every second word, whatever the words are."""

from __future__ import annotations

import torch
from features_helpers import tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from vesalius.model import Model


def clock(words: list[str]) -> Model:
    """A GPT-2 whose units 0 and 1 fire at every fourth and every second word; the others follow the words."""
    config = GPT2Config(
        vocab_size=len(words) + 3, n_embd=32, n_layer=1, n_head=1, n_positions=512, n_inner=16,
        activation_function="relu",
    )  # fmt: skip
    hf = GPT2LMHeadModel(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in hf.transformer.h[0].attn.parameters():
            p.zero_()
        place = torch.zeros(512, 32)
        place[torch.arange(512), torch.arange(512) % 4] = 4.0
        hf.transformer.wpe.weight.copy_(place)
        hf.transformer.wte.weight.copy_(torch.cat([torch.zeros(len(words) + 3, 4), torch.randn(len(words) + 3, 28)], 1))
        into = hf.transformer.h[0].mlp.c_fc
        into.weight.copy_(torch.randn(32, 16) * 0.3)
        into.weight[:4] = 0
        into.weight[0, 0] = into.weight[0, 1] = into.weight[2, 1] = 1.0
        into.weight[4:, :2] *= 0.3
        into.bias.zero_()
    return Model.wrap(hf, tokenizer(len(words) + 3, names=words), name="clock")
