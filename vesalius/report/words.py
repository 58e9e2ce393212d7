"""Numbers and estimates as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A number with its 95 % interval, either of which may be unknown."""

    mean: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        return f"{number(self.mean)} {self.interval}".strip()

    @property
    def interval(self) -> str:
        """The interval in brackets, or nothing."""
        return "" if self.low is None or self.high is None else f"[{number(self.low)}, {number(self.high)}]"


def estimate(value: Any) -> Estimate:
    """Reads a number, {"mean", "low", "high"}, or [mean, low, high]; anything else is unknown."""

    def real(x: Any) -> float | None:
        return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None

    if isinstance(value, Mapping):
        return Estimate(real(value.get("mean", value.get("value"))), real(value.get("low")), real(value.get("high")))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Estimate(*[real(v) for v in [*value, None, None, None][:3]])
    return Estimate(real(value))


def number(value: float | int | None, digits: int = 3, pad: bool = False) -> str:
    """Three significant digits, a true minus sign, no exponent unless it is needed; `pad` keeps trailing zeros.

    Examples:
        >>> number(0.98333), number(-12.345), number(1536), number(0.0000123), number(None), number(0.9, pad=True)
        ('0.983', '−12.3', '1536', '1.23e−05', '–', '0.900')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or float(value).is_integer() and abs(value) < 1e6:
        text = str(int(value))
    else:
        text = f"{value:#.{digits}g}".rstrip(".") if pad else f"{value:.{digits}g}"
        if "e" in text and abs(value) >= 1e-4 and abs(value) < 1e6:
            text = f"{value:.0f}"
    return text.replace("-", "−")


def amount(value: float) -> str:
    """Counts in full, anything else to three digits."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else number(value)


def share(value: float | None) -> str:
    """A faithfulness or a correlation: three decimals, since nothing below them means anything.

    Examples:
        >>> share(0.98333), share(-4.4e-07), share(-0.02), share(None)
        ('0.983', '0', '−0.020', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return "0" if abs(value) < 5e-4 else f"{value:.3f}".replace("-", "−")


def metric_name(name: str) -> str:
    """A metric as it is called in a sentence.

    Examples:
        >>> metric_name("logit-diff"), metric_name("log-prob")
        ('logit difference', 'log-probability')
    """
    known = {"logit-diff": "logit difference", "prob-diff": "probability difference", "log-prob": "log-probability"}
    return known.get(name, name)


def percent(value: float | None) -> str:
    """A share as a percentage.

    Examples:
        >>> percent(0.983), percent(1.0), percent(0.004)
        ('98 %', '100 %', '0.4 %')
    """
    if value is None or not math.isfinite(value):
        return "–"
    share = 100 * value
    return f"{share:.1f} %" if 0 < share < 10 and not float(share).is_integer() else f"{share:.0f} %"


def count(n: int | None, noun: str, of: int | None = None) -> str:
    """A count with its noun: `34 of 270 heads`, `1 head`."""
    if n is None:
        return ""
    total = f" of {of}" if of else ""
    plural = "es" if noun.endswith("s") else "s"
    return f"{n}{total} {noun}{'' if (of or n) == 1 else plural}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    words = [w for w in words if w]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def token(text: str) -> str:
    """A token as people read it: space marks of tokenizers resolved, invisible ones shown."""
    shown = text.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace("\n", "⏎").replace("\t", "⇥").strip(" ")
    return shown or "␣"
