"""What studies of change share: small Llamas with a tokenizer of whole words, kept below runs/studies once made."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _page import RUNS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vesalius
from vesalius.model import Model
from vesalius.model.saving import holds, save_model
from vesalius.records import request_hash, write_atomic
from vesalius.train.learning import TextRows, learn
from vesalius.train.objectives import Needs, make_objective

PAD = "<pad>"


def say(text: str) -> None:
    """What the study does now, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def worded(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and marks; token 0 fills rows, and stands for what it does not know."""
    numbered = {PAD: 0} | {w: i for i, w in enumerate(words, 1)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=PAD, pad_token=PAD)


def small(words: Sequence[str], layers: int, d: int, mlp: int, seed: int, heads: int = 4, room: int = 128) -> Model:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words) + 1, hidden_size=d, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=room, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Model.wrap(LlamaForCausalLM(config), worded(words), name="planted")


def kept(place: str, story: Mapping[str, Any], make: Callable[[], Model]) -> Model:
    """The model of a story below runs/studies/PLACE, made now or before."""
    folder = RUNS / place / request_hash(dict(story))
    if not holds(folder, story):
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        save_model(make(), folder, story)
        say(f"{place}: {story.get('what', '')} {story.get('seed', '')}, {time.perf_counter() - began:.0f} s")
    return vesalius.open(str(folder))


def found_again(place: str, story: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What was measured under a story, as JSON below runs/studies/PLACE: now, or before."""
    path = RUNS / place / f"{request_hash(dict(story))}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(make(), default=float).encode())
    return json.loads(path.read_text())


def taught(
    model: Model, ids: Any, mask: Any, rows: int, steps: int, lr: float, seed: int = 0, decay: float = 0.0
) -> Model:
    """A model trained on rows of tokens, in place; the mask says which are targets."""
    model.hf.requires_grad_(True)
    vocabulary = int(model.hf.config.vocab_size)
    source = TextRows(ids, rows, seed, vocabulary, mask)
    log = learn(model, source, make_objective("causal-lm", Needs(vocabulary, {}, "causal")), steps, lr, seed,
                weight_decay=decay)  # fmt: skip
    say(f"loss {', '.join(f'{x:.3f}' for x in log['loss'].iloc[:: max(1, steps // 8)])}, {log['loss'].iloc[-1]:.3f}")
    return model


def held(came: bool) -> str:
    """The verdict of one check."""
    return "holds" if came else "does not hold"


def each(values: Sequence[float], digits: int = 2) -> str:
    """Numbers of all seeds, one after another."""
    return ", ".join(f"{v:.{digits}f}" for v in values)
