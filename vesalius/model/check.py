"""Runs the bench's identities on an opened model and says which of its parts can be trusted.

Nothing is assumed about the model beyond what its family file claims, and it is that claim which is tested: random
prompts (or the user's own), transformers' own modules and plain hooks written here stand on one side, the bench's
recording, patching, replay, gradients and edges on the other. See `identities` for what is compared.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd
import torch

from vesalius.errors import VesaliusError
from vesalius.model.checkbench import Bench, NotApplicable, Worst, draw
from vesalius.model.identities import IDENTITIES, PARTS, USES, Identity
from vesalius.model.model import Model

Status = Literal["ok", "failed", "not applicable"]
Progress = Callable[[int, int], None]
# Largest disagreement accepted, as a share of the size of what is compared. Rounding is 6e-8 in float32, 5e-4 in
# float16, 4e-3 in bfloat16, and grows with depth; the worst seen on sound models is 2e-5, 8e-3 and 2e-1 (the last where
# transformers is compared with itself, padded and not). float64 models still take softmax and norms in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 4e-2, torch.bfloat16: 3e-1}


class Usable(NamedTuple):
    """Whether something can be used on this model, and why not (or, where it can, what was not checked)."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Check:
    """One identity on one model.

    Attributes:
        name: short name. says: what holds if it is ok, in words.
        status: `ok`, `failed` or `not applicable`.
        worst: largest disagreement as a share of the size of what is compared; NaN where nothing was compared.
        tolerance: what is accepted; 0 means bit for bit.
        covers: kinds of part, and uses, that rest on it.
        reason: where it failed and how, or why it does not apply.
    """

    name: str
    says: str
    status: Status
    worst: float
    tolerance: float
    covers: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What holds on one model.

    Attributes:
        model: its description. rows: every check, in order.

    Example:
        >>> report = check(vesalius.open("smollm2-135m"))   # doctest: +SKIP
        >>> report.ok, report.usable()["head"].ok           # doctest: +SKIP
        (True, True)
    """

    model: str
    rows: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(row.status != "failed" for row in self.rows)

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [row.name for row in self.rows if row.status == "failed"]

    def usable(self) -> dict[str, Usable]:
        """For every kind of part and every use (`direct`, `gradient`, `replay`, `padding`): usable, or why not."""
        found = {}
        for kind in (*PARTS, *USES):
            mine = [row for row in self.rows if kind in row.covers]
            bad = [row for row in mine if row.status == "failed"]
            # what is particular to this kind decides whether it exists at all
            own = [row for row in mine if row.covers == (kind,)] or mine
            skipped = [f"{row.name} not checked: {row.reason}" for row in mine if row.status == "not applicable"]
            if bad:
                found[kind] = Usable(False, "; ".join(f"{row.name} failed ({row.reason})" for row in bad))
            elif all(row.status == "not applicable" for row in own):
                found[kind] = Usable(False, own[0].reason if own else "nothing checks it")
            else:
                found[kind] = Usable(True, "; ".join(skipped))
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row a check: check, status, worst, tolerance, says, reason, covers."""
        return pd.DataFrame(
            {
                "check": [row.name for row in self.rows],
                "status": [row.status for row in self.rows],
                "worst": [row.worst for row in self.rows],
                "tolerance": [row.tolerance for row in self.rows],
                "says": [row.says for row in self.rows],
                "reason": [row.reason for row in self.rows],
                "covers": [", ".join(row.covers) for row in self.rows],
            }
        )

    def _verdict(self) -> str:
        usable = self.usable()
        good = [kind for kind, one in usable.items() if one.ok]
        count = sum(row.status == "ok" for row in self.rows)
        head = f"{self.model}: {count} of {len(self.rows)} checks ok"
        if self.failed:
            head += f", {len(self.failed)} FAILED ({', '.join(self.failed)})"
        return f"{head}; usable: {', '.join(good) or 'nothing'}"

    def __repr__(self) -> str:
        lines = [self._verdict()]
        for row in self.rows:
            gap = "" if row.worst != row.worst else f"{row.worst:.1e} of {row.tolerance:.0e}"
            if row.tolerance == 0 and row.worst == 0:
                gap = "bit for bit"
            lines.append(f"  {row.status:<15}{row.name:<19}{gap:<20}{row.says}")
            lines += [f"  {'':<15}{row.reason}"] if row.reason else []
        lines += [f"  cannot use {kind}: {one.reason}" for kind, one in self.usable().items() if not one.ok]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.to_frame().drop(columns="covers").to_html(index=False, float_format="{:.1e}".format)
        return f"<p><b>{html.escape(self._verdict())}</b></p>{table}"


def check(
    model: Model,
    *,
    n: int = 4,
    length: int = 12,
    seed: int = 0,
    texts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Runs the bench's identities on a model.

    Args:
        model: an opened model. n: prompts. length: tokens a prompt.
        seed: for the random prompts, and for which values are moved.
        texts: prompts to use in place of random tokens; cut to their shortest, and to `length`.
        progress: called with (done, total) checks.

    Returns:
        A row for every identity. One that raises is a failed row with the error.

    Raises:
        VesaliusError: if there is too little to run on (fewer than 6 tokens).
    """
    bench = draw(model, n, length, seed, texts)
    rows = []
    for done, identity in enumerate(IDENTITIES):
        rows.append(_one(identity, bench))
        if progress:
            progress(done + 1, len(IDENTITIES))
    return CheckReport(repr(model), tuple(rows))


def _one(identity: Identity, bench: Bench) -> Check:
    worst = Worst()
    accepted = 0.0 if identity.exact else max(TOLERANCE.get(bench.model.dtype, 1e-4), identity.at_least)

    def row(status: Status, reason: str = "") -> Check:
        value = worst.value if worst.seen else float("nan")
        return Check(identity.name, identity.says, status, value, accepted, identity.covers, reason)

    try:
        identity.run(bench, worst)
    except NotApplicable as why:
        return row("not applicable", str(why))
    except Exception as error:  # whatever a wrong anatomy leads to is the finding
        first = (str(error).strip() or repr(error)).splitlines()[0][:200]
        return row("failed", first if isinstance(error, VesaliusError) else f"{type(error).__name__}: {first}")
    if not worst.seen:
        return row("failed", "nothing was compared")
    if worst.broken:
        return row("failed", worst.broken)
    if not worst.value <= accepted:  # also where it is NaN
        amount = "not bit for bit" if identity.exact else f"off by {worst.value:.2g} of its size"
        return row("failed", f"{worst.at}: {amount}" if worst.at else amount)
    return row("ok", worst.note)
