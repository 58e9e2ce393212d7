"""Linear probes: what can be read off a site by a linear map, against what any labels could be made to give.

At each layer (and each head, with site `head`) a ridge-penalised logistic regression, or a ridge regression for
numbers, is fitted on all folds but one and tried on that one; folds never divide a group. Beside its accuracy stand

    majority      always the commonest label
    control       the same probe on labels that were drawn once for each *type* of example (Hewitt & Liang 2019,
                  arXiv 1909.03368); selectivity = accuracy - control
    compression   how many times shorter the labels become when sent with the probe, trained as it goes (online code of
                  Voita & Titov 2020, arXiv 2003.12298); 1 is nothing learnt

Types repeat when the same word is probed in many texts; then control tells what the probe knows by heart. Where every
example is its own type the control is a plain shuffle, and its accuracy is near that of guessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest

from vesalius.errors import UnknownName, VesaliusError
from vesalius.features.vectors import SITES, Pool, Progress, depth, layer_of, stack_of, states
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.scores import Scores

LEAST = 10  # examples of each label: fewer leave folds in which a label is missing
IMBALANCE = 4  # the commonest label may be this many times as frequent as the rarest
NAMED = 8  # labels that a refusal counts
DRAWS = 500  # of the bootstrap over groups of examples, for numbers
STEPS = (0.1, 0.2, 0.4, 0.8, 1.0)  # portions of the online code
_PART_OF_SITE = {"attn_out": "attn", "mlp_out": "mlp"}


@dataclass(frozen=True)
class Probes:
    """What probes read at each place.

    Attributes:
        table: part, layer, accuracy (or r2), low, high (95 %: Wilson's interval counting groups, not examples; for r2 a
            bootstrap over groups), baseline, control, selectivity, compression.
        labels: the label names, () for numbers. n: examples. info: everything the numbers depend on.
    """

    table: pd.DataFrame
    per_example: NDArray[np.float64]  # 1 where the held-out guess was right, (place, example); numbers: -squared error
    labels: tuple[str, ...]
    n: int
    info: dict[str, Any] = field(default_factory=dict)

    def best(self) -> dict[str, Any]:
        """The row with the highest accuracy (or r2)."""
        return self.table.nlargest(1, self.measure).to_dict("records")[0]  # type: ignore[return-value]

    @property
    def measure(self) -> str:
        return "accuracy" if self.labels else "r2"

    def scores(self) -> Scores:
        """Accuracy above the baseline, as the one table for findings; comparable with every other method's."""
        parts = [Part(kind, int(n), None if i < 0 else int(i), stack=stack) for kind, n, i, stack in self.info["parts"]]
        values = self.table[self.measure].to_numpy(float) - self.table["baseline"].to_numpy(float)
        told = {k: v for k, v in self.info.items() if k != "parts"}
        per_example = self.per_example - self.table["baseline"].to_numpy(float)[:, None] if self.labels else None
        return Scores(
            parts, values, per_example, info=told | {"method": "probe", "unit": f"{self.measure} above baseline"}
        )


