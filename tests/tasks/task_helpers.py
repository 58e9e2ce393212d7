"""What the task tests share: training text, a BPE, a stand-in for an opened model, plain reading of logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vesalius.tasks.words import lines, wordlist

WORDS = ("names", "places", "objects", "colors", "colored_objects", "events", "nouns")
WORDS += ("days", "months", "numbers", "letters")
UNSEEN = ("Vincent", "Switzerland", "bracelet")  # kept out of the training text: these come in pieces


def text() -> list[str]:
    """The training text: every word after a space several times, templates, and years."""
    words = [w for name in WORDS for w in wordlist(name)]
    words += [w.capitalize() for w in wordlist("colors")]
    for name in ("capitals", "languages", "currencies"):
        words += [w for line in lines(name) for w in line.split(": ") if " " not in w]
    words = [w for w in words if w not in UNSEEN]
    templates = [line for name in ("ioi_templates", "successor_frames", "capital_templates") for line in lines(name)]
    plain = [t.replace("{", "").replace("}", "") for t in templates]
    code = 'def load(self, a):\n    """x y\n\n    :param a: b c\n    :param\nQ: What color is there? A: you see'
    years = [f"the war lasted from the year 17{y:02d} to the year 17" for y in range(100)]
    return ["the " + " ".join(words)] * 4 + plain * 4 + [code] * 4 + years * 2 + ["3 + 4 = 7", "3+4=7", "9 - 2 = 7"]


def bpe(digits: str, specials: list[str], size: int = 6000) -> Tokenizer:
    """A byte-level BPE; `digits` is the expression that cuts numbers."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(text(), trainer)
    return tok


def opened(tokenizer: Any, kind: str = "causal", hf: Any = None) -> Any:
    """What a task needs of an opened model."""
    limit = getattr(getattr(hf, "config", None), "max_position_embeddings", None)
    return SimpleNamespace(tokenizer=tokenizer, kind=kind, hf=hf, n_positions=limit)


def read(model: Any, pairs: Any, clean: bool = True) -> torch.Tensor:
    """Logits (row, read, vocabulary) of a plain Hugging Face forward."""
    ids = pairs.clean if clean else pairs.corrupted
    extra: dict[str, Any] = {}
    if model.kind == "causal":
        extra["position_ids"] = (pairs.mask.cumsum(-1) - 1).clamp(min=0)
    if pairs.decoder is not None:
        extra["decoder_input_ids"] = pairs.decoder
    logits = model.hf(input_ids=ids, attention_mask=pairs.mask, **extra).logits
    return logits[torch.arange(len(ids))[:, None], pairs.reads]
