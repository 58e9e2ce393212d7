"""Tasks: a stream of examples, drawn with a seed, made into tensors for an opened model.

A task's text is made when a tokenizer is known, since word lists are filtered by it. A *generator* is a plain function
with a decorator; the types and defaults of its parameters are the task's parameters:

    @generator()
    def ioi(words: Words, rng: random.Random, order: Literal["both", "abba", "baba"] = "both") -> Iterator[Example]:
        while True:
            yield Example(...)

The task takes the first n different examples that align under the tokenizer, and counts what it passed over.
"""

from __future__ import annotations

import functools
import hashlib
import html
import inspect
import json
import random
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vesalius.errors import TaskError, UnknownName
from vesalius.model.pairs import Pairs
from vesalius.tasks.encode import Encoder, Example, OpenModel, Scoring, encode, glued, problem
from vesalius.tasks.metrics import METRICS
from vesalius.tasks.words import Words

OnMisaligned = Literal["error", "skip"]
Stream = Callable[..., Iterator[Example]]
MOST = 1_000_000  # prompts drawn: a gigabyte of text


@dataclass(frozen=True)
class Parameter:
    """One parameter of a generator: what it is called, what it may be, and what it is if left out."""

    name: str
    default: Any
    kind: type
    choices: tuple[Any, ...] = ()

    def check(self, value: Any, task: str) -> Any:
        """The value in this parameter's type (text from a command line is converted), or a TaskError."""
        wanted = "one of " + ", ".join(map(repr, self.choices)) if self.choices else f"of type {self.kind.__name__}"
        wrong = TaskError(f"task '{task}': {self.name} must be {wanted}, not {value!r}")
        if isinstance(value, str) and self.kind is not str:
            try:
                value = json.loads(value.lower() if self.kind is bool else value)
            except ValueError:
                raise wrong from None
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            raise wrong
        return value


@dataclass(frozen=True)
class Generator:
    """A registered stream of examples: the function, the metric it is meant for, and its parameters."""

    stream: Stream
    metric: str = "logit-diff"

    @functools.cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Parameters by name, read from the function's signature."""
        hints = typing.get_type_hints(self.stream)
        found = {}
        for p in list(inspect.signature(self.stream).parameters.values())[2:]:
            hint = hints.get(p.name, type(p.default))
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            found[p.name] = Parameter(p.name, p.default, type(choices[0]) if choices else hint, tuple(choices))
        return found

    def bind(self, params: Mapping[str, Any], task: str) -> dict[str, Any]:
        """All parameters with defaults filled in; a TaskError names an unknown or ill-typed one."""
        known = self.parameters
        for name in params:
            if name not in known:
                raise TaskError(f"task '{task}': {UnknownName('parameter', name, known)}")
        return {n: p.check(params[n], task) if n in params else p.default for n, p in known.items()}

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the code and the word lists that the examples come from."""
        try:
            source = inspect.getsource(inspect.getmodule(self.stream) or self.stream)
        except (OSError, TypeError):
            source = f"{self.stream.__module__}:{self.stream.__qualname__}"
        data = sorted((Path(__file__).parent / "data").glob("*.txt"))
        return hashlib.sha256(source.encode() + b"".join(p.read_bytes() for p in data)).hexdigest()[:16]


def generator(metric: str = "logit-diff") -> Callable[[Stream], Generator]:
    """Makes a function `(words, rng, **parameters) -> Iterator[Example]` a task's generator.

    Args:
        metric: the metric the task is measured by unless the user names another.
    """
    return lambda stream: Generator(stream, metric)


@dataclass(frozen=True)
class UserRows:
    """Examples read from a user's file, and where each came from (`prompts.jsonl line 3`)."""

    path: str
    examples: tuple[Example, ...]
    where: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.examples).encode()).hexdigest()[:16]


class Split(NamedTuple):
    """A task in two halves that share no clean prompt."""

    find: Task
    held_out: Task


