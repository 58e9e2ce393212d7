"""Tensor, data and sharded parallelism on gloo processes of one machine: the same training as one process?"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _page import ROOT, RUNS, table, write

import vesalius
from vesalius.errors import VesaliusError
from vesalius.train.assembly import assemble
from vesalius.train.optimizers import OPTIMIZERS
from vesalius.train.parallel import World
from vesalius.train.recipe import Recipe, read_recipe
from vesalius.train.trainer import deterministic

WAYS = (
    ("data parallel (DDP)", 2, ""),
    ("sharded (FSDP2)", 2, "--fsdp"),
    ("tensor", 2, "--tensor-parallel 2"),
    ("tensor and sequence", 2, "--tensor-parallel 2 --sequence-parallel"),
    ("tensor x data", 4, "--tensor-parallel 2"),
    ("tensor x sharded", 4, "--tensor-parallel 2 --fsdp"),
)
REFUSED = (
    ("model: {source: smollm2-135m}", "SmolLM2-135M: 9 query and 3 key-value heads"),
    ("model: {preset: tiny-bloom}\nobjective: masked-lm", "an objective the model cannot have"),
)


def recipe_of(steps: int, **changes: Any) -> Recipe:
    """A tiny Llama on the King James Bible, clipped AdamW."""
    settings: dict[str, Any] = {
        "name": "megatron",
        "steps": steps,
        "data.corpus": "bible-kjv",
        "data.tokenizer": {"kind": "bpe", "vocab_size": 2048},
        "data.rows": 8,
        "data.length": 64,
        "checkpoints": {"log": False, "every": steps},
        "evaluate": {"every": steps, "batches": 2},
    }
    return read_recipe("tiny-llama", settings | changes)


def command(processes: int, arguments: list[str], worker: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs torchrun (or one process alone) on `vesalius train`, or on this file."""
    what = [str(Path(__file__))] if worker else ["-m", "vesalius", "train"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    told = [*(torchrun if processes > 1 else []), *what, *arguments]
    print("python", *told, file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *told], capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )


def sitting(place: Path, name: str, processes: int, flags: str, steps: int) -> dict[str, Any]:
    """A run through the command line: its losses, its last checkpoint opened in this one process."""
    folder = place / name.replace(" ", "-").replace("(", "").replace(")", "")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_of(steps).yaml())
    began = time.perf_counter()
    done = command(processes, [str(folder / "recipe.yaml"), "--out", str(folder), "--json", *flags.split()])
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    run = Path(json.loads(done.stdout)["run"])
    model = vesalius.open(f"{run}@last").hf
    log = pd.read_parquet(run / "log.parquet")
    return {"loss": log["loss"].tolist(), "norm": log["grad_norm"].tolist(), "model": model, "seconds": seconds}