def probe(
    model: Model,
    texts: Sequence[str],
    labels: Sequence[Any],
    *,
    words: Sequence[str] | None = None,
    groups: Sequence[Any] | None = None,
    types: Sequence[Any] | None = None,
    site: str = "resid_post",
    layers: str | Sequence[int] = "all",
    pool: Pool | None = None,
    folds: int = 5,
    balance: bool = False,
    mdl: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Probes:
    """Probes of one property at every layer of a site.

    Args:
        model: from `vesalius.open`.
        texts: one an example. labels: a label each; numbers (not whole ones) make it a regression.
        words: the word of each text that is read; the last token (or mean, for encoders) if None.
        groups: examples that must not be divided between training and testing (a template, a document); by default
            those that are the same.
        types: what the control's labels are drawn for; the word (without case), or else the text.
        site: one of `SITES`, or `head` for each head's output apart.
        layers: `all`, or numbers of blocks. pool: how tokens become one vector: mean, last, word.
        folds: of the cross-validation. balance: draw as many examples of each label as the rarest has.
        mdl: measure the online code length too.

    Raises:
        VesaliusError: too few examples or groups, labels out of balance: says how many are needed.

    Example:
        >>> found = probe(model, texts, labels, layers=[0, 10, 20])          # doctest: +SKIP
        >>> found.table[["layer", "accuracy", "control"]]                    # doctest: +SKIP
    """
    if site not in (*SITES, "head"):
        raise UnknownName("site", site, (*SITES, "head"))
    texts, words = list(texts), None if words is None else list(words)
    for name, given in (("labels", labels), ("words", words), ("groups", groups), ("types", types)):
        if given is not None and len(given) != len(texts):
            raise VesaliusError(f"{len(texts)} texts but {len(given)} {name}; give one for each text")
    numeric = all(isinstance(v, (float, np.floating)) for v in labels) and len({float(v) for v in labels}) > 10
    rng = np.random.default_rng(seed)
    keep = list(range(len(texts)))
    if not numeric:
        keep = _enough([str(v) for v in labels], balance, folds, rng).tolist()
    elif len(texts) < 5 * LEAST:
        raise VesaliusError(f"{len(texts)} examples with numbers; a regression probe needs {5 * LEAST} or more")
    kinds = types if types is not None else [w.casefold() for w in words] if words is not None else texts
    chosen = _Examples.of(
        [texts[i] for i in keep],
        [labels[i] for i in keep],
        None if words is None else [words[i] for i in keep],
        None if groups is None else [groups[i] for i in keep],
        [kinds[i] for i in keep],
        numeric,
        folds,
        rng,
    )
    pool = pool or ("word" if words is not None else "mean" if not model.anatomy.main.causal else "last")
    wanted = list(range(depth(model))) if layers == "all" else [layer_of(model, int(n)) for n in layers]
    at = "z" if site == "head" else site
    found = states(model, chosen.texts, wanted, pool=pool, site=at, words=chosen.words, progress=progress)
    places: list[tuple[str, int, int, str]] = []
    rows, every = [], []
    for i, layer in enumerate(wanted):
        mine = found[i] if site == "head" else found[i].reshape(len(chosen.texts), 1, -1)  # (example, head, d)
        for head in range(mine.shape[1]):
            kind = "head" if site == "head" else _PART_OF_SITE.get(site, site)
            kind = kind if site == "head" or kind in ("attn", "mlp") or kind.startswith("resid") else "resid_post"
            part = Part(kind, layer, head if site == "head" else None, stack=stack_of(model))  # type: ignore[arg-type]
            told, right = _one(np.asarray(mine[:, head], dtype=float), chosen, mdl, seed)
            rows.append({"part": str(part), "layer": layer, **told})
            every.append(right)
            places.append((kind, layer, head if site == "head" else -1, part.stack))
    info = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "site": site,
        "pool": pool,
        "n": len(chosen.texts),
        "groups": len(set(chosen.groups)),
        "types": len(set(chosen.types)),
        "folds": folds,
        "left_out": len(texts) - len(keep),
        "seed": seed,
        "parts": places,
    }
    return Probes(pd.DataFrame(rows), np.array(every), chosen.names, len(chosen.texts), info)


def _enough(labels: list[str], balance: bool, folds: int, rng: np.random.Generator) -> NDArray[np.int_]:
    """Which examples are used; refuses labels that are too rare."""
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise VesaliusError(
            f"all {len(labels)} examples have the label '{names[0] if len(names) else ''}'; two are needed"
        )
    least = max(LEAST, folds)
    rare = int(counts.argmin())
    if counts[rare] < least:
        listed = [f"{c} of {str(n)!r}" for n, c in zip(names[:NAMED], counts, strict=False)]
        listed += [f"{len(names) - NAMED} labels more"] * (len(names) > NAMED)
        raise VesaliusError(
            f"{counts[rare]} examples of '{names[rare]}'; a probe needs {least} or more of each label (there are "
            f"{', '.join(listed)})"
        )
    if balance:
        drawn = [rng.permutation(np.flatnonzero(np.asarray(labels) == n))[: counts.min()] for n in names]
        return np.sort(np.concatenate(drawn))
    if counts.max() > IMBALANCE * counts.min():
        raise VesaliusError(
            f"labels are out of balance: {counts.max()} of '{names[counts.argmax()]}' and {counts[rare]} of "
            f"'{names[rare]}'; add {-(-counts.max() // IMBALANCE) - counts[rare]} of the latter, or balance "
            f"(--balance) to draw {counts.min()} of each"
        )
    return np.arange(len(labels))


