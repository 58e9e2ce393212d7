"""Examples of a fault, and the losses that repair it.

    sft            -log p(good)
    unlikelihood   - sum log(1 - p(bad)), and -log p(good) where there is one   Welleck et al. 2019, 1908.04319
    dpo            -log sigmoid(beta [log p/ref (good) - log p/ref (bad)])      Rafailov et al. 2023, 2305.18290, eq. 7

p is the model, ref the model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from vesalius.corpus.batches import Batch
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.records import request_hash
from vesalius.rows import read_jsonl
from vesalius.tasks.encode import Encoder
from vesalius.train.objectives.base import IGNORED, Loss, Sample
from vesalius.train.objectives.causal import next_tokens
from vesalius.train.objectives.losses import token_loss

How = Literal["dynamic", "fixed", "random", "all"]
Size = Literal["size", "raw", "neutral", "ratio"]
RepairLoss = Literal["sft", "unlikelihood", "dpo"]
EXAMPLE = '{"prompt": "...", "good": "...", "bad": "..."}'
SURE = 1e-6  # keeps log(1 - p) finite


@dataclass(frozen=True)
class Fault:
    """One example: a prompt, what should follow it, and what should not. Either may be missing."""

    prompt: str
    good: str = ""
    bad: str = ""


def read_faults(path: str | Path) -> list[Fault]:
    """Examples of a .jsonl file with `prompt`, `good` and `bad` (or `text`, all of which is bad).

    Raises:
        VesaliusError: naming the line that is not one.
    """
    return [_fault(row, where) for where, row in read_jsonl(path, EXAMPLE)]


def _fault(row: dict[str, Any], where: str) -> Fault:
    if not all(isinstance(v, str) for v in row.values()):
        raise VesaliusError(f"{where}: something is no text; write {EXAMPLE}")
    one = Fault(row.get("prompt", ""), row.get("good", ""), row.get("bad", row.get("text", "")))
    if not (one.good or one.bad):
        raise VesaliusError(f"{where} has neither good nor bad; give what should follow, or what should not")
    return one


@dataclass(frozen=True)
class RepairPlan:
    """How a model is repaired.

    Attributes:
        steps: updates. rows: examples of one. lr: peak learning rate. k: blocks trained at a step.
        how, size, loss: see the module. keep: lambda of the divergence on plain text. beta: of dpo. seed: of the order.
    """

    steps: int = 60
    rows: int = 8
    lr: float = 5e-5
    k: int = 2
    how: How = "dynamic"
    size: Size = "size"
    loss: RepairLoss = "sft"
    keep: float = 1.0
    beta: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("how", get_args(How)), ("size", get_args(Size)), ("loss", get_args(RepairLoss))):
            if getattr(self, name) not in known:
                raise UnknownName(name, str(getattr(self, name)), known)
        if self.steps < 1 or self.rows < 1 or self.k < 1 or not 0 < self.lr < float("inf") or self.keep < 0:
            told = f"steps={self.steps}, rows={self.rows}, k={self.k}, lr={self.lr}, keep={self.keep}"
            raise VesaliusError(f"{told}; give numbers above 0")

    def describe(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


class Faults:
    """Examples as a `Source`: rows of prompt and continuation, the continuation the only target.

    A row's segment is even where it is good, odd where it is bad; a pair's rows follow each other.
    """

    def __init__(self, model: Model, faults: Sequence[Fault], plan: RepairPlan) -> None:
        sides = {"sft": ("good",), "unlikelihood": ("good", "bad"), "dpo": ("good", "bad")}[plan.loss]
        usable = [f for f in faults if (plan.loss == "unlikelihood" and f.bad) or all(getattr(f, s) for s in sides)]
        if not usable:
            raise VesaliusError(f"no example has what the loss {plan.loss} needs: {' and '.join(sides)}")
        self.left_out = len(faults) - len(usable)
        encoder = Encoder(model.tokenizer)
        self.examples: list[list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = []
        for one in usable:
            named = [side for side in sides if getattr(one, side)]
            self.examples.append([(int(side == "bad"), *_tokens(model, encoder, one, side)) for side in named])
        self.per = max(map(len, self.examples))
        self.rows, self.plan = plan.rows * self.per, plan
        self.length = max(len(a) + len(b) for e in self.examples for _, a, b in e) - 1
        self.vocab_size = int(model.hf.config.vocab_size)
        self.padding = getattr(model.tokenizer, "pad_token_id", None) or 0
        self.fingerprint = request_hash(self.describe())

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "faults", "examples": self.examples, "plan": self.plan.describe()}

    def batch(self, step: int) -> Batch:
        drawn = np.random.default_rng([self.plan.seed, step, *b"faults"])
        chosen = drawn.integers(0, len(self.examples), self.plan.rows)
        ids = np.full((self.rows, self.length + 1), self.padding, dtype=np.int64)
        segments = np.full(ids.shape, -1, dtype=np.int64)
        mask = np.zeros(ids.shape, dtype=bool)
        for place, example in enumerate(chosen.tolist()):
            for at, (bad, start, told) in enumerate(self.examples[example]):
                row, n = place * self.per + at, len(start) + len(told)
                ids[row, :n] = (*start, *told)
                segments[row, :n] = 2 * row + bad
                mask[row, len(start) : n] = True
        return Batch(step, ids, segments, mask)


def _tokens(model: Model, encoder: Encoder, one: Fault, side: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is read, and what follows it; without anything before it, the first token of what follows is read.

    Raises:
        VesaliusError: if nothing is left to foretell, or it is more than the model reads.
    """
    text = getattr(one, side)
    start, told = (*encoder.prefix, *encoder.ids(one.prompt)), tuple(encoder.ids(text))
    start, told = (start, told) if start else (told[:1], told[1:])
    if not told:
        raise VesaliusError(
            f"'{text}' after '{one.prompt[:40]}' leaves no token to foretell; give a prompt, or more that follows it"
        )
    if model.n_positions is not None and len(start) + len(told) > model.n_positions:
        raise VesaliusError(
            f"an example of {len(start) + len(told)} tokens ('{(one.prompt or text)[:40]} ...') is longer than "
            f"{model.name} reads ({model.n_positions}); shorten it"
        )
    return start, told


