"""Recipes: everything that decides a training run, as one YAML file.

A recipe may start from a preset (`preset: induction`) and state what differs. A key nobody knows is refused with the
one that was probably meant; what can be checked without data or model is checked here, before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vesalius.errors import UnknownName, VesaliusError
from vesalius.train.roles import Role


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """What is trained: a preset of `vesalius.build` with changes, a whole architecture, or an existing model.

    `preset` and `architecture` start from random weights (init_seed, or the run's seed); `source` goes on from a model
    that `vesalius.open` opens (a name, a folder, `RUN@step512`).
    """

    preset: str | None = None
    architecture: dict[str, Any] = {}
    source: str | None = None
    stock: bool = True  # a stock transformers class where one fits
    init_seed: int | None = None

    @model_validator(mode="after")
    def _one(self) -> ModelSection:
        if self.source and (self.preset or self.architecture):
            raise ValueError("give either source (an existing model) or preset/architecture (a new one), not both")
        if not (self.source or self.preset or self.architecture):
            raise ValueError("give preset, architecture or source")
        return self


class DataSection(_Section):
    """What is read: real text (`corpus`) or a synthetic task (`synthetic`), cut into rows.

    Attributes:
        corpus: a name of `vesalius corpora`, a file or a folder, or a list of them.
        synthetic: a task of the synthetic suite, with its settings in `settings`.
        tokenizer: `{kind: bpe, vocab_size: 4096}` to train one on the corpus; a folder or model to take its own.
        length: tokens read in one row. rows: rows of one step, over all processes and micro-batches.
        shuffle: rows, documents, none, or stream (one continuous text a row).
        held_out: share of the documents kept for evaluation.
        first_tokens: use no more than so many tokens of the corpus, as often as the steps need.
        seed: of the order alone; the run's seed if None.
    """

    corpus: str | list[str] | None = None
    synthetic: str | None = None
    settings: dict[str, Any] = {}
    tokenizer: str | dict[str, Any] | None = None
    length: int = Field(128, ge=1)
    rows: int = Field(32, ge=1)
    shuffle: Literal["rows", "documents", "none", "stream"] = "rows"
    held_out: float = Field(0.02, ge=0, lt=1)
    first_tokens: int | None = Field(None, ge=1)
    deduplicate: bool = False
    seed: int | None = None

    @model_validator(mode="after")
    def _one(self) -> DataSection:
        if self.corpus is not None and not (self.corpus and all(self.corpus)):
            raise ValueError("corpus is empty; name one (`vesalius corpora`), a file or a folder")
        if (self.corpus is None) == (self.synthetic is None):
            raise ValueError("give corpus (real text) or synthetic (a task of the suite), one of the two")
        if self.synthetic is not None and self.tokenizer is not None:
            raise ValueError("a synthetic task has its own tokens; leave out tokenizer")
        return self


class Named(BaseModel):
    """Something registered, with its settings beside its name: `{name: adan, lr: 0.005}`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.__pydantic_extra__ or {})


class ParameterSection(_Section):
    """Which parameters change: all; those of some roles; those whose names match; or LoRA adapters (peft).

    Attributes:
        roles: only these roles (embedding, head, matrix, vector). only / freeze: name patterns (`*.layers.3.*`), or
            part addresses (`L3`, `L3.MLP`, `L3.attn`; `L3.H2` in only: that head's slices alone).
        lora: settings of peft's LoraConfig, such as `{r: 8, lora_alpha: 16}`. Checkpoints hold ordinary merged weights;
            the adapters themselves lie in the trainer's state.
    """

    roles: list[Role] | None = Field(default=None, min_length=1)
    only: list[str] | None = Field(default=None, min_length=1)
    freeze: list[str] = []
    lora: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> ParameterSection:
        if self.lora is not None and (self.roles or self.only or self.freeze):
            raise ValueError("lora freezes all but its adapters; leave out roles, only and freeze (or target_modules)")
        return self


