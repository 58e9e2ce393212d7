"""The one door to every head detector: a score for each head, with what chance gives beside it.

A detector is a function `(model, context, *, parameters...) -> Scores` over all heads of a model. Its Scores carry four
more columns: `null` (what chance gives), `null_high` (its 95 % point), `p` and `q` (p corrected over heads; see
`significance`). Detectors that read the same prompts share one forward pass, which the context remembers.

Primitive detectors after Elhage et al. 2021 (transformer-circuits.pub/2021/framework) and Olsson et al. 2022
(arXiv 2209.11895); the papers of the others stand in the registry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from vesalius.errors import TaskError, UnknownName, VesaliusError
from vesalius.find.base import Context, PairsSource
from vesalius.find.detectors.looks import require_causal
from vesalius.find.detectors.significance import ALPHA
from vesalius.model import Model
from vesalius.model.sweep import Progress
from vesalius.parts import Part, parse_part
from vesalius.registry import Registry
from vesalius.scores import Array, Scores

T = TypeVar("T")
Detector = Callable[..., Scores]
Make = Callable[[Progress | None], Scores]
Keep = Callable[[str, Make], Scores]
MARGIN = 0.1  # by which a score must exceed its null to give a head its leading role

DETECTORS: Registry[Detector] = Registry("detector")
_OLSSON = "Olsson et al. 2022, arXiv 2209.11895"
_WANG = "Wang et al. 2022, arXiv 2211.00593, sec. 3"
_AKYUREK = "Akyürek et al. 2024, arXiv 2401.12973, sec. 5"
_OWN: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("previous-token", "repeats:previous_token", "attends to the token before", _OLSSON, {"role": True}),
    ("duplicate-token", "repeats:duplicate_token", "attends to an earlier copy of its token", _WANG, {"role": True}),
    ("induction", "repeats:induction", "attends to what followed its token's last copy", _OLSSON, {"role": True}),
    ("1-gram", "ngrams:one_gram", "attends to tokens after an earlier copy of the last token", _AKYUREK, {}),
    ("2-gram", "ngrams:two_gram", "attends to tokens after an earlier copy of the last two", _AKYUREK, {}),
    ("3-gram", "ngrams:three_gram", "attends to tokens after an earlier copy of the last three", _AKYUREK, {}),
    (
        "copying",
        "copying:copying",
        "its value-output circuit raises the token it reads",
        "Elhage et al. 2021, transformer-circuits.pub/2021/framework",
        {},
    ),
    (
        "successor",
        "successor:successor",
        "its value-output circuit names the next day, month, number or letter",
        "Gould et al. 2023, arXiv 2312.09230",
        {"role": True},
    ),
    (
        "arithmetic",
        "arithmetic:arithmetic",
        "attends from the end of a sum to its operands and sign",
        "Zhang et al. 2024, arXiv 2409.01659",
        {"role": True},
    ),
    (
        "retrieval",
        "retrieval:retrieval",
        "attends, word by word, to what is being copied from far back",
        "Wu et al. 2024, arXiv 2404.15574",
        {"role": True, "slow": True},
    ),
    ("mover", "movers:mover", "attends to the right answer and raises it", _WANG, {"role": True, "task": True}),
    (
        "negative-mover",
        "movers:negative_mover",
        "attends to the right answer and lowers it",
        _WANG,
        {"role": True, "task": True},
    ),
    (
        "inhibition",
        "movers:inhibition",
        "attends to the wrong answer; without it movers look there more",
        _WANG,
        {"role": True, "task": True},
    ),
)
for _place, (_name, _target, _summary, _paper, _info) in enumerate(_OWN):
    DETECTORS.add(_name, f"vesalius.find.detectors.{_target}", _summary, _paper, place=_place, **_info)


SIZES = ("rows", "length", "needles", "tokens", "top")  # parameters that say how much is looked at


@dataclass(frozen=True)
class HeadContext(Context):
    """What every detector is given beside its parameters.

    Attributes:
        task: what heads have roles in (mover, negative-mover, inhibition), or None.
        passes: forward passes already made, by what they were made on; detectors share them through `once`.
    """

    task: PairsSource | None = None
    passes: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returns, made when first asked for."""
        if key not in self.passes:
            self.passes[key] = make()
        found: T = self.passes[key]
        return found


