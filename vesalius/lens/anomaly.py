"""Prompts that make a model think unlike it does on normal ones, told by the trajectory of its predictions.

At the last position of each prompt a lens gives, for every layer but the last,

    kl        KL(final || lens)
    entropy   of the lens's distribution
    nll       surprisal, under the lens, of the token that the model ends up preferring

A detector of outliers from scikit-learn (local outlier factor, isolation forest) is fitted to normal prompts and scores
others. Beside it stand the same detector on the logit lens, and what needs no lens: the entropy of the final prediction
and the perplexity of the prompt. Belrose et al. 2023, arXiv 2303.08112, section 5 (prompt injection).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.lens.base import Lens, LogitLens, divergence, encode, entropy, layer_name, layers, residuals
from vesalius.model import Model
from vesalius.registry import Registry

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FEWEST = 40  # normal prompts: half to fit a detector of 20 neighbours, half to judge by
NEIGHBOURS = 20
BATCH = 16
DRAWS = 1000  # of the bootstrap
FEATURES = ("kl", "entropy", "nll")

DETECTORS: Registry[Callable[[int], Any]] = Registry("anomaly detector")


@DETECTORS.register("lof", "local outlier factor, 20 neighbours", "Breunig et al. 2000")
def _lof(seed: int) -> Any:
    return LocalOutlierFactor(n_neighbors=NEIGHBOURS, novelty=True)


@DETECTORS.register("isolation-forest", "isolation forest, 200 trees", "Liu et al. 2008")
def _forest(seed: int) -> Any:
    return IsolationForest(n_estimators=200, random_state=seed)


class Ends(NamedTuple):
    """What some prompts end in.

    Attributes:
        prompts: their texts.
        features: by name of the lens, (prompt, feature) in the order of `feature_names`.
        plain: what needs no lens: `entropy` (of the final prediction, nats), `perplexity` (of the prompt).
    """

    prompts: list[str]
    features: dict[str, Floats]
    plain: pd.DataFrame


@dataclass(frozen=True)
class Anomaly:
    """How far prompts are from normal ones.

    Attributes:
        table: prompt, kind ("normal", held out of the fit, or "test"), score (larger is odder), entropy, perplexity.
        auroc: how well each way tells test from normal prompts, with a 95 % interval: name -> {auroc, low, high}. The
            ways are `trajectory`, `logit` (the same detector on the logit lens's trajectory, where another lens was
            asked for), `entropy` and `perplexity`. The last two are taken in whichever direction tells more, which
            favours them.
        features: (prompt, feature) of the same rows, by the lens asked for.
        fitted: prompts the detector was fitted to.
    """

    table: pd.DataFrame
    auroc: dict[str, dict[str, float]]
    features: Floats
    fitted: int


@torch.no_grad()
def read_ends(
    model: Model,
    lenses: Sequence[Lens],
    prompts: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> Ends:
    """What lenses say of each prompt's last position, and what needs no lens.

    Args:
        model: a causal model. lenses: each of another name. prompts: texts.
        progress: called with (prompts read, of).
    """
    if model.kind != "causal":
        raise VesaliusError(f"{model.name} is {model.kind}; prompts are judged by models that read from left to right")
    ids = [encode(model, p)[0] for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # rows of like length together
    found = {lens.name: np.zeros((len(ids), len(feature_names(model)))) for lens in lenses}
    plain = np.zeros((len(ids), 2))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = max(len(ids[i]) for i in rows)
        batch = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(batch)
        for j, i in enumerate(rows):
            batch[j, : len(ids[i])], mask[j, : len(ids[i])] = ids[i], 1
        read = residuals(model, batch, mask)
        ends = mask.sum(1) - 1
        at = torch.arange(len(rows))
        log_p = read.logits[at, ends].float().log_softmax(-1)
        states = [x[at, ends] for x in read.states[:-1]]
        for lens in lenses:
            found[lens.name][rows] = _columns(model, lens, states, log_p)
        plain[rows, 0] = entropy(log_p).double().cpu().numpy()
        plain[rows, 1] = _perplexity(read.logits, batch, mask).numpy()
        if progress is not None:
            progress(min(start + BATCH, len(order)), len(order))
    return Ends(list(prompts), found, pd.DataFrame(plain, columns=["entropy", "perplexity"]))


def _columns(model: Model, lens: Lens, states: Sequence[Tensor], log_p: Tensor) -> Floats:
    """(prompt, feature) from states (prompt, d_model) of each layer and the final log-probabilities."""
    preferred = log_p.argmax(-1, keepdim=True)
    columns = []
    for layer, hidden in zip(layers(model)[:-1], states, strict=True):
        log_q = lens(model, hidden, layer).float().log_softmax(-1)
        columns += [divergence(log_p, log_q), entropy(log_q), -log_q.gather(-1, preferred)[:, 0]]
    return np.asarray(torch.stack(columns, -1).double().cpu().numpy())


def feature_names(model: Model) -> list[str]:
    """Names of the columns of `Ends.features`."""
    return [f"{layer_name(layer)} {name}" for layer in layers(model)[:-1] for name in FEATURES]


def _perplexity(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Of each row of padded ids, from the second token on; 1 for a row of one token."""
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none"
    ).cpu()  # (row, pos)
    read = mask[:, 1:]
    return ((loss * read).sum(1) / read.sum(1).clamp(min=1)).exp().double()