@dataclass(frozen=True)
class _Examples:
    texts: list[str]
    words: list[str] | None
    names: tuple[str, ...]
    target: NDArray[np.float64]  # label number, or the number itself
    control: NDArray[np.float64]
    groups: list[Any]
    types: list[Any]
    fold: NDArray[np.int_]

    @classmethod
    def of(
        cls,
        texts: list[str],
        labels: list[Any],
        words: list[str] | None,
        groups: list[Any] | None,
        types: list[Any],
        numeric: bool,
        folds: int,
        rng: np.random.Generator,
    ) -> _Examples:
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

        names: tuple[str, ...] = () if numeric else tuple(sorted({str(v) for v in labels}))
        target = np.array([float(v) if numeric else names.index(str(v)) for v in labels], dtype=float)
        kinds = list(dict.fromkeys(types))
        # Each type keeps one control label, drawn with the labels' own frequencies.
        drawn = dict(
            zip(kinds, rng.permutation(np.resize(target[rng.permutation(len(target))], len(kinds))), strict=True)
        )
        control = np.array([drawn[t] for t in types])
        state = int(rng.integers(2**31))
        seen: dict[tuple[str, str], int] = {}
        same = [seen.setdefault(example, len(seen)) for example in zip(texts, words or texts, strict=True)]
        if groups is None and len(seen) < len(same):  # what was trained on is not left out
            groups = same
        if groups is None:
            maker = StratifiedKFold(folds, shuffle=True, random_state=state)
        else:
            if len(set(groups)) < folds:
                what = "different examples" if groups is same else "groups"
                raise VesaliusError(f"{len(set(groups))} {what} for {folds} folds; {folds} or more are needed")
            maker = StratifiedGroupKFold(folds, shuffle=True, random_state=state)
        strata = np.digitize(target, np.quantile(target, [0.25, 0.5, 0.75])) if numeric else target.astype(int)
        fold = np.zeros(len(texts), dtype=int)
        for i, (_, test) in enumerate(maker.split(np.zeros((len(texts), 1)), strata, groups)):
            fold[test] = i
        return cls(texts, words, names, target, control, groups or list(range(len(texts))), types, fold)


def _one(x: NDArray[np.float64], it: _Examples, mdl: bool, seed: int) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """One probe: what it reads, and for each example whether the held-out guess was right."""
    guess = _held_out(x, it.target, it.fold, bool(it.names))
    other = _held_out(x, it.control, it.fold, bool(it.names))
    rng = np.random.default_rng(seed)
    n = len(set(it.groups))
    if it.names:
        right = (guess == it.target).astype(float)
        value, control = float(right.mean()), float((other == it.control).mean())
        baseline = float(np.bincount(it.target.astype(int)).max() / len(it.target))
        interval = binomtest(round(value * n), n).proportion_ci(0.95, "wilson")
        low, high = min(value, interval.low), max(value, interval.high)
    else:
        right = -((guess - it.target) ** 2)
        value, control, baseline = _r2(guess, it.target), _r2(other, it.control), 0.0
        draws = [_r2(guess, it.target, w) for w in _resampled(it.groups, rng)]
        low, high = np.quantile(draws, [0.025, 0.975])
    told: dict[str, Any] = {
        "accuracy" if it.names else "r2": value,
        "low": float(low),
        "high": float(high),
        "baseline": baseline,
        "control": control,
        "selectivity": value - control,
    }
    if mdl and it.names:
        told["compression"] = _compression(x, it.target.astype(int), len(it.names), rng)
    return told, right


def _resampled(groups: Sequence[Any], rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each example is drawn when groups are drawn with replacement, (draw, example)."""
    keys = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    times = rng.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=DRAWS)
    return times[:, [keys[g] for g in groups]].astype(float)


def _r2(guess: NDArray[np.float64], truth: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> float:
    w = np.ones(len(truth)) if weights is None else weights
    spread = float(w @ (truth - np.average(truth, weights=w)) ** 2)
    return 1 - float(w @ (guess - truth) ** 2) / spread if spread > 0 else float("nan")


def _held_out(
    x: NDArray[np.float64], target: NDArray[np.float64], fold: NDArray[np.int_], labelled: bool
) -> NDArray[np.float64]:
    """For each example the guess of the probe that did not see its fold."""
    out = np.zeros(len(target))
    for i in np.unique(fold):
        test = fold == i
        out[test] = _fitted(x[~test], target[~test], labelled).predict(x[test])
    return out


def _fitted(x: NDArray[np.float64], target: NDArray[np.float64], labelled: bool) -> Any:
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not labelled:
        return make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11))).fit(x, target)
    if len(np.unique(target)) < 2:
        return DummyClassifier(strategy="most_frequent").fit(x, target)
    # Standardised coordinates: with more of them than examples, a penalty of 1 / C = 10 keeps the fit from memorising.
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, target)


def _compression(x: NDArray[np.float64], target: NDArray[np.int_], labels: int, rng: np.random.Generator) -> float:
    """Uniform code length over online code length (Voita & Titov 2020, eq. 3)."""
    order = rng.permutation(len(target))
    ends = [max(labels, round(s * len(order))) for s in STEPS]
    bits = ends[0] * np.log2(labels)
    for begin, end in zip(ends, ends[1:], strict=False):
        seen, new = order[:begin], order[begin:end]
        made = _fitted(x[seen], target[seen].astype(float), True)
        known = [int(c) for c in made.classes_]
        guess = np.full((len(new), labels), 1e-3)
        guess[:, known] = np.maximum(made.predict_proba(x[new]), 1e-3)
        guess /= guess.sum(axis=1, keepdims=True)
        bits -= float(np.log2(guess[np.arange(len(new)), target[new]]).sum())
    return float(len(order) * np.log2(labels) / bits)