@dataclass(frozen=True)
class Heads:
    """What every head is by each detector.

    Attributes:
        scores: by detector; all of the same heads, in model order.
        skipped: detectors that could not be asked, and why.
        info: model, fingerprint, task, seed.
    """

    scores: Mapping[str, Scores]
    skipped: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, detector: str) -> Scores:
        if detector not in self.scores:
            raise UnknownName("detector measured here", detector, self.scores)
        return self.scores[detector]

    def heads(self, detector: str, alpha: float = ALPHA, margin: float = 0.0) -> list[Part]:
        """The heads a detector finds: q below `alpha`, score above the null by `margin`; the largest score first."""
        scores = self[detector]
        found = _passes(scores, alpha, margin)
        order = np.argsort(-np.asarray(scores.values, dtype=float), kind="stable")
        return [parse_part(str(scores.parts[i])) for i in order if found[i]]

    def leading(self, alpha: float = ALPHA, margin: float = MARGIN) -> pd.DataFrame:
        """Each head's leading role: the detector whose score exceeds its null most, of those that find the head.

        Only detectors of roles count: n-grams are induction on other prompts, and copying is a property that heads of
        many roles share.

        Returns:
            part, layer, index, role ("" for none), score, excess (score above the null).
        """
        names = [n for n in self.scores if DETECTORS.entry(n).info.get("role")]
        parts = self.parts
        excess = np.full((len(names), len(parts)), -np.inf)
        for i, name in enumerate(names):
            scores = self.scores[name]
            found = _passes(scores, alpha, margin)
            excess[i, found] = (scores.values - scores.columns["null"])[found]
        best = excess.argmax(0) if names else np.zeros(len(parts), dtype=int)
        there = np.isfinite(excess.max(0)) if names else np.zeros(len(parts), dtype=bool)
        return pd.DataFrame(
            {
                "part": [str(p) for p in parts],
                "layer": [p.layer for p in parts],
                "index": [p.index for p in parts],
                "role": [names[b] if on else "" for b, on in zip(best, there, strict=True)],
                "score": [
                    float(self.scores[names[b]].values[i]) if on else np.nan
                    for i, (b, on) in enumerate(zip(best, there, strict=True))
                ],
                "excess": [float(excess[b, i]) if there[i] else np.nan for i, b in enumerate(best)],
            }
        )

    @property
    def parts(self) -> list[Part]:
        """The heads, in model order."""
        first: Scores | None = next(iter(self.scores.values()), None)
        return [] if first is None else list(first.parts)  # type: ignore[arg-type]

    def to_frame(self) -> pd.DataFrame:
        """A row for each head and detector.

        Returns:
            detector, part, layer, index, score, low, high, null, null_high, p, q, and found: whether q is below 0.05
            and the score exceeds its null by 0.1.
        """
        columns = ["detector", "part", "layer", "index", "score", "low", "high", "null", "null_high", "p", "q", "found"]
        frames = [
            s.to_frame().assign(detector=name, found=_passes(s, ALPHA, MARGIN)) for name, s in self.scores.items()
        ]
        return pd.concat([f[columns] for f in frames], ignore_index=True) if frames else pd.DataFrame(columns=columns)

    def of(self, head: str | Part) -> pd.DataFrame:
        """Everything measured of one head, a row for each detector, with its place among all heads (1 the first)."""
        return of_head(self.to_frame(), head)

    def __repr__(self) -> str:
        said = ", ".join(f"{len(self.heads(n, margin=MARGIN))} {n}" for n in self.scores)
        return f"Heads({self.info.get('model', '?')}, {len(self.parts)} heads: {said})"


def of_head(table: pd.DataFrame, head: str | Part) -> pd.DataFrame:
    """One head's rows of `Heads.to_frame`, with `place`: by how many heads its score is exceeded, and one.

    A head of which nothing is seen (a score of 0 or less) has no place.
    """
    place = table.groupby("detector")["score"].rank(ascending=False, method="min").where(table["score"] > 0)
    found = table.assign(place=place)[table["part"] == str(parse_part(str(head)))].reset_index(drop=True)
    return found.astype({"place": "Int64"})