@dataclass(frozen=True)
class Judged(Sample):
    """Rows with what each is: bad (row,) bool."""

    bad: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __getitem__(self, rows: slice) -> Judged:
        return Judged({k: v[rows] for k, v in self.inputs.items()}, self.targets[rows], None, self.bad[rows])

    def to(self, device: torch.device | str) -> Judged:
        inputs = {k: v.to(device) for k, v in self.inputs.items()}
        return Judged(inputs, self.targets.to(device), None, self.bad.to(device))


@dataclass(frozen=True)
class Repairing:
    """The repair loss as an objective. reference: the model as it was, for dpo."""

    plan: RepairPlan
    reference: nn.Module | None = None

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Rows, their continuations as targets; nothing is drawn."""
        ids = torch.from_numpy(np.ascontiguousarray(batch.ids[:, :-1]))
        mask = torch.from_numpy((batch.segments[:, :-1] != -1).astype(np.int64))
        bad = torch.from_numpy(batch.segments[:, 0] % 2 == 1) & (mask.sum(1) > 0)
        return Judged(
            {"input_ids": ids, "attention_mask": mask}, torch.from_numpy(next_tokens(batch, False)), None, bad
        )

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`; logs `good` and `bad`, sums of log p over their targets."""
        assert isinstance(sample, Judged)
        if self.plan.loss == "sft":
            return token_loss(outputs.logits, sample)
        log_p, at = _chosen(outputs.logits, sample.targets)
        good, bad = at & ~sample.bad[:, None], at & sample.bad[:, None]
        logs = {"good": log_p.detach()[good].sum(), "bad": log_p.detach()[bad].sum()}
        if self.plan.loss == "unlikelihood":
            total = -log_p[good].sum() - torch.log1p(-log_p[bad].exp().clamp(max=1 - SURE)).sum()
            return Loss(total, logs)
        assert self.reference is not None
        with torch.no_grad():
            was, _ = _chosen(self.reference(**sample.inputs).logits, sample.targets)
        ratio = ((log_p - was) * at).sum(1)  # (row,): good, bad, good, bad, ...
        margin = self.plan.beta * (ratio[0::2] - ratio[1::2])
        each = -nn.functional.logsigmoid(margin)
        return Loss(each.mean() * sample.count(), logs)  # divided by the count later: a mean over pairs


def _chosen(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log p of each target, (row, pos), and where there is one."""
    at = targets != IGNORED
    found = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return found, at


@torch.no_grad()
def likelihood(model: Model, faults: Sequence[Fault], side: Literal["good", "bad"] = "bad") -> np.ndarray[Any, Any]:
    """Of each example's continuation: mean log probability a token, whether greedy decoding says it; (example, 2)."""
    encoder, found = Encoder(model.tokenizer), []
    for one in faults:
        if not getattr(one, side):
            continue
        start, told = _tokens(model, encoder, one, side)
        ids = torch.tensor([[*start, *told]])
        logits = model.logits(ids)[0, len(start) - 1 : -1].float()
        aim = torch.tensor(told, device=logits.device)
        log_p = logits.log_softmax(-1).gather(-1, aim[:, None])[:, 0]
        found.append([float(log_p.mean()), float((logits.argmax(-1) == aim).all())])
    return np.array(found).reshape(-1, 2)