class _Built(NamedTuple):
    tokenizer: Any
    encoder: Encoder
    examples: list[Example]
    where: list[str]
    skipped: dict[str, int]
    first_skip: str
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Task:
    """Examples with counterfactuals and a metric. Made by `vesalius.task`; the text is drawn when first needed.

    Attributes:
        name: registered name, or the path of a user's file.
        n: how many examples; None for all rows of a user's file.
        seed: of the drawing (and of the split of a user's file).
        params: the generator's parameters, defaults filled in.
        source: the generator, or a user's rows.
        metric: name of the metric.
        scoring: "single" refuses answers of several tokens, "sequence" scores whole continuations, "auto" does the
            latter when any answer has several tokens.
        on_misaligned: what to do with an example that does not align under the tokenizer; what is skipped is counted.
        split: "find", "held-out", "held-out-2" ...
        parent: the task this one is held out from.

    Example:
        >>> from vesalius.tasks import task
        >>> ioi = task("ioi", n=64, seed=0)
        >>> ioi.held_out().split
        'held-out'
    """

    name: str
    n: int | None
    seed: int
    params: Mapping[str, Any]
    source: Generator | UserRows = field(repr=False)
    metric: str = "logit-diff"
    scoring: Scoring = "auto"
    on_misaligned: OnMisaligned = "skip"
    split: str = "find"
    parent: Task | None = field(default=None, repr=False)
    summary: str = ""
    paper: str = ""
    _cache: list[_Built] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        METRICS.entry(self.metric)
        for name, value, known in (
            ("scoring", self.scoring, typing.get_args(Scoring)),
            ("on_misaligned", self.on_misaligned, typing.get_args(OnMisaligned)),
        ):
            if value not in known:
                raise UnknownName(name, str(value), known)
        if self.n is not None and (type(self.n) is not int or self.n < 1):
            raise TaskError(f"task '{self.name}': n must be a whole number of at least 1, not {self.n!r}")
        if self.n is not None and self.n > MOST and isinstance(self.source, Generator):
            raise TaskError(f"task '{self.name}': {self.n:,} prompts are more than can be kept; give at most {MOST:,}")
        if self.n is None and isinstance(self.source, Generator):
            raise TaskError(f"task '{self.name}' draws its examples: say how many with n=...")
        rows = len(self.source.examples) if isinstance(self.source, UserRows) else None
        if rows is not None and self.n is not None and self.n > rows:
            raise TaskError(f"{self.name} has {rows} rows, but n={self.n} were asked for; lower n or leave it out")

    # -- drawing -------------------------------------------------------------------------------------------------

    def examples(self, tokenizer: Any) -> list[Example]:
        """The n examples under this tokenizer, all different; the same ones every time.

        Raises:
            TaskError: fewer exist, too few words are single tokens, or (user's file) one does not align.
        """
        return list(self._build(tokenizer).examples)

    def pairs(self, model: OpenModel, require_single: bool = False) -> Pairs:
        """The examples as tensors for this model, on the CPU; see `tasks.encode` for how rows look.

        Args:
            model: an opened model.
            require_single: refuse answers of several tokens, for methods that read one logit.
        """
        if model.tokenizer is None:
            raise TaskError("this model was opened without a tokenizer, and a task is text; open it with one")
        built = self._build(model.tokenizer)
        scoring: Scoring = "single" if require_single else self.scoring
        return encode(built.encoder, built.examples, model, self.metric, scoring, built.where)

    def _build(self, tokenizer: Any) -> _Built:
        if not self._cache or self._cache[0].tokenizer is not tokenizer:
            self._cache[:] = [self._draw(tokenizer)]  # the last tokenizer's examples are kept
        return self._cache[0]

    def _taken(self, tokenizer: Any) -> set[str]:
        """Clean prompts of the tasks this one is held out from."""
        if self.parent is None:
            return set()
        return self.parent._taken(tokenizer) | {e.clean for e in self.parent._build(tokenizer).examples}

    def _stream(self, words: Words) -> Iterator[tuple[int, str, Example]]:
        """(sort key, where, example) in the order of drawing."""
        if isinstance(self.source, UserRows):
            order = list(range(len(self.source.examples)))
            random.Random(f"rows/{self.seed}").shuffle(order)
            for i in order:
                yield i, self.source.where[i], self.source.examples[i]
        else:
            rng = random.Random(f"{self.name}/{self.seed}/{self.split}")
            for i, example in enumerate(self.source.stream(words, rng, **self.params)):
                yield i, f"task '{self.name}', draw {i}", example

    def _draw(self, tokenizer: Any) -> _Built:
        taken = self._taken(tokenizer)
        encoder = Encoder(tokenizer)
        words = Words(encoder)
        user = isinstance(self.source, UserRows)
        found: list[tuple[int, str, Example]] = []
        seen: set[Any] = set()
        skipped = {"misaligned": 0, "duplicate": 0, "in the other split": 0}
        first_skip, dry = "", 0
        for key, where, e in self._stream(words):
            patience = 1000 + 20 * min(self.n or 0, max(1000, len(found)))
            if len(found) == self.n or (dry > patience and not user):  # so long in vain: an endless stream is empty
                break
            # Drawn tasks keep one example of each clean prompt; a user may ask several things of one.
            same = (e.clean, e.corrupted, e.answer, e.wrong) if user else e.clean
            dry += 1
            if e.clean in taken:
                skipped["in the other split"] += 1
            elif same in seen:
                skipped["duplicate"] += 1
            elif (why := problem(encoder, e, where)) is not None:
                if self.on_misaligned == "error":
                    raise TaskError(why)
                skipped["misaligned"] += 1
                first_skip = first_skip or why
            else:
                seen.add(same)
                found.append((key, where, e))
                dry = 0
        self._check_enough(len(found), skipped, first_skip)
        if user:
            found.sort(key=lambda f: f[0])
        notes = [*words.notes, *dict.fromkeys(n for _, _, e in found if (n := glued(e)))] if user else words.notes
        return _Built(
            tokenizer, encoder, [e for _, _, e in found], [w for _, w, _ in found], skipped, first_skip, notes
        )

    def _check_enough(self, have: int, skipped: Mapping[str, int], first_skip: str) -> None:
        if have and (self.n is None or have >= self.n):
            return
        text = f"task '{self.name}' ({self.split}): {have} different examples exist for this tokenizer"
        if self.n is not None:
            text += f" and n={self.n} were asked for"
        if skipped["in the other split"]:
            assert self.parent is not None
            text += f"; {len(self.parent._cache[0].examples)} more are in the split '{self.parent.split}'"
        if skipped["misaligned"]:
            text += f"; {skipped['misaligned']} draws do not align, the first because {first_skip}"
        raise TaskError(text + ("; lower n" if have else "") + (f" (at most {have})" if have else ""))

    # -- splits --------------------------------------------------------------------------------------------------

    def held_out(self, n: int | None = None) -> Task:
        """A task whose examples share no clean prompt with this one's: same generator, another stream of draws.

        Args:
            n: how many; None for as many as here, or for the rest of a user's rows.

        Raises:
            TaskError: a user's file of which this task holds every row (use `halves`, or give n).
        """
        if isinstance(self.source, UserRows):
            used = self._rows_used()
            left = len(self.source.examples) - used
            if left < (n or 1):
                remedy = f"build the task with n={max(1, used // 2)}, or use task.halves()" if left == 0 else "lower n"
                raise TaskError(
                    f"{self.name}: {used} of {used + left} rows are in use, {left} left to hold out; {remedy}"
                )
        else:
            n = n or self.n
        number = 1 + (0 if self.split == "find" else int(self.split.removeprefix("held-out-").replace("held-out", "1")))
        return replace(self, n=n, split="held-out" + (f"-{number}" if number > 1 else ""), parent=self)

    def _rows_used(self) -> int:
        """Rows of a user's file in this task and those it is held out from."""
        assert isinstance(self.source, UserRows)
        before = self.parent._rows_used() if self.parent else 0
        return len(self.source.examples) if self.n is None else before + self.n

    def halves(self) -> Split:
        """Examples to find with, and as many others to prove with.

        A drawn task gives itself and `held_out()`; so does a user's file of which this task holds only some rows. When
        it holds all rows, they are split in two by the seed.
        """
        if isinstance(self.source, UserRows) and self.n is None:
            rows = len(self.source.examples)
            if rows < 2:
                raise TaskError(f"{self.name} has one row, and proving needs others than finding; add rows")
            first = replace(self, n=(rows + 1) // 2)
            return Split(first, first.held_out())
        return Split(self, self.held_out())

    # -- identity and display ------------------------------------------------------------------------------------

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the request, the generator's code and the word lists (or the user's rows): 16 hex digits."""
        request = [self.n, self.seed, dict(self.params), self.metric, self.scoring, self.on_misaligned, self.split]
        name = "file" if isinstance(self.source, UserRows) else self.name  # a file is its rows, wherever it lies
        before = self.parent.fingerprint if self.parent else ""
        text = json.dumps([name, request, self.source.digest, before], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self, model: OpenModel | None = None) -> dict[str, Any]:
        """What this task is, and once its text is drawn (or a model is given) what was passed over and noted."""
        if model is not None:
            self._build(model.tokenizer)
        found: dict[str, Any] = {
            "task": self.name,
            "summary": self.summary,
            "paper": self.paper,
            "n": self.n if self.n is not None else "all rows",
            "seed": self.seed,
            "split": self.split,
            "metric": self.metric,
            "scoring": self.scoring,
            "params": dict(self.params),
            "fingerprint": self.fingerprint,
        }
        for built in self._cache:
            found["examples"] = len(built.examples)
            found["skipped"] = {k: v for k, v in built.skipped.items() if v}
            if built.first_skip:
                found["first_skipped"] = built.first_skip
            found["notes"] = list(built.notes)
        return found

    @property
    def skipped(self) -> Mapping[str, int]:
        """Draws passed over, by reason; empty before the text is drawn."""
        return types.MappingProxyType(dict(self._cache[0].skipped) if self._cache else {})

    def __repr__(self) -> str:
        params = "".join(f", {k}={v!r}" for k, v in self.params.items())
        return f"Task({self.name}: n={self.n}, seed={self.seed}, {self.split}, {self.metric}{params})"

    def _repr_html_(self) -> str:
        name, summary = html.escape(self.name), html.escape(self.summary)
        head = f"<p><b>{name}</b> ({self.split}, {self.metric}): {summary}</p>"
        if not self._cache:
            return head + f"<p>n = {self.n}, seed = {self.seed}; drawn when a model is given</p>"
        return head + _table(self._cache[0].examples[:5])


def _table(examples: Sequence[Example]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag} style='text-align:left'>{v}</{tag}>" for v in values) + "</tr>"

    def short(texts: Sequence[str]) -> str:
        return html.escape(", ".join(map(repr, texts[:3])) + (" ..." if len(texts) > 3 else ""))

    def prompt(text: str) -> str:
        return html.escape(text).replace("\n", "<br>")

    rows = [cells("td", [prompt(e.clean), prompt(e.corrupted), short(e.answer), short(e.wrong)]) for e in examples]
    return "<table>" + cells("th", ["clean", "corrupted", "answer", "wrong"]) + "".join(rows) + "</table>"
