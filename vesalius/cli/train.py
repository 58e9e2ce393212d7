"""`vesalius train`: train a model by a recipe, go on with a run, or branch from one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
import yaml
from rich.progress import BarColumn, Progress, TextColumn

from vesalius import checkpoints
from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, set_threads, typed
from vesalius.errors import VesaliusError
from vesalius.records import clock
from vesalius.run_index import find_run
from vesalius.runs import Run, folder_of

LINE_SECONDS = 15.0  # between lines of progress where there is no terminal
RECIPE_PANEL = "Recipe"
SCALE_PANEL = "Processes"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("train")(train)


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file, or the name of one (see --list).")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A recipe that comes with Vesalius.", rich_help_panel=RECIPE_PANEL)
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE, repeatable: what differs, as optimizer.lr=0.002.", rich_help_panel=RECIPE_PANEL
        ),
    ] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="Go on with this run, bit for bit.")] = None,
    branch: Annotated[
        str | None,
        typer.Option("--branch", help="RUN@step512: go on from there by its recipe, with --set changes."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the recipes that come with Vesalius.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the whole recipe and train nothing.")] = False,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Processes that share each matrix (under torchrun).", rich_help_panel=SCALE_PANEL)
    ] = 1,
    sequence_parallel: Annotated[
        bool,
        typer.Option("--sequence-parallel", help="Also share what lies between.", rich_help_panel=SCALE_PANEL),
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Shard weights over data ranks (FSDP2).", rich_help_panel=SCALE_PANEL)
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=o.MOST_SEED, help="Short for --set seed=N.")] = None,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    threads: o.Threads = None,
) -> None:
    """Train a model whose every batch can be named and whose every checkpoint opens on the bench.

    Leaves a run with ordinary checkpoints (RUN/steps/step512), the log, and report.html, which is drawn while it runs.
    The same command finds its run again; one that was stopped or killed goes on from its last checkpoint and ends with
    the bytes it would have had.
    """
    from vesalius.train.recipe import recipes
    from vesalius.train.running import recipe_of
    from vesalius.train.running import train as run_recipe

    screen = Screen(as_json)
    if show_list:
        table = pd.DataFrame([{"recipe": n, "about": r.get("about", "")} for n, r in recipes().items()])
        screen.show({"recipes": table.to_dict("records")}, table)
        return
    set_threads(threads)
    roots = (out,) if out is not None else ()
    if resume is not None:
        if recipe or preset or branch or changes or seed is not None:
            raise VesaliusError("--resume goes on with a run as it is; to change it: --branch RUN@step512 --set ...")
        run = _find(resume, roots)
        plan, out = recipe_of(run), run.folder.parent
        if (wanted := folder_of(run.request, out)) != run.folder:
            raise VesaliusError(f"{run.folder} was renamed; call it {wanted.name} again to go on with it")
    else:
        plan = _recipe(recipe, preset, branch, changes or [], seed, roots)
    if show:
        screen.show(plan.model_dump(mode="json"), yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False))
        return
    from vesalius.train.parallel import World

    world = World.start(tensor_parallel) if "RANK" in os.environ else World.single()
    if world.size == 1 and tensor_parallel > 1:
        raise VesaliusError(
            f"--tensor-parallel {tensor_parallel} needs as many processes: torchrun --nproc-per-node {tensor_parallel} "
            "-m vesalius train ..."
        )
    watcher = Watching(screen, quiet=not world.is_main)
    try:
        with watcher:
            folder = run_recipe(
                plan,
                out,
                fresh=fresh,
                command_line=typed(),
                watcher=watcher,
                world=world,
                strategy="fsdp" if fsdp else "ddp",
                sequence_parallel=sequence_parallel,
            )
    finally:
        world.close()
    if world.is_main:
        _show(screen, Run.open(folder))


def _find(text: str, roots: tuple[Path, ...]) -> Run:
    return find_run(text, roots) if roots else find_run(text)


def _recipe(
    recipe: str | None,
    preset: str | None,
    branch: str | None,
    items: list[str],
    seed: int | None,
    roots: tuple[Path, ...],
) -> Any:
    from vesalius.model.sources.spec import STEP
    from vesalius.train.recipe import read_recipe
    from vesalius.train.running import recipe_of

    changes = parse_changes(items)
    if seed is not None:
        changes["seed"] = seed
    if branch is not None:
        if recipe or preset:
            raise VesaliusError("--branch takes the recipe of the run it starts from; give what differs with --set")
        match = STEP.fullmatch(branch)
        if match is None:
            raise VesaliusError(f"--branch {branch}: name a step, as in {branch.partition('@')[0]}@step512")
        parent = _find(match["run"], roots)
        given = recipe_of(parent).model_dump(mode="json")
        if (given["branch"] or {}).get("swap"):
            raise VesaliusError(
                f"{parent.folder} is itself a branch with words exchanged; branch from the run it came from"
            )
        saved = checkpoints.steps_in(parent.folder / checkpoints.FOLDER)
        step = int(match["step"]) if match["step"] else max(saved, default=0)
        checkpoints.check(parent.folder / checkpoints.FOLDER / checkpoints.name_of(step))
        given["branch"] = {"run": str(parent.folder.resolve()), "step": step}
        given["name"] = f"{given['name']}-from-{step}"[:60]
        return read_recipe(given, changes)
    if (recipe is None) == (preset is None):
        raise VesaliusError("name a recipe file, or --preset NAME (`vesalius train --list` shows them)")
    return read_recipe(recipe or {"preset": preset}, changes)


def parse_changes(items: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as dotted keys with YAML values."""
    from vesalius.train.recipe import read_yaml

    found = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            raise VesaliusError(f"--set {item}: not of the form KEY=VALUE")
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            raise VesaliusError(f"--set {item}: {text!r} is not a YAML value") from None
        found[key.strip()] = value
    return found


