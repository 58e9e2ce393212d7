"""One short training of a model in memory: rows of text or labels, an objective, a log; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.records import request_hash
from vesalius.train.optimizers import make_optimizer
from vesalius.train.parallel import World
from vesalius.train.plugs import Plug
from vesalius.train.schedules import make_schedule
from vesalius.train.trainer import Trainer, deterministic, is_exact

Tell = Callable[[str, float | None], None]


def check_steps(steps: int, rows: int, lr: float) -> None:
    """Refuses a training that is none."""
    if steps < 1 or rows < 1 or not 0 < lr < float("inf"):
        raise VesaliusError(f"steps={steps}, rows={rows}, lr={lr}; give numbers above 0")


class TextRows:
    """Rows of text as a `Source`: each step takes the next ones, round and round, in an order drawn for each round.

    Args:
        text: (row, pos) ids. rows: of a step. seed: of the order. vocab_size: of the model.
        mask: which tokens may be targets, (row, pos); None for all.
    """

    def __init__(self, text: ArrayLike, rows: int, seed: int, vocab_size: int, mask: ArrayLike | None = None) -> None:
        self.text = np.asarray(text, dtype=np.int64)
        self.mask = None if mask is None else np.asarray(mask, dtype=bool)
        self.rows, self.seed, self.vocab_size = rows, seed, vocab_size
        self.length = self.text.shape[1] - 1
        self.fingerprint = request_hash(self.describe())

    def describe(self) -> dict[str, Any]:
        """All that decides the batches."""
        return {"kind": "rows", "text": int(self.text.sum()), "shape": list(self.text.shape), "rows": self.rows,
                "seed": self.seed}  # fmt: skip

    def chosen(self, step: int) -> NDArray[np.int64]:
        """Numbers of the rows of a step."""
        every = len(self.text)
        places = np.arange(step * self.rows, (step + 1) * self.rows)
        epochs, within = places // every, places % every
        orders = {e: np.random.default_rng([self.seed, int(e), *b"rows"]).permutation(every) for e in set(epochs)}
        return np.array([orders[e][i] for e, i in zip(epochs, within, strict=True)], dtype=np.int64)

    def batch(self, step: int) -> Batch:
        """The rows of a step, each a document of its own."""
        at = self.chosen(step)
        segments = np.repeat(np.arange(self.rows)[:, None] + step * self.rows, self.text.shape[1], axis=1)
        return Batch(step, self.text[at], segments, None if self.mask is None else self.mask[at])


def learn(
    model: Model,
    source: Any,
    objective: Any,
    steps: int,
    lr: float,
    seed: int = 0,
    plugs: Sequence[Plug] = (),
    tell: Tell = lambda what, share: None,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
) -> pd.DataFrame:
    """Updates the parameters that take gradients, the rate rising and falling; no dropout.

    Args:
        model: trained in place, and frozen when it is done. source, objective: as of the trainer. lr: peak.
        optimizer: by name, as in a recipe.

    Returns:
        One row a step: step, loss, lr, and what the objective logs.

    Raises:
        VesaliusError: if the loss, or after the last step a weight, is no number.
    """
    trainer = Trainer(
        model.hf,
        source,
        objective,
        make_optimizer(optimizer, model.hf, lr=lr, weight_decay=weight_decay),
        make_schedule("linear", steps, warmup=0.1, final=0.0),
        seed=seed,
        world=World.single(model.device),
        plugs=plugs,
    )
    rows: list[Mapping[str, Any]] = []
    try:
        with deterministic(is_exact(None, model.device)):
            for step in range(steps):
                model.hf.eval()
                one = trainer.step()
                rows.append({"step": one.step, "loss": one.loss, "lr": one.lr, **one.logs})
                tell(f"step {step + 1} of {steps}: loss {one.loss:.3f}", (step + 1) / steps)
        refuse_diverged(model)
    finally:
        model.hf.eval().requires_grad_(False)
    return pd.DataFrame(rows)


def refuse_diverged(model: Model) -> None:
    """Refuses weights that the last step made NaN or infinite: no loss after it tells."""
    bad = [n for n, p in model.hf.named_parameters() if p.is_floating_point() and not bool(p.isfinite().all())]
    if bad:
        raise VesaliusError(
            f"{len(bad)} of the weights are NaN or infinite after the last step ({bad[0]}); lower the learning rate"
        )
