"""What a model learns while it is changed: plain text, or prompts and answers; a part is held out and judges it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesalius.change.faults import EXAMPLE, Fault, Faults, Repairing, RepairPlan, likelihood, read_faults
from vesalius.corpus import plain_text
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.rows import jsonl_rows
from vesalius.train.learning import TextRows
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.special import needs_for

LEAST = 4  # examples: a quarter is held out


def read_lesson(on: str) -> list[Fault] | None:
    """The examples of a .jsonl file of `prompt` and `good`; None where `on` names plain text.

    Raises:
        VesaliusError: for an example without an answer, or too few of them.
    """
    place = Path(on)
    if not (place.suffix == ".jsonl" and place.is_file() and _asks(place)):
        return None
    found = read_faults(place)
    lacking = sum(not f.good for f in found)
    if lacking:
        raise VesaliusError(
            f"{on}: {lacking} of {len(found)} examples have no good; every line says what should follow"
        )
    if len(found) < LEAST:
        raise VesaliusError(f"{on} holds {len(found)} examples; at least {LEAST} are needed, a quarter is held out")
    return found


def _asks(place: Path) -> bool:
    """Whether the first line of a file is an example."""
    with place.open(encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    return any("prompt" in row for _, row in jsonl_rows(str(place), first, example=EXAMPLE))


def texts_read(texts: int) -> int:
    """Texts of a corpus that a lesson of so many reads, those held out among them."""
    return texts + max(2, texts // 8)


@dataclass(frozen=True)
class Lesson:
    """What is learnt, and what is held out of it.

    Attributes:
        source, objective: as of the trainer. examples: held out; or text: held out, (row, pos).
    """

    source: Any
    objective: Any
    examples: Sequence[Fault] = ()
    text: Tensor | None = None

    @classmethod
    def of(
        cls, model: Model, on: str, examples: Sequence[Fault] | None, texts: int, length: int, rows: int, seed: int
    ) -> Lesson:
        """The lesson that `read_lesson` found.

        Args:
            model: that learns. on: its name. examples: or None for plain text. texts, length: of plain text.
            rows: of a step. seed: of what is held out and of the order.
        """
        if examples is None:
            text = plain_text(model, on, texts_read(texts), length)
            vocabulary = int(model.hf.config.vocab_size)
            objective = make_objective("causal-lm", needs_for(model.hf, model.tokenizer))
            return cls(TextRows(text[:texts], rows, seed, vocabulary), objective, text=text[texts:])
        order = np.random.default_rng([seed, *b"held out"]).permutation(len(examples))
        out = max(1, len(examples) // 4)
        plan = RepairPlan(rows=rows, loss="sft", seed=seed)
        source = Faults(model, [examples[i] for i in order[out:]], plan)
        return cls(source, Repairing(plan), [examples[i] for i in order[:out]])

    @torch.no_grad()
    def judge(self, model: Model) -> dict[str, float]:
        """How well a model does what was held out: `perplexity`, or `said` (share) and `log_p` (mean, of a token)."""
        if self.text is None:
            found = likelihood(model, self.examples, "good")
            return {"held_out": len(found), "said": float(found[:, 1].mean()), "log_p": float(found[:, 0].mean())}
        losses = []
        for ids in self.text.split(4):
            log_p = model.logits(ids)[:, :-1].float().log_softmax(-1)
            losses.append(-log_p.gather(-1, ids[:, 1:, None].to(log_p.device))[..., 0].double().mean(1))
        return {"held_out": len(self.text), "perplexity": float(torch.cat(losses).mean().exp())}
