"""The whole examination: bias, who writes it, repairs chosen on development questions and measured on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.find.anchored.bias import (
    Bias,
    Floats,
    bias,
    knowledge,
    known,
    letter_logits,
    prior_of,
    right_places,
    variation,
)
from vesalius.find.anchored.diagnosis import Diagnosis, diagnose
from vesalius.find.anchored.questions import Choice
from vesalius.find.anchored.repair import (
    MOST,
    ValueEdit,
    even_look,
    fit_values,
    label_aware,
    letters_under,
    looking_heads,
    random_values,
    text_loss,
)
from vesalius.model import Model
from vesalius.parts import Part

LEAST = 8  # questions of either set
HEADS = (3, MOST)  # numbers of heads tried on development questions


@dataclass(frozen=True)
class Examined:
    """What was found of a model's multiple choice.

    Attributes:
        bias: on held-out questions. diagnosis: who writes A. repairs: a row for each condition:
            condition, how (plain, baseline, repair, control),
            variation, accuracy, low and high (95 % Wilson), text (growth of plain-text loss, nats; NaN for what changes
            no weights). edit: the change of value vectors. heads: those with an even look.
        upper: share of anchored questions that turn under the paper's own edit, which is given the answer.
        dev, test: how many questions.
    """

    bias: Bias
    diagnosis: Diagnosis
    repairs: pd.DataFrame
    edit: ValueEdit = field(repr=False)
    heads: list[Part]
    upper: float
    dev: int
    test: int

    def row(self, condition: str) -> dict[str, Any]:
        """One condition's numbers."""
        found = self.repairs.set_index("condition").loc[condition]
        return {str(k): v for k, v in found.items()}

    def summary(self) -> dict[str, Any]:
        """Everything as plain values."""
        d = self.diagnosis
        best = d.scores.top(5, "value")
        return {
            "bias": asdict(self.bias), "difference": d.difference, "residue": d.residue, "top_share": d.top_share,
            "writers": {str(p): float(v) for p, v in zip(best.parts, best.values, strict=True)},
            "neurons": [str(p) for p in self.edit.neurons], "heads": [str(p) for p in self.heads],
            "upper": self.upper, "dev": self.dev, "test": self.test,
        }  # fmt: skip


def examine(
    model: Model,
    dev: Sequence[Choice],
    test: Sequence[Choice],
    text: Tensor,
    *,
    neurons: int = 5,
    draws: int = 3,
    upper: int = 24,
    seed: int = 0,
    step: Callable[[str], object] = lambda name: None,
) -> Examined:
    """Bias, diagnosis and repairs.

    Args:
        dev: questions to choose repairs on; their labels are not read. test: others, to measure on. text: from
            `plain_text`. neurons: value vectors to change. draws: random edits as large. upper: questions for the
            paper's own, label-aware edit. seed: of random edits. step: told each step's name.

    Example:
        >>> found = examine(model, draw(60), draw(200, seed=1), plain_text(model))      # doctest: +SKIP
        >>> found.bias.chosen, found.row("value vectors")["variation"]                    # doctest: +SKIP
    """
    for name, some in (("development", dev), ("held-out", test)):
        if len(some) < LEAST:
            raise VesaliusError(f"{len(some)} {name} questions are too few: {LEAST} are needed, better 60 and 200")
    step("asking the model")
    own, on_dev = letter_logits(model, test), letter_logits(model, dev)
    prior = prior_of(model, test)
    whole = replace(bias(own, test, prior), knows=known(knowledge(model, test), test))
    step("who writes the letter")
    found = diagnose(model, dev)
    rows = [_row("as it is", own, test), _row("prior calibration", own - prior, test, how="baseline")]
    rows.append(_row("calibration on development questions", own - on_dev.mean(0), test, how="baseline"))
    step("value vectors")
    loss = text_loss(model, text)
    edit = fit_values(model, dev, text, neurons)
    controls = [random_values(model, edit, seed + i) for i in range(draws)]
    said = letters_under(model, test, [edit, *controls])
    for i, (change, logits) in enumerate(zip([edit, *controls], said, strict=True)):
        with change.on(model):
            cost = text_loss(model, text) - loss
        name, how = (f"random neurons {i}", "control") if i else ("value vectors", "repair")
        rows.append(_row(name, logits, test, cost, how))
    step("an even look at the letters")
    ranked = looking_heads(model, dev)
    tried = {k: variation(even_look(model, dev, ranked[:k]).argmax(1), on_dev.shape[1]) for k in HEADS}
    heads = ranked[: min(tried, key=lambda k: tried[k])]
    rows.append(_row("even look", even_look(model, test, heads), test, how="repair"))
    rng = np.random.default_rng(seed)
    others = [p for p in model.parts(("head",)) if p not in heads]
    for i in range(min(draws, 1)):
        some_heads = [others[j] for j in rng.choice(len(others), min(len(heads), len(others)), replace=False)]
        rows.append(_row(f"random heads {i + 1}", even_look(model, test, some_heads), test, how="control"))
    step("the paper's own edit")
    best = label_aware(model, [q for q in test if q.right != 0][:upper])
    return Examined(whole, found, pd.DataFrame(rows), edit, heads, best, len(dev), len(test))


def _row(
    condition: str, logits: Floats, questions: Sequence[Choice], text: float = float("nan"), how: str = "plain"
) -> dict[str, Any]:
    it = bias(logits, questions, np.zeros(logits.shape[1]))
    return {
        "condition": condition, "how": how, "variation": it.variation, "accuracy": it.accuracy, "low": it.low,
        "high": it.high, "text": text, "n": len(right_places(questions)),
    }  # fmt: skip
