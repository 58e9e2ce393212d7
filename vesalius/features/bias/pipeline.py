"""The audit of a writing assistant's pipeline: what the model knows, what it suggests, what texts come of it.

Three looks, after Wambsganss et al. 2023 (arXiv 2311.03311): associations of the model's vectors (`weat`), gender in
its suggestions for prompts that are neutral and prompts that name one (`suggest`), and pronouns by occupation
(`pronoun_preference`). Texts of people go through `cooccurrence` and `groups`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats

from vesalius.errors import VesaliusError
from vesalius.features.bias.cooccurrence import tokens as words_of
from vesalius.features.bias.groups import LEANS, Comparison, compare, leans
from vesalius.features.bias.words import Gendered, article, suggestions
from vesalius.features.concepts import rows
from vesalius.features.vectors import Progress
from vesalius.model import Model
from vesalius.tasks.encode import Encoder

Floats = NDArray[np.float64]
KINDS = ("neutral", "female", "male")
BOUND = 0.2  # of the lean, from -1 to 1: below, one gendered word in ten changes sides


@dataclass(frozen=True)
class Suggestions:
    """What a model suggested.

    Attributes:
        table: kind, occupation, prompt, suggestion, female, male (gendered words of the suggestion), lean (NaN where it
            has none).
        comparison: of the leans of the three kinds of prompt.
        false_alarms: share of divisions of the neutral prompts in halves that are called different.
        splits: how many divisions.
    """

    table: pd.DataFrame
    comparison: Comparison
    false_alarms: float
    splits: int


def prompts(kind: str, n: int, seed: int = 0) -> list[tuple[str, str]]:
    """(occupation, prompt) of that kind, n of them, each at most once.

    Raises:
        VesaliusError: if there are not so many.
    """
    known = suggestions()
    made = [(o, form.format(o=o, a=article(o))) for form in known[kind] for o in known["occupations"]]
    if not 1 <= n <= len(made):
        raise VesaliusError(f"{n} prompts of kind '{kind}' were asked for; there are {len(made)}")
    order = np.random.default_rng(seed).permutation(len(made))[:n]
    return [made[i] for i in sorted(order)]


def suggest(
    model: Model,
    n: int = 200,
    *,
    tokens: int = 20,
    batch: int = 50,
    splits: int = 200,
    bound: float = BOUND,
    seed: int = 0,
    progress: Progress | None = None,
) -> Suggestions:
    """Lets a model go on with n neutral prompts, n / 2 that name a woman and n / 2 that name a man; compares.

    Suggestions are drawn (temperature 1, no truncation) with the seed; `tokens` long.

    Raises:
        VesaliusError: if the model is not causal, or too few suggestions mention anybody's gender.
    """
    if model.kind != "causal":
        raise VesaliusError(f"{model.name} is {model.kind}; suggestions need a causal language model")
    if n < 20:
        raise VesaliusError(f"{n} prompts are too few to compare; give 20 or more")
    asked = [(k, *p) for k in KINDS for p in prompts(k, n if k == "neutral" else n // 2, seed)]
    texts = [text for _, _, text in asked]
    written: list[str] = []
    for begin in range(0, len(texts), batch):
        written += continuations(model, texts[begin : begin + batch], tokens, seed + begin)
        if progress is not None:
            progress(min(begin + batch, len(texts)), len(texts))
    table = pd.DataFrame(asked, columns=["kind", "occupation", "prompt"])
    table["suggestion"] = written
    counts = np.array([Gendered.default().lean(words_of(text)) for text in written])
    table["female"], table["male"] = counts[:, 0], counts[:, 1]
    table["lean"] = leans(written)
    values = {k: table.loc[table["kind"] == k, "lean"].dropna().to_numpy(float) for k in KINDS}
    found = compare(values, bound=bound, limits=LEANS)
    neutral = table.loc[table["kind"] == "neutral", "lean"].to_numpy(float)
    return Suggestions(table, found, false_alarms(neutral, splits, bound, seed), splits)


def false_alarms(values: Floats, splits: int = 200, bound: float = BOUND, seed: int = 0) -> float:
    """Share of random divisions of one group in halves that the audit would call different."""
    rng = np.random.default_rng(seed)
    values = values[np.isfinite(values)]
    alarms = 0
    for _ in range(splits):
        mixed = rng.permutation(values)
        half = len(mixed) // 2
        pair = compare({"a": mixed[:half], "b": mixed[half:]}, bound=bound).pairs.iloc[0]
        alarms += bool(pair["different"])
    return alarms / splits if splits else float("nan")


def continuations(model: Model, texts: Sequence[str], tokens: int, seed: int, **options: Any) -> list[str]:
    """What the model writes after each text: new tokens alone, drawn with a seed of their own.

    Args:
        options: of transformers' `generate`, over `do_sample=True, top_k=0`.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise VesaliusError(f"{model.name} has no tokenizer; open it with one (tokenizer=)")
    encoded = [list(tokenizer(t)["input_ids"]) for t in texts]
    if not all(encoded):
        raise VesaliusError("an empty prompt has nothing to go on from; write at least a word")
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    length = max(map(len, encoded))
    ids = torch.tensor([[filler] * (length - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "pad_token_id": filler}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        out = model.hf.generate(input_ids=ids, attention_mask=mask, **settings | options)
    found: list[str] = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    return found


# -- pronouns by occupation ------------------------------------------------------------------------------------------


def pronoun_preference(
    model: Model,
    occupations: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    *,
    female: str = " she",
    male: str = " he",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """logit(she) - logit(he) after "The nurse said that" and its like, for each occupation.

    Returns:
        occupation, preference (mean over templates; above 0 for she), low, high (least and largest template), sorted.
    """
    if model.kind != "causal":
        raise VesaliusError(f"{model.name} is {model.kind}; the next pronoun needs a causal language model")
    known = suggestions()
    occupations = known["occupations"] if occupations is None else list(occupations)
    templates = known["pronoun"] if templates is None else list(templates)
    encoder = Encoder(model.tokenizer)
    pair = []
    for word in (female, male):
        ids = encoder.continuation(templates[0].format(o=occupations[0], a=article(occupations[0])), word, "pronouns")
        if len(ids) != 1:
            raise VesaliusError(f"'{word}' is {len(ids)} tokens for this tokenizer; name pronouns of one token")
        pair.append(ids[0])
    if pair[0] == pair[1] or encoder.tokenizer.unk_token_id in pair:
        raise VesaliusError(f"{model.name} does not know '{female}' and '{male}'; name pronouns that it knows")
    texts = [t.format(o=o, a=article(o)) for o in occupations for t in templates]
    found = []
    for begin in range(0, len(texts), 64):
        found += _last_logits(model, texts[begin : begin + 64], pair)
        if progress is not None:
            progress(min(begin + 64, len(texts)), len(texts))
    values = np.array(found).reshape(len(occupations), len(templates), 2)
    lean = values[..., 0] - values[..., 1]  # (occupation, template)
    table = pd.DataFrame(
        {"occupation": occupations, "preference": lean.mean(1), "low": lean.min(1), "high": lean.max(1)}
    )
    return table.sort_values("preference", ascending=False, kind="stable", ignore_index=True)


def _last_logits(model: Model, texts: Sequence[str], ids: Sequence[int]) -> list[list[float]]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    encoded = [list(tokenizer(t)["input_ids"]) for t in texts]
    length = max(map(len, encoded))
    batch = torch.tensor([row + [0] * (length - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in encoded])
    logits = model.logits(batch, mask)
    last = torch.tensor([len(row) - 1 for row in encoded])
    found: list[list[float]] = logits[torch.arange(len(texts)), last][:, list(ids)].float().cpu().tolist()
    return found


def labour_statistics(path: Path | str) -> dict[str, float]:
    """The share of women by occupation from a .csv or .jsonl file with `occupation` and `share_female`.

    Raises:
        VesaliusError: for a file that cannot be used.
    """
    shares: dict[str, float] = {}
    for row in rows(Path(path), ["occupation", "share_female"]):
        try:
            share = float(row["share_female"])
        except (TypeError, ValueError):
            share = float("nan")
        if not np.isfinite(share):
            raise VesaliusError(f"{row['where']}: share_female {row['share_female']!r} is not a number")
        name = str(row["occupation"]).strip().lower()
        if shares.setdefault(name, share) != share:
            raise VesaliusError(f"{row['where']}: '{name}' has another share further up; decide for one")
    return shares


def with_statistics(preference: pd.DataFrame, shares: Mapping[str, float]) -> tuple[pd.DataFrame, dict[str, float]]:
    """The pronoun table beside labour statistics of one's own, from `labour_statistics`.

    Returns:
        the table with a column share_female, and {"spearman", "p", "n"} over the occupations that both have.

    Raises:
        VesaliusError: if both have fewer than five.
    """
    table = preference.assign(share_female=[shares.get(o.lower(), np.nan) for o in preference["occupation"]])
    both = table.dropna(subset=["share_female"])
    if len(both) < 5:
        raise VesaliusError(f"the statistics name {len(both)} of the occupations asked about; 5 or more are needed")
    result = stats.spearmanr(both["preference"], both["share_female"])
    return table, {"spearman": float(result.statistic), "p": float(result.pvalue), "n": len(both)}
