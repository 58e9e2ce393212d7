"""Tasks: prompts with counterfactuals, made for the opened model's tokenizer, and what is measured of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesalius.registry import Registry
from vesalius.tasks.base import Generator, OnMisaligned, Parameter, Split, Task, generator
from vesalius.tasks.encode import Example, Scoring
from vesalius.tasks.files import is_path, read
from vesalius.tasks.metrics import METRICS, Accuracy, accuracy, make_metric
from vesalius.tasks.words import Words, wordlist

TASKS: Registry[Generator] = Registry("task")
for _name, _target, _summary, _paper in (
    ("ioi", "ioi:ioi", "who receives: the name that is not repeated", "arXiv 2211.00593"),
    (
        "colored-objects",
        "colored_objects:colored_objects",
        "the colour of one of three objects, after one worked example",
        "arXiv 2310.08744",
    ),
    ("greater-than", "greater_than:greater_than", "a span of years ends later than it begins", "arXiv 2305.00586"),
    (
        "docstring",
        "docstring:docstring",
        "the next argument that a Python docstring describes",
        "Heimersheim and Janiak 2023, Alignment Forum",
    ),
    ("induction", "induction:induction", "A B ... A: B follows, among random words", "arXiv 2209.11895"),
    ("successor", "successor:successor", "the next day, month, number word or letter", "arXiv 2312.09230"),
    ("capital", "capital:capital", "the capital of a country", "arXiv 2202.05262"),
    ("facts", "facts:facts", "a country's capital, language or currency, in many wordings", "arXiv 2403.19521"),
    ("arithmetic", "arithmetic:arithmetic", "small sums, after solved ones", "arXiv 2305.15054"),
    ("laundry-list", "laundry_list:laundry_list", "the item missing from a list read again", "arXiv 2406.09519"),
):
    TASKS.add(_name, f"vesalius.tasks.{_target}", _summary, _paper)

DEFAULT_N = 64


def task(
    name: str | Path,
    n: int | None = None,
    seed: int = 0,
    *,
    metric: str | None = None,
    scoring: Scoring = "auto",
    on_misaligned: OnMisaligned | None = None,
    **params: Any,
) -> Task:
    """A task by its registered name, or from a user's file of prompts.

    Args:
        name: one of `TASKS.names()`, or the path of a .jsonl or .csv file.
        n: how many examples; by default 64, or all rows of a file.
        seed: of the drawing; of the split of a file.
        metric: one of `METRICS.names()`; by default the one the task is meant for.
        scoring: "auto", "single" (answers of several tokens are refused) or "sequence" (whole continuations).
        on_misaligned: "error" (default for files) or "skip" (default for drawn tasks; skipped ones are counted).
        **params: the task's own parameters, such as `corruption="swap"` of ioi.

    Returns:
        The task; its text is drawn when a model's tokenizer is known.

    Raises:
        UnknownName: no task, metric, scoring of that name.
        TaskError: an unknown or ill-typed parameter, or a file that cannot be used.

    Example:
        >>> task("ioi", n=16, corruption="swap")
        Task(ioi: n=16, seed=0, find, logit-diff, order='both', corruption='swap')
    """
    text = str(name)
    if text not in TASKS and is_path(text):
        rows = read(name)
        known = Generator(lambda words, rng: iter(()))
        return Task(
            text,
            n,
            seed,
            known.bind(params, text),
            rows,
            metric or "logit-diff",
            scoring,
            on_misaligned or "error",
            summary="prompts of the user",
        )
    entry, made = TASKS.entry(text), TASKS.get(text)
    return Task(
        text,
        DEFAULT_N if n is None else n,
        seed,
        made.bind(params, text),
        made,
        metric or made.metric,
        scoring,
        on_misaligned or "skip",
        summary=entry.summary,
        paper=entry.paper,
    )


__all__ = [
    "METRICS",
    "TASKS",
    "Accuracy",
    "Example",
    "Generator",
    "Parameter",
    "Split",
    "Task",
    "Words",
    "accuracy",
    "generator",
    "make_metric",
    "task",
    "wordlist",
]