def detect(
    model: Model,
    lens: Lens,
    normal: Sequence[str],
    test: Sequence[str],
    *,
    detector: str = "lof",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Anomaly:
    """Fits a detector to half of the normal prompts, and scores the other half and the test prompts.

    Args:
        model: a causal model. lens: whose trajectory is looked at.
        normal: prompts known to be as usual. test: prompts under suspicion.
        detector: a name of `DETECTORS`.
        seed: of the halving, and of the detector.
        progress: called with (prompts read, of).

    Raises:
        VesaliusError: if there are fewer than 40 normal prompts, or none to test.
    """
    DETECTORS.entry(detector)
    _enough(len(normal), len(test))
    lenses = [lens] if lens.name == "logit" else [lens, LogitLens()]
    ends = read_ends(model, lenses, [*normal, *test], progress)
    n = len(normal)
    return judge_ends(ends, lens.name, np.arange(n), np.arange(n, n + len(test)), detector=detector, seed=seed)


def judge_ends(ends: Ends, lens: str, normal: Ints, test: Ints, *, detector: str = "lof", seed: int = 0) -> Anomaly:
    """`detect`, from prompts that were read.

    Args:
        ends: from `read_ends`. lens: whose trajectory gives the scores.
        normal, test: which prompts are what, as numbers.
        detector, seed: as for `detect`.
    """
    _enough(len(normal), len(test))
    order = np.random.default_rng(seed).permutation(normal)
    fit = order[: len(order) // 2]
    shown = np.concatenate([np.sort(order[len(order) // 2 :]), test])
    kind = np.repeat(["normal", "test"], [len(shown) - len(test), len(test)])
    odd = (kind == "test").astype(int)
    scores = {
        name: -make_pipeline(StandardScaler(), DETECTORS.get(detector)(seed)).fit(x[fit]).score_samples(x[shown])
        for name, x in ends.features.items()
        if name in (lens, "logit")
    }
    table = pd.DataFrame({"prompt": [ends.prompts[i] for i in shown], "kind": kind, "score": scores[lens]})
    auroc = {"trajectory": area(odd, scores.pop(lens), seed)}
    auroc |= {name: area(odd, x, seed) for name, x in scores.items()}
    for column in ends.plain:
        table[column] = ends.plain[column].to_numpy()[shown]
        auroc[str(column)] = area(odd, table[column].to_numpy(), seed, either=True)
    return Anomaly(table, auroc, ends.features[lens][shown], len(fit))


def _enough(normal: int, test: int) -> None:
    if normal < FEWEST:
        raise VesaliusError(
            f"{normal} normal prompts are too few: {FEWEST} are needed, half to fit the detector, half to judge by"
        )
    if not test:
        raise VesaliusError("there are no prompts to test; give at least one")


def area(labels: NDArray[Any], scores: Floats, seed: int = 0, either: bool = False) -> dict[str, float]:
    """Area under the ROC curve with a bootstrap interval over prompts; `either` direction, the larger, if asked."""
    odd, usual = scores[labels == 1], scores[labels == 0]
    above = np.sign(odd[:, None] - usual) / 2 + 0.5  # (odd, usual): 1 where the odd one scores higher, 1/2 for ties
    if either and above.mean() < 0.5:
        above = 1 - above
    rng = np.random.default_rng(seed)
    weights = [rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n for n in above.shape]  # (draw, prompt)
    low, high = np.quantile(((weights[0] @ above) * weights[1]).sum(1), [0.025, 0.975])
    return {"auroc": float(above.mean()), "low": float(low), "high": float(high)}


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file: lines of text, or of JSON with `text` or `prompt` (`.jsonl`); empty lines are passed over.

    Raises:
        VesaliusError: if it is not there, holds none, or a line is not of that form, saying which.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VesaliusError(
            f"prompts cannot be read from {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    # JSON texts may hold the other separators that splitlines() knows.
    lines = text.split("\n") if path.suffix == ".jsonl" else text.splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_prompt(line, path, number) if path.suffix == ".jsonl" else line)
    if not found:
        raise VesaliusError(f"{path} holds no prompts; write one a line")
    return found


def _prompt(line: str, path: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise VesaliusError(f"{path}, line {number} is not JSON") from None
    text = value.get("text", value.get("prompt")) if isinstance(value, Mapping) else value
    if not isinstance(text, str) or not text.strip():
        raise VesaliusError(f'{path}, line {number} has no text; give {{"text": ...}}')
    return text
