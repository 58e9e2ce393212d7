"""Tiny random models that can read numbered words, and an encoder whose space is planted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from families import VOCAB, tiny_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from vesalius.model import Model


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def tokenizer(size: int = VOCAB, special: bool = False, names: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Whole words: w1, w2, ... (or `names` from token 5 on); with `special`, [CLS] before and [SEP] after a text."""
    table = {"<unk>": 0, "<s>": 1, "</s>": 2}
    known = list(names) or [f"w{i}" for i in range(1, size - 2)]
    table |= {w: i for i, w in enumerate(known, 3)}
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    stops = any(w.endswith(".") for w in known)  # then a stop belongs to its word
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if stops else pre_tokenizers.Whitespace()
    if special:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    options = {} if special else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>", cls_token="<s>", sep_token="</s>", **options
    )


@cache
def spoken(family: str) -> Model:
    special = family in ("bert", "roberta")
    return Model.wrap(tiny_hf(family), tokenizer(special=special), name=family)


class Plant:
    """An encoder that gives each text the mean of vectors chosen for its words: no block changes anything."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        d = len(next(iter(vectors.values())))
        config = BertConfig(
            vocab_size=len(vectors) + 3, hidden_size=d, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=4, max_position_embeddings=64,
        )  # fmt: skip
        hf = BertModel(config, add_pooling_layer=False).eval()
        with torch.no_grad():
            for name, p in hf.named_parameters():
                p.fill_(float("LayerNorm.weight" in name))
            rows = torch.tensor(np.stack(list(vectors.values())), dtype=torch.float32)
            hf.embeddings.word_embeddings.weight[3:] = rows
        self.words = tokenizer(names=list(vectors))
        self.hf = hf

    @property
    def model(self) -> Model:
        return Model.wrap(self.hf, self.words, name="plant")
