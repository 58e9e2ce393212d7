"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vesalius.model.opening import DEFAULT_MODEL
from vesalius.model.sweep import DEFAULT_MEMORY_GB

ModelName = Annotated[
    str,
    typer.Option("--model", "-m", help="Short name, hub name, folder, .gguf file or wheel: (see `vesalius models`)."),
]
TaskName = Annotated[
    str, typer.Option("--task", "-t", help="A task's name, or a .jsonl/.csv file of your own prompts.")
]
Number = Annotated[int | None, typer.Option("--n", help="Prompts to find with; default 32, or half of a file's rows.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder that holds the runs; default ./runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; float32 on a CPU by default.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; the fastest present by default.")]
DeviceMap = Annotated[str | None, typer.Option("--device-map", help="Spread a large model: auto, balanced, ...")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with this model's checkpoint.")]
Memory = Annotated[float, typer.Option("--memory", help="Working memory for batches of interventions, GiB.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; default: the cores available.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget an earlier run of the same request.")]
TaskSet = Annotated[
    list[str] | None, typer.Option("--task-set", help="KEY=VALUE: a parameter of the task (repeatable).")
]

MODEL_DEFAULT = DEFAULT_MODEL
MEMORY_DEFAULT = DEFAULT_MEMORY_GB


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
        n = n or default_n
    extra = {"metric": "", "scoring": ""}
    params = settings(items or [], known | extra, f"task '{name}'")
    return vesalius.task(name, n=n, seed=seed, **params)
