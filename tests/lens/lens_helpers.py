"""Where tests keep what they know by hand: each family's ending, and small texts and tokenizers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from families import tiny_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from vesalius.model import Model

# The final norm, what follows it, and the unembedding, as transformers names them.
ENDINGS = {
    "gpt2": ("transformer.ln_f", "lm_head"),
    "gpt-neox": ("gpt_neox.final_layer_norm", "lm_head"),
    "gptj": ("transformer.ln_f", "lm_head"),
    "opt": ("model.decoder.final_layer_norm", "lm_head"),
    "opt-350m": ("model.decoder.project_out", "lm_head"),
    "bloom": ("transformer.ln_f", "lm_head"),
    "llama": ("model.norm", "lm_head"),
    "phi": ("model.final_layernorm", "lm_head"),
    "gemma2": ("model.norm", "lm_head"),
    "gemma3": ("model.norm", "lm_head"),
    "bert": ("cls",),
    "t5": ("decoder.final_layer_norm", "lm_head"),
}
DECODER = torch.tensor([[0, 7, 8, 9]])


def ending(model: Model, hidden: Tensor) -> Tensor:
    """Logits of a stream (..., d) from transformers' modules alone."""
    for name in ENDINGS[model.name]:
        if name == "lm_head" and model.name == "t5":  # tied to the embedding: transformers scales what it reads
            hidden = hidden * model.hf.config.d_model**-0.5
        hidden = model.hf.get_submodule(name)(hidden)
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    return hidden if cap is None else torch.tanh(hidden / cap) * cap


def streams(model: Model, ids: Tensor, decoder: Tensor | None = None) -> list[Tensor]:
    """The stream before the first block and after each one, by hooks on transformers' own list of blocks."""
    blocks: nn.ModuleList = next(
        m for n, m in model.hf.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == 3 and ("encoder." not in n or decoder is None)
    )  # fmt: skip
    found: list[Tensor] = []

    def first(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [
        b.register_forward_hook(lambda m, a, o: found.append(o[0] if isinstance(o, tuple) else o)) for b in blocks
    ]
    with torch.no_grad():
        model.hf(ids, **({} if decoder is None else {"decoder_input_ids": decoder}))
    for handle in handles:
        handle.remove()
    return found


def numbered(size: int = 97) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w1, w2, ..."""
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="w2")


def small(family: str = "llama", seed: int = 0) -> Model:
    """A tiny random model with that tokenizer."""
    return Model.wrap(tiny_hf(family, seed), numbered(), name=f"{family}-{seed}")


def write_text(folder: Path, documents: int = 400, seed: int = 0) -> Path:
    """Documents in which each word leaves four choices for the next, as `text.jsonl`."""
    rng = random.Random(seed)
    after = {i: rng.sample(range(5, 97), 4) for i in range(5, 97)}
    lines = []
    for i in range(documents):
        word, text = rng.randint(5, 96), []
        for _ in range(rng.randint(40, 120)):
            text.append(f"w{word}")
            word = rng.choice(after[word])
        lines.append(json.dumps({"id": f"doc{i}", "text": " ".join(text)}))
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path
