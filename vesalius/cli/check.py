"""`vesalius check`: the bench's identities on the user's own model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen, set_threads, typed


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("check")(check)


def check(
    model: Annotated[
        str,
        typer.Argument(
            help="Short name, hub name, folder, .gguf file or `wheel:NAME==VERSION/PATH`; see `vesalius models`."
        ),
    ] = o.MODEL_DEFAULT,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    trust_remote_code: o.Trust = False,
    threads: o.Threads = None,
) -> None:
    """Run the bench's parity and identity tests on a model, and say which of its parts are usable.

    Exit code 0 if every identity holds, 1 if one fails.
    """
    from vesalius.model.check import check as run_checks
    from vesalius.runs import Run

    screen = Screen(as_json)
    set_threads(threads)
    opened = o.opened(screen, model, dtype, device, device_map, trust_remote_code)
    request = {
        "command": "check",
        "model": model,
        "model_fingerprint": opened.fingerprint,
        "seed": seed,
        "dtype": dtype,
    }
    with Run.start(request, out, True, typed()) as run:
        with screen.step("checking") as progress:
            found = run_checks(opened, seed=seed, progress=progress)
        frame = found.to_frame()
        run.save_table("checks", frame)
        usable: dict[str, dict[str, Any]] = {
            kind: {"usable": bool(ok), "reason": why} for kind, (ok, why) in found.usable().items()
        }
        run.save_json("summary", {"model": opened.name, "ok": found.ok, "usable": usable})
    words = [
        f"{kind}: {'usable' if u['usable'] else 'NOT usable'}{' (' + u['reason'] + ')' if u['reason'] else ''}"
        for kind, u in usable.items()
    ]
    if not found.ok and str(opened.dtype) != "torch.float64":
        words.append("\nnote: run it again with --dtype float64 to tell rounding (large weights) from a wrong anatomy")
    summary = {"model": opened.name, "ok": found.ok, "checks": frame.to_dict("records"), "usable": usable}
    screen.show(
        summary | {"run": str(run.folder)},
        repr(opened),
        "",
        frame[["check", "status", "worst", "tolerance", "says", "reason"]],
        "",
        *words,
        f"\nrun     {run.folder}",
    )
    if not found.ok:
        raise typer.Exit(1)
