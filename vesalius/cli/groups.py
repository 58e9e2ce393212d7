"""Options that several commands share, as one parameter: a dataclass whose fields are options.

    @dataclass(frozen=True)
    class Place:
        out: OutFolder = None
        fresh: Fresh = False

    @expanded
    def command(model: ModelName = "small", *, place: Place) -> None: ...

has the options of `model`, `out` and `fresh`, and is given a Place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from vesalius.cli import options as o
from vesalius.cli.console import Screen, set_threads


@dataclass(frozen=True)
class RunOptions:
    """Options of a run, and of what is shown of it."""

    seed: o.Seed = 0
    out: o.Out = None
    as_json: o.AsJson = False
    fresh: o.Fresh = False


@dataclass(frozen=True)
class UndrawnRunOptions(RunOptions):
    """The same, of commands that draw nothing."""

    seed: o.NoSeed = 0


@dataclass(frozen=True)
class Threaded:
    """The option of how many threads compute."""

    threads: o.Threads = None

    def screen(self, as_json: bool) -> Screen:
        """Where the command says what it does; its threads are set."""
        set_threads(self.threads)
        return Screen(as_json)


@dataclass(frozen=True)
class Machine(Threaded):
    """Options of what the model is computed on, and whether its code is trusted."""

    device: o.Device = None
    trust_remote_code: o.Trust = False


@dataclass(frozen=True)
class Opening(Threaded):
    """Options of how a model is opened, and of what it is computed on."""

    dtype: o.Dtype = None
    device: o.Device = None
    device_map: o.DeviceMap = None
    trust_remote_code: o.Trust = False

    def opened(self, screen: Screen, spec: str) -> Any:
        """The model, opened with progress."""
        return o.opened(screen, spec, self.dtype, self.device, self.device_map, self.trust_remote_code)


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The function with each dataclass among its parameters replaced by the fields of it."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))
            continue
        assert isinstance(kind, type)
        groups[name] = kind
        typed = get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=typed[f.name])
            for f in fields(kind)
        ]

    @wraps(function)
    def command(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        function(**given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    del command.__wrapped__  # else its parameters would be read
    return command