class Watching:
    """Shows a run on standard error: a bar in a terminal, a line now and then elsewhere; draws the live report.

    Args:
        quiet: show nothing. name: what is trained, where it is one thing among others that a command does.
    """

    def __init__(self, screen: Screen, quiet: bool = False, name: str = "") -> None:
        self.screen, self.quiet, self.name = screen, quiet, name
        self.line = time.monotonic()
        self.loss: float | None = None
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[told]}"))
        hidden = quiet or not screen.err.is_terminal
        self.bar = Progress(*columns, console=screen.err, transient=True, disable=hidden)
        self.task: Any = None

    def __enter__(self) -> Watching:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def message(self, text: str) -> None:
        """Something that takes a while, or something to know."""
        if not self.quiet:
            self.bar.console.print(f"  {text}", style="dim", markup=False, highlight=False)

    def step(self, log: Any, total: int, ledger: Any, held_out: float | None) -> None:
        """A step was made: loss (smoothed), tokens a second, time left."""
        self.loss = log.loss if self.loss is None else 0.95 * self.loss + 0.05 * log.loss
        done, speed = log.step + 1, ledger.tokens_per_second
        left = f", {clock((total - done) * log.tokens / speed)} left" if speed else ""
        out = f", held out {held_out:.3f}" if held_out is not None else ""
        told = f"{done:,}/{total:,} loss {self.loss:.3f}{out}, {speed or log.tokens / log.seconds:,.0f} tokens/s{left}"
        if self.quiet:
            return
        if not self.bar.disable:
            if self.task is None:
                self.task = self.bar.add_task(self.name or "training", total=total, told="")
            self.bar.update(self.task, completed=done, told=told)
        elif time.monotonic() - self.line > LINE_SECONDS or done == total:
            self.line = time.monotonic()
            self.message(f"{self.name}: step {told}" if self.name else f"step {told}")

    def saved(self, run: Run, step: int) -> None:
        """New numbers lie in the run."""
        from vesalius.report import train_report

        train_report(run)


def _show(screen: Screen, run: Run) -> None:
    drawn(screen, run)
    summary = run.json("summary")
    ledger = summary["ledger"]
    size = f"{summary['parameters'] / 1e6:.2f} M parameters"
    if summary["trained"] != summary["parameters"]:
        size += f" ({summary['trained'] / 1e6:.2f} M trained)"
    lines: list[Any] = [f"\n{summary['name']}: {summary['model_type']}, {size}, {summary['steps']:,} steps"]
    losses = f"training loss {summary['loss']:.3f} nats a target" if summary["loss"] is not None else ""
    if summary["held_out"] is not None:
        losses += f", held out {summary['held_out']:.3f}"
    if summary["bits_per_byte"] is not None:
        losses += f" ({summary['bits_per_byte']:.3f} bits a byte)"
    lines.append(losses)
    speed = ledger["tokens_per_second"]
    spent = f"{ledger['tokens'] / 1e6:.2f} M tokens in {clock(ledger['seconds'])}"
    if speed:
        spent += f", {speed:,.0f} tokens/s"
    spent += f", peak memory {ledger['peak_memory_bytes'] / 2**20:.0f} MiB"
    if summary["cost_of_determinism"]:
        spent += f"; deterministic mode costs {summary['cost_of_determinism']:.2f} x"
    lines.append(spent)
    norms = summary.get("norms")
    if norms:
        told = "the last checkpoint keeps the constants of the norms beside its weights, where Vesalius reads them"
        if norms["ordinary_checkpoint"]:
            told = f"opened anew, the last checkpoint's logits differ by at most {norms['largest_difference']:.1e}"
        lines.append(f"{norms['removed']} norms are constants; {told}")
    lines += [f"note: {n}" for n in summary["notes"]]
    kept = summary["checkpoints"]
    place = {"run": str(run.folder), "report": str(run.folder / "report.html")}
    lines.append(f"\n{len(kept)} checkpoints; on the bench: vesalius circuit --model {run.folder}@step{kept[-1]}")
    screen.show(summary | place, *lines, f"run     {place['run']}", f"report  {place['report']}")
