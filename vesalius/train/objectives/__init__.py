"""What a model is trained to do, by name: `make_objective("span-corruption", needs, rate=0.15)`."""

from __future__ import annotations

from typing import Any

from vesalius.errors import VesaliusError
from vesalius.train.objectives.base import IGNORED, OBJECTIVES, Loss, Needs, Objective, Sample, generator

_HERE = "vesalius.train.objectives"
_GRID = "Wang et al. 2022, arXiv 2204.05832"

OBJECTIVES.add("causal-lm", f"{_HERE}.causal:CausalLM", "the next token, everywhere", "Radford et al. 2018")
OBJECTIVES.add("full-lm", f"{_HERE}.causal:CausalLM", "FLM of the objective grid: causal-lm by its other name", _GRID)
OBJECTIVES.add("prefix-lm", f"{_HERE}.causal:PrefixLM", "PLM: the rest of a text after a prefix read both ways", _GRID)
OBJECTIVES.add(
    "span-corruption",
    f"{_HERE}.denoising:SpanCorruption",
    "spans replaced by sentinels and foretold (MLM of the objective grid)",
    "Raffel et al. 2020, arXiv 1910.10683",
)
OBJECTIVES.add(
    "ul2",
    f"{_HERE}.denoising:Mixture",
    "a mixture of denoisers, one drawn for each text",
    "Tay et al. 2022, arXiv 2205.05131 and 2210.11399",
)
OBJECTIVES.add(
    "masked-lm",
    f"{_HERE}.masked:MaskedLM",
    "whole words hidden, read both ways (no next-sentence task)",
    "Devlin et al. 2018, arXiv 1810.04805",
)
OBJECTIVES.add(
    "prompted",
    f"{_HERE}.prompted:Prompted",
    "the answer given the prompt, averaged over tokens or sequences",
    "Muennighoff et al. 2022, arXiv 2211.01786",
)
OBJECTIVES.add(
    "distil",
    f"{_HERE}.distil:Distil",
    "the text, a teacher's distribution and its hidden states",
    "Sanh et al. 2019, arXiv 1910.01108; Hinton et al. 2015, arXiv 1503.02531",
)
OBJECTIVES.add(
    "gedi",
    f"{_HERE}.gedi:Gedi",
    "texts under a class code, told from the same texts under the other code",
    "Krause et al. 2020, arXiv 2009.06367",
)
OBJECTIVES.add(
    "ditto",
    f"{_HERE}.ditto:Ditto",
    "the next token, and repeated sentences that are to be believed less each time",
    "Xu et al. 2022, arXiv 2206.02369",
)


def make_objective(name: str, needs: Needs, *, tokenizer: Any = None, **settings: Any) -> Objective:
    """An objective by name.

    Args:
        name: one of `OBJECTIVES.names()`.
        needs: what is known of model and tokenizer; see `special.needs_for`.
        tokenizer: gives `masked-lm` its table of word starts and `gedi` the ids of its codes, if the settings do not.
        settings: the attributes of the objective's class.

    Raises:
        UnknownName: for an objective or a setting that does not exist, with the nearest that does.
        VesaliusError: for a value out of range, a kind of model it cannot train, or a missing special token.

    Example:
        >>> make_objective("causal-lm", Needs(vocab_size=50), z_loss=1e-4).z_loss
        0.0001
    """
    from vesalius.train.objectives.settings import known

    made = OBJECTIVES.get(name)
    known(name, made, list(settings))
    if name == "masked-lm" and tokenizer is not None and settings.get("whole_words", True) is True:
        from vesalius.train.objectives.special import word_starts

        settings.setdefault("word_start", word_starts(tokenizer))
    if name == "gedi" and tokenizer is not None:
        from vesalius.train.objectives.special import one_token

        codes = settings["codes"] = tuple(settings.get("codes", ("true", "false")))
        settings["topics"] = tuple(settings.get("topics", ()))
        settings.setdefault("ids", tuple(one_token(tokenizer, code) for code in codes))
    if name == "ditto" and tokenizer is not None:
        from vesalius.train.objectives.ditto import sentence_ends

        settings.setdefault("ends", sentence_ends(tokenizer))
    if name == "distil":
        settings = {**settings, "text": _text_of(needs, tokenizer, settings)}
    return made(needs, **settings)


def _text_of(needs: Needs, tokenizer: Any, given: dict[str, Any]) -> Objective:
    """What a distilled model foretells beside its teacher's opinion."""
    from vesalius.train.objectives.distil import BY_KIND
    from vesalius.train.objectives.settings import kinds

    if "teacher" not in given:
        raise VesaliusError("objective 'distil' needs a teacher: the name or folder of a model")
    kinds("distil", needs.kind, tuple(BY_KIND))
    return make_objective(BY_KIND[needs.kind], needs, tokenizer=tokenizer, **dict(given.get("text") or {}))


__all__ = [
    "IGNORED",
    "OBJECTIVES",
    "Loss",
    "Needs",
    "Objective",
    "Sample",
    "generator",
    "make_objective",
]