def _passes(scores: Scores, alpha: float, margin: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    above = np.asarray(scores.values, dtype=float) - scores.columns["null"]
    return (scores.columns["q"] < alpha) & (above > 0) & (above >= margin)


def detector_parameters(name: str) -> dict[str, inspect.Parameter]:
    """A detector's own parameters with their defaults, by name."""
    signature = inspect.signature(DETECTORS.get(name))
    return {n: p for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}


def chosen(detectors: str | Sequence[str], task: PairsSource | None = None) -> list[str]:
    """Names from `all` or a list (`induction,successor`); `all` leaves out those of a task where there is none.

    Raises:
        UnknownName: for a name that is no detector.
    """
    names = [n.strip() for n in detectors.split(",")] if isinstance(detectors, str) else list(detectors)
    if names == ["all"]:
        order = sorted(DETECTORS, key=lambda e: (e.info.get("place", len(_OWN)), e.name))
        return [e.name for e in order if task is not None or not e.info.get("task")]
    for name in names:
        DETECTORS.entry(name)
    return list(dict.fromkeys(names))


def detect(
    model: Model,
    detectors: str | Sequence[str] = "all",
    *,
    task: PairsSource | None = None,
    seed: int = 0,
    memory_gb: float = Context.memory_gb,
    keep: Keep = lambda name, make: make(None),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Heads:
    """Asks every detector about every head.

    Args:
        model: from `vesalius.open`; a causal language model with attention heads.
        detectors: `all`, or names (`induction,successor`). With `all`, a detector that cannot be asked (no single-token
            months in this vocabulary, a context too short for a needle) is left out and told in `skipped`; a named one
            is refused.
        task: what movers and inhibition heads are looked for in.
        seed: of everything drawn. memory_gb: working memory, GiB.
        keep: given a detector's name and a function that measures it (given what to tell its progress to), returns its
            Scores; a run stores them there, and does not measure what it has.
        options: parameters by detector, such as {"retrieval": {"needles": 16}}.

    Raises:
        UnknownName: for an unknown detector or parameter. VesaliusError: for models that are not causal or have no
            attention heads.

    Example:
        >>> heads = detect(model, "induction,previous-token")   # doctest: +SKIP
        >>> heads["induction"].top(3)                             # doctest: +SKIP
        >>> heads.heads("induction", margin=0.3)                  # doctest: +SKIP
    """
    if not isinstance(model, Model):
        raise VesaliusError(f"a model is opened first: vesalius.open(...), not {str(model)[:60]!r}")
    require_causal(model, "head detectors")
    names = chosen(detectors, task)
    given = dict(options or {})
    for name, values in given.items():
        known = detector_parameters(name)
        for key in values:
            if key not in known:
                raise UnknownName(f"parameter of {name}", key, known)
            if key in SIZES and not values[key] > 0:
                raise VesaliusError(f"{name}.{key} is {values[key]}; give a number above 0")
    everything = detectors in ("all", ["all"])
    context = HeadContext(seed=seed, memory_gb=memory_gb, task=task)
    scores, skipped = {}, {}
    for name in names:
        try:

            def make(progress: Progress | None, name: str = name) -> Scores:
                return ask(name, model, replace(context, progress=progress), **given.get(name, {}))

            scores[name] = keep(name, make)
        except (TaskError, NotHere) as error:
            if not everything:
                raise
            skipped[name] = str(error)
    info = {"model": model.name, "fingerprint": model.fingerprint, "seed": seed}
    info["task"] = getattr(task, "name", "pairs") if task is not None else ""
    return Heads(scores, skipped, info)


class NotHere(VesaliusError):
    """A detector that this model or task gives nothing to look at; says what it lacks."""


def ask(name: str, model: Model, context: HeadContext, **options: Any) -> Scores:
    """One detector's Scores; `detect` is the door for users."""
    entry = DETECTORS.entry(name)
    if entry.info.get("task") and context.task is None:
        raise NotHere(f"{name} heads are found in a task; give one (--task ioi)")
    known = detector_parameters(name)
    with model.alone():
        scores = DETECTORS.get(name)(model, context, **options)
    values = {n: options.get(n, p.default) for n, p in known.items()}
    scores.info.update(
        {
            "method": name,
            "model": model.name,
            "fingerprint": model.fingerprint,
            "seed": context.seed,
            "options": {k: v for k, v in values.items() if isinstance(v, (str, int, float, bool, type(None)))},
        }
    )
    scores.info.setdefault("task", getattr(context.task, "name", "pairs") if entry.info.get("task") else "")
    scores.info.setdefault("unit", "attention")
    return scores


def head_scores(heads: Sequence[Part], each: Array, columns: Mapping[str, Array], **info: Any) -> Scores:
    """Scores from per-prompt values (head, prompt), prompts that say nothing (NaN for all heads) left out."""
    there = ~np.isnan(each).any(axis=0)
    kept = np.asarray(each[:, there], dtype=np.float64)
    values = kept.mean(1) if kept.shape[1] else np.full(len(heads), np.nan)
    return Scores(list(heads), values, kept, info={"n": int(there.sum()), **info}, columns=dict(columns))