def gap(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Largest relative difference of losses and of gradient norms, largest difference of last weights."""
    relative = [max(abs(a / b - 1) for a, b in zip(other[k], one[k], strict=True)) for k in ("loss", "norm")]
    mine, theirs = one["model"].state_dict(), other["model"].state_dict()
    weights = max(float((mine[n] - theirs[n]).abs().max()) for n in mine)
    return [*(f"{r:.1e}" for r in relative), f"{weights:.1e}", f"{other['loss'][-1]:.4f}"]


def refusals(place: Path) -> list[list[Any]]:
    """What the command line says to a split that cannot be: lines of ours, and the exit code of the first process."""
    rows = []
    for text, about in REFUSED:
        recipe = place / "refused.yaml"
        recipe.write_text(f"{text}\ndata: {{corpus: bible-kjv, rows: 4, length: 32}}\nsteps: 2\n")
        done = command(2, [str(recipe), "--tensor-parallel", "2", "--out", str(place)])
        ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        codes = re.findall(r"failed \(exitcode: (-?\d+)\)", done.stderr)
        code = codes[0] if codes else "0"
        rows.append([about, len(ours), code, done.returncode, ours[0].removeprefix("error: ") if ours else ""])
    return rows


# -- optimizers, under torchrun --------------------------------------------------------------------------------------


def losses(optimizer: str, world: World, strategy: str, steps: int) -> list[float] | str:
    """The losses of a few steps, or what was refused."""
    recipe = recipe_of(steps, optimizer={"name": optimizer})
    try:
        trainer = assemble(recipe, world, strategy=strategy).trainer
        with deterministic(True):
            return [log.loss for log in trainer.steps(steps)]
    except VesaliusError as error:
        return f"refused: {error}"
    except Exception as error:  # anything else is a defect, and told as one
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def worker(out: Path, steps: int, tensor: int, strategy: str) -> None:
    """One of torchrun's processes: every optimizer under one strategy."""
    torch.set_num_threads(1)
    with World.start(tensor, device="cpu") as world:
        found = {name: losses(name, world, strategy, steps) for name in OPTIMIZERS.names()}
        if world.is_main:
            out.write_text(json.dumps(found))


def optimizers(place: Path, steps: int) -> list[list[str]]:
    """Each optimizer's losses against one process; one line a strategy."""
    alone = {name: losses(name, World.single("cpu"), "ddp", steps) for name in OPTIMIZERS.names()}
    columns = {}
    for told, tensor, strategy in (("tensor", 2, "ddp"), ("sharded", 1, "fsdp"), ("data parallel", 1, "ddp")):
        out = place / f"optimizers-{told}.json"
        out.unlink(missing_ok=True)
        done = command(2, ["--worker", str(out), str(steps), str(tensor), strategy], worker=True)
        columns[told] = json.loads(out.read_text()) if out.exists() else dict.fromkeys(alone, done.stderr[-200:])
    rows = []
    for name, expected in alone.items():
        row = [name]
        for found in columns.values():
            mine = found[name]
            if isinstance(mine, str) or isinstance(expected, str):
                row.append(str(mine if isinstance(mine, str) else expected))
            else:
                row.append(f"{max(abs(a / b - 1) for a, b in zip(mine, expected, strict=True)):.1e}")
        rows.append(row)
    return rows


# -- the tests' own numbers ------------------------------------------------------------------------------------------


def measured(place: Path, processes: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """What `tests/train/parallel_worker.py` finds: families, mutations, sizes, messages."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    program = ROOT / "tests" / "train" / "parallel_worker.py"
    told = [sys.executable, str(program), str(place), *map(str, processes)]
    subprocess.run(told, check=True, env=environment, cwd=ROOT, capture_output=True)
    return {n: json.loads((place / f"{n}.json").read_text()) for n in processes}


def families(found: dict[int, dict[str, Any]]) -> list[list[Any]]:
    """Largest gaps to one process by case."""
    rows = []
    for processes, checks in found.items():
        for name in ("equal", "equal data", "equal shared heads"):
            for case, values in checks.get(name, {}).items():
                rows.append([processes, case, *(f"{values[k]:.1e}" for k in ("logits", "grads", "norm"))])
    return rows


def main() -> None:
    """Measures, and writes docs/results/train-megatron.md (five minutes of two cores)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rehearsal with two ways and one optimizer step")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        out, steps, tensor, strategy = given.worker
        return worker(Path(out), int(steps), int(tensor), strategy)
    quick = given.quick
    torch.set_num_threads(1)
    place = RUNS / ("megatron-quick" if quick else "megatron")
    place.mkdir(parents=True, exist_ok=True)
    steps = 6 if quick else 50
    one = sitting(place, "one process", 1, "", steps)
    rows = []
    for name, processes, flags in WAYS[2:3] if quick else WAYS:
        other = sitting(place, name, processes, flags, steps)
        rows.append([name, processes, f"`{flags}`" if flags else "", *gap(one, other)])
    body = [
        f"A tiny Llama (2 layers, 64 wide, 4 query and 2 key-value heads) on the King James Bible, {steps} steps of "
        "clipped AdamW in float32, started by `torchrun --nproc-per-node N -m vesalius train recipe.yaml ...`; gloo on "
        "one machine.",
        "## Against one process, through the command line",
        "Asked: loss curves within 1e-4. The last checkpoint of every run was opened in one process.",
        table(["way", "processes", "flags", "loss, relative", "gradient norm, relative", "weights", "last loss"], rows),
        "Rounding is all that differs (see the families below: 1e-6 at the first step). A spike of the gradient in "
        "these 50 steps at a rate of 2e-3 multiplies it, most where sums are split most; in the tests' 50 steps at a "
        "lower rate losses stay within 1e-6.",
    ]
    if not quick:
        found = measured(place, (2, 4))
        sizes, mutations = found[2]["sizes"], found[2]["mutations"]
        saved = found[4]["saved"]
        body += [
            "## Families",
            "Gaps of logits (asked: 1e-5), gathered gradients (1e-6) and their norm, tiny random models:",
            table(["processes", "case", "logits", "gradients", "norm"], families(found)),
            "Fifty clipped AdamW steps, worst relative difference of the loss: "
            + ", ".join(f"{c} {v['worst']:.1e}" for c, v in found[2]["curves"].items())
            + ".",
            "## Memory and messages at two processes",
            table(
                ["family", "local share of matrix bytes (asked: .51)"],
                [[f, f"{v:.3f}"] for f, v in sizes["fractions"].items()],
            ),
            table(["model and blocks", "forward", "loss", "backward"], [[m, *v] for m, v in sizes["messages"].items()]),
            "All-reduces; from one block to three, forward and backward grow by four each: two a block. The largest "
            f"tensor of a step has {sizes['largest']:,} numbers, whole logits would have {sizes['logits']:,}.",
            "## Mistakes built in",
            table(
                ["mistake", "logits", "gradients"],
                [[m, f"{v['logits']:.1e}", f"{v['grads']:.1e}"] for m, v in mutations.items()],
            ),
            "## Saved by 2 x 2 processes, loaded by one",
            table(
                ["case", "equal bytes, untrained", "loads in one process, saves the same", "trains on the same"],
                [[c, v["untrained"], v["one process"], v["onward"] == 0] for c, v in saved.items()],
            ),
        ]
    body += [
        "## Optimizers",
        f"Losses of {2 if quick else 8} steps against one process, largest relative difference, or what was said:",
        table(["optimizer", "tensor", "sharded", "data parallel"], optimizers(place, 2 if quick else 8)),
        "## Refused",
        "Lines of ours on standard error, the exit code of the process that said it, that of torchrun (which adds a "
        "report of its own and always ends with 1):",
        table(["what", "lines", "exit code", "torchrun's", "message"], refusals(place)),
    ]
    if quick:
        print("\n".join(body))
    else:
        write("train-megatron", "Several processes train as one", "python studies/megatron.py", *body)


if __name__ == "__main__":
    main()