class CheckpointSection(_Section):
    """When checkpoints are saved: at 0, 1, 2, 4, ..., 512 (`log`), every `every` steps, `at` these, and at the end."""

    log: bool = True
    every: int = Field(default=1000, ge=1)
    at: list[int] = []
    keep_state: Literal["all", "last"] = "all"


class EvaluateSection(_Section):
    """How often held-out loss is measured, and over how many batches of `data.rows` rows."""

    every: int = Field(default=100, ge=1)
    batches: int = Field(default=8, ge=1)


class NormSection(_Section):
    """Norms that are taken out while the model is trained (see `vesalius.train.norms`), each at a step of its own.

    First those before MLPs from the first block to the last, then those before queries and keys, then those before
    values, then the last one; then separators, then first positions lose the constants of their own.

    Attributes:
        remove: `all`, or the parts whose norm goes: `L3.MLP`, `L3.attn`, `unembed`.
        start: step at which the first one goes.
        gap_mlp, gap_qk, gap_v: steps from one block to the next.
        gap_separators, gap_first: steps before these are treated as any token.
        momentum: of the running size, a step.
        penalty: weight of the spread of sizes before the last norm, (size / mean size - 1)^2.
    """

    remove: Literal["all"] | list[str] = "all"
    start: int = Field(20, ge=1)
    gap_mlp: int = Field(2, ge=0)
    gap_qk: int = Field(2, ge=0)
    gap_v: int = Field(3, ge=0)
    gap_separators: int = Field(2, ge=0)
    gap_first: int = Field(10, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    penalty: float = Field(0.0, ge=0)


class BranchSection(_Section):
    """The run and step this one goes on from, with the state of its optimizer."""

    run: str
    step: int = Field(ge=0)
    swap: dict[str, str] = {}  # words exchanged in the data from here on


class Recipe(_Section):
    """Everything that decides a training run.

    Attributes:
        name: what the run is called. about: what it is for.
        objective: `causal-lm`, or `{name: ul2, ...}`. optimizer: `{name: adamw, lr: 1e-3, ...}`.
        schedule: `{name: cosine, warmup: 0.01, final: 0.1}`.
        steps: updates. accumulate: micro-batches an update. clip: largest gradient norm, null for none.
        precision: float32, bfloat16 or float16 (autocast).
        dropout: share dropped everywhere the model can drop; null leaves the model's own.
        norms: which norms are taken out, and when; null for none.
        deterministic: byte-identical reruns; on by default on a CPU.
    """

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    about: str = ""
    model: ModelSection
    data: DataSection
    objective: Named = Named(name="causal-lm")
    optimizer: Named = Named(name="adamw")
    schedule: Named = Named(name="cosine")
    steps: int = Field(ge=1)
    accumulate: int = Field(1, ge=1)
    clip: float | None = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    dropout: float | None = Field(None, ge=0, lt=1)
    parameters: ParameterSection = ParameterSection()
    norms: NormSection | None = None
    checkpoints: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    branch: BranchSection | None = None
    seed: int = Field(1234, ge=0, lt=2**32)
    deterministic: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.branch is not None and self.steps <= self.branch.step:
            raise ValueError(f"steps {self.steps} ends before the branch begins (step {self.branch.step}); raise steps")
        if strange := [s for s in self.checkpoints.at if s < 0]:  # those after the end are left out
            raise ValueError(f"checkpoints.at has step {strange[0]}; steps count from 0")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the section of norms where there is none: a run is named by its whole recipe."""
        found: dict[str, Any] = write(self)
        return {k: v for k, v in found.items() if k != "norms" or v is not None}

    @model_validator(mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """`optimizer: adan` is short for `optimizer: {name: adan}`."""
        if isinstance(value, Mapping):
            short = ("objective", "optimizer", "schedule")
            return {k: {"name": v} if k in short and isinstance(v, str) else v for k, v in value.items()}
        return value

    def yaml(self) -> str:
        """The recipe as a file, without what is as it is by default."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (as in YAML 1.2) and a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"'{key.value}' stands twice, the second time in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """YAML as recipes are written."""
    return yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """The recipes that come with Vesalius, by name, as they are written."""
    found = {}
    for path in sorted(resources.files("vesalius.train").joinpath("recipes").iterdir(), key=lambda p: p.name):
        if path.name.endswith(".yaml"):
            found[path.name.removesuffix(".yaml")] = yaml.safe_load(path.read_text("utf-8"))
    return found


def read_recipe(source: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file, a mapping, or the name of one that comes with Vesalius.

    Args:
        source: path of a file, mapping, or name. A `preset` key in it names the recipe it starts from.
        changes: what differs, by dotted key: `{"optimizer.lr": 0.01, "steps": 200}`.

    Raises:
        VesaliusError: naming the key or value at fault and, where there is one, the key that was meant.

    Example:
        >>> read_recipe("induction", {"steps": 10}).steps
        10
        >>> read_recipe({"preset": "induction", "stpes": 10})
        Traceback (most recent call last):
        vesalius.errors.UnknownName: unknown recipe key 'stpes'; did you mean 'steps'? ...
    """
    where = "the recipe"
    if isinstance(source, Mapping):
        found = dict(source)
    elif str(source) in recipes():
        found = dict(recipes()[str(source)]) | {"name": str(source)}
    else:
        where = str(source)
        found = _read(Path(source))
    if "preset" in found:
        start = found.pop("preset")
        if not isinstance(start, str) or start not in recipes():
            raise UnknownName("recipe preset", str(start), recipes())
        found = merge({"name": start} | recipes()[start], found)
    for section in ("objective", "optimizer", "schedule"):  # a change of one of its settings alone means the default
        if section not in found and any(k.startswith(f"{section}.") for k in changes or {}):
            found[section] = {"name": Recipe.model_fields[section].default.name}
    for key, value in (changes or {}).items():
        found = merge(found, _nested(key.split("."), value))
    try:
        return Recipe.model_validate(found)
    except ValidationError as error:
        raise _refusal(error, where) from None


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        if path.suffix in (".yaml", ".yml") or "/" in str(path):
            raise VesaliusError(f"there is no recipe {path}; `vesalius train --list` shows those that come with it")
        raise UnknownName("recipe", str(path), recipes(), "A file is written with its ending (recipe.yaml).")
    try:
        found = read_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise VesaliusError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise VesaliusError(f"{path} holds no recipe: a mapping with the keys {', '.join(Recipe.model_fields)}")
    return found


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, mapping by mapping; another `name` starts a named section anew."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, str) and key in ("objective", "optimizer", "schedule"):
            old = {"name": old}
        fresh = isinstance(value, Mapping) and isinstance(old, Mapping) and "name" in value
        if fresh and value["name"] != old.get("name"):  # type: ignore[union-attr]
            merged[key] = dict(value)
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: value if len(keys) == 1 else _nested(keys[1:], value)}


def _refusal(error: ValidationError, where: str) -> VesaliusError:
    first = error.errors()[0]
    path = [str(p) for p in first["loc"]]
    if first["type"] == "extra_forbidden":
        model: Any = Recipe
        for name in path[:-1]:
            kind = model.model_fields[name].annotation
            options = [kind, *getattr(kind, "__args__", ())]
            model = next(k for k in options if isinstance(k, type) and issubclass(k, BaseModel))
        inside = f" (in '{'.'.join(path[:-1])}')" if path[:-1] else ""
        return UnknownName("recipe key", path[-1], model.model_fields, f"in {where}{inside}")
    key = ".".join(path)
    if first["type"] == "missing":
        return VesaliusError(f"{where} lacks '{key}'")
    message = str(first["msg"]).removeprefix("Value error, ")
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return VesaliusError(f"{where}: {f'{key}: ' if key else ''}{message[0].lower()}{message[1:]}{shown}")
