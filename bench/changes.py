"""Changing a model: three models merged, a model pruned and saved, a calibration pass; seconds and peak memory.

    python -m bench.changes [--rounds 3] [--model smollm2-135m] [--method ties] [--environments .venv-peers]

- **merge**: a base and two models made from it (normal noise on every weight), float32, by TIES or task arithmetic:
  Vesalius on the files, tensor by tensor; the plain way, three transformers models in memory and the same functions;
  and mergekit, where `make bench-peers` has made its environment. Results are compared number by number. Seconds are
  those of a whole process each, start included.
- **prune and save**: a fifth of the body by magnitude, cut, and written with its hashes, beside transformers'
  `save_pretrained` of the whole model.
- **calibration**: ranges, means and squares of the inputs of every linear map, for a thousand tokens, beside plain
  forward passes over the same rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import torch

from bench.measure import MB, cores, machine, versions
from bench.suite import ROOT, refuse_if_busy
from bench.table import markdown

DENSITY, ROWS, LENGTH = 0.25, 8, 125
PARTS = ("base", "a", "b")
NAMES = {
    "merge:vesalius": "merge: Vesalius, on the files", "merge:plain": "merge: three models in memory",
    "merge:mergekit": "merge: mergekit", "prune:vesalius": "prune and save: Vesalius",
    "prune:plain": "save alone: save_pretrained", "calibrate:vesalius": "calibration, 1,000 tokens: Vesalius",
    "calibrate:plain": "the same rows read alone",
}  # fmt: skip
KIND = {"ties": "ties", "task": "task_arithmetic"}


def prepare(spec: str, folder: Path) -> None:
    """The base and two models made from it, in float32."""
    import vesalius
    from vesalius.model.saving import save_model

    model = vesalius.open(spec, dtype="float32")
    save_model(model, folder / "base")
    for seed, name in enumerate(PARTS[1:]):
        other, drawn = model.copied(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in other.hf.parameters():
                p.add_(1e-3 * torch.randn(p.shape, generator=drawn))
        save_model(other, folder / name)


def merge_by_vesalius(folder: Path, args: argparse.Namespace) -> None:
    """As `vesalius merge` does it, without the card."""
    from vesalius.change.merge import MergePlan, merge
    from vesalius.model.sources import resolve

    base, *others = (resolve(str(folder / name)) for name in PARTS)
    merge(base, others, MergePlan(args.method, density=DENSITY), folder / "merge-vesalius")


def merge_plainly(folder: Path, args: argparse.Namespace) -> None:
    """Three models, their state dicts, and one of them saved."""
    from transformers import AutoModelForCausalLM

    from vesalius.change.merge import MergePlan, merged

    plan = MergePlan(args.method, density=DENSITY)
    models = [AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in PARTS]
    base, *others = (m.state_dict() for m in models)
    with torch.no_grad():
        for name, tensor in base.items():
            if name != "lm_head.weight" or not models[0].config.tie_word_embeddings:
                tensor.copy_(merged(tensor.clone(), [o[name] for o in others], plan, name))
    models[0].save_pretrained(folder / "merge-plain")


def mergekit(folder: Path, args: argparse.Namespace) -> list[str]:
    """The command of mergekit's own tool, in its environment."""
    lines = [f"merge_method: {KIND[args.method]}", f"base_model: {folder / 'base'}", "dtype: float32", "models:"]
    for name in PARTS[1:]:
        lines += [f"  - model: {folder / name}", f"    parameters: {{weight: 1.0, density: {DENSITY}}}"]
    lines += ["parameters: {normalize: " + ("true}" if args.method == "ties" else "false}")]
    (folder / "merge.yaml").write_text("\n".join(lines) + "\n")
    tool = args.environments / "mergekit" / "bin" / "mergekit-yaml"
    return [str(tool), str(folder / "merge.yaml"), str(folder / "merge-mergekit"), "--allow-crimes"]


def prune(folder: Path, args: argparse.Namespace) -> Callable[[], object]:
    """A fifth of the body, by magnitude."""
    import vesalius
    from vesalius.change import cut
    from vesalius.change.prune import budget, choose
    from vesalius.change.ranking import RANKINGS
    from vesalius.model.saving import save_model

    model = vesalius.open(args.model)

    def work() -> None:
        plan = budget(model, 0.2)
        scores = RANKINGS.get("magnitude")(model, torch.zeros(1, 1, dtype=torch.long))
        save_model(cut(model, choose(model, scores, plan)), folder / "pruned")

    return work


def save(folder: Path, args: argparse.Namespace) -> Callable[[], object]:
    """What transformers does with the whole model."""
    import vesalius

    model = vesalius.open(args.model)
    return lambda: model.hf.save_pretrained(folder / "whole")


def calibration(folder: Path, args: argparse.Namespace) -> Callable[[], object]:
    """Statistics of every linear map."""
    import vesalius
    from vesalius.change.calibration import Channels, calibrate
    from vesalius.change.linears import linear_names

    model = vesalius.open(args.model)
    rows = torch.randint(5, 10_000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return lambda: calibrate(model, rows, {name: [Channels()] for name in linear_names(model)})


def reading(folder: Path, args: argparse.Namespace) -> Callable[[], object]:
    """The same rows through the model's body, nothing looked at."""
    import vesalius

    model = vesalius.open(args.model)
    rows = torch.randint(5, 10_000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def work() -> None:
        with torch.no_grad():
            model.hf.base_model(rows)

    return work


PREPARED = {"prune:vesalius": prune, "prune:plain": save, "calibrate:vesalius": calibration, "calibrate:plain": reading}
WHOLE = {"merge:vesalius": merge_by_vesalius, "merge:plain": merge_plainly}


def worker(job: str, folder: Path, args: argparse.Namespace) -> None:
    """One job in this process; a prepared one says how long its work took, and what it added to the loaded model."""
    if job in WHOLE:
        WHOLE[job](folder, args)
        return
    from bench.measure import Meter

    work = PREPARED[job](folder, args)
    meter = Meter("cpu")
    rest = meter.rest_bytes()
    meter.reset()
    _, wall, cpu, _ = meter.once(work)
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": meter.peak_bytes() - rest}))


def watched(command: list[str]) -> dict[str, float]:
    """Seconds, and the largest resident memory, of a process with its children."""
    began, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: output.append(process.communicate()))
    reader.start()
    mine = psutil.Process(process.pid)
    while reader.is_alive():
        with suppress(psutil.Error):
            peak = max(peak, sum(_own(p) for p in (mine, *mine.children(recursive=True))))
        time.sleep(0.02)
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[0][1][-2000:]}")
    measured = {"wall": time.perf_counter() - began, "peak": peak}
    last = output[0][0].strip().splitlines()[-1:]
    return json.loads(last[0]) if last and last[0].startswith('{"wall"') else measured


def _own(process: psutil.Process) -> int:
    """Memory that is no file's: pages of a file that is read in place are the system's to take back."""
    found = process.memory_info()
    return int(found.rss - getattr(found, "shared", 0))


def difference(one: Path, other: Path) -> str:
    """Largest difference of a number of two checkpoints, and the share of numbers that are further apart than 1e-6."""
    from vesalius.change.merge import Weights

    with ExitStack() as exits:
        a, b = ({name: f[name] for f in [Weights(x, exits)] for name in f.where} for x in (one, other))
        far = [(a[n] - b[n]).abs().flatten() for n in a.keys() & b.keys()]
        share = sum(int((f > 1e-6).sum()) for f in far) / sum(map(len, far))
        return f"{max(float(f.max()) for f in far):.1e}" + (f", {share:.1e} of the numbers" if share else "")


def report(found: dict[str, list[dict[str, float]]], apart: dict[str, str], args: argparse.Namespace) -> str:
    """The table."""
    rows = []
    for job, runs in found.items():
        base = found[job.split(":")[0] + ":plain"]
        wall, peak = (statistics.median(r[k] for r in runs) for k in ("wall", "peak"))
        ratio = statistics.median(r["wall"] for r in base) / wall
        rows.append([NAMES[job], f"{wall:.2f}", f"{ratio:.2f}", f"{peak / MB:,.0f}", apart.get(job, "")])
    facts = machine("cpu")
    told = ", ".join(f"{k} {v}" for k, v in versions("torch", "transformers", "safetensors").items())
    return "\n".join([
        f"# Changing {args.model}, {facts['cpu']}, {facts['cores']} cores", "",
        f"Merging by {args.method}, density {DENSITY} (of TIES); {told}; medians of {args.rounds} processes each, in "
        "turns. Memory of a merge is the process's whole without the pages of files read in place, of the others what "
        "was added to the loaded model.", "",
        markdown(["", "seconds", "times as fast as plain", "peak MB", "largest difference from Vesalius"], rows), "",
    ])  # fmt: skip


def main() -> int:
    """Command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--method", default="task", choices=sorted(KIND))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, default=cores())
    options.add_argument("--force", action="store_true", help="time also on a busy machine")
    options.add_argument("--environments", type=Path, default=ROOT / ".venv-peers")
    options.add_argument("--out", type=Path, default=Path("bench/out"))
    options.add_argument("--job", choices=sorted(NAMES), help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.job:
        worker(args.job, args.folder, args)
        return 0
    refuse_if_busy(args.force)
    jobs = list(NAMES)
    if not (args.environments / "mergekit" / "bin" / "mergekit-yaml").exists():
        jobs.remove("merge:mergekit")
        print("no environment for mergekit; `make bench-peers` makes it", file=sys.stderr)
    found: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(args.model, folder)
        for _ in range(args.rounds):
            for job in jobs:
                target = folder / {"prune:vesalius": "pruned", "prune:plain": "whole"}.get(job, job.replace(":", "-"))
                shutil.rmtree(target, ignore_errors=True)
                own = [sys.executable, "-m", "bench.changes", "--job", job, "--folder", str(folder), *sys.argv[1:]]
                found[job].append(watched(mergekit(folder, args) if job == "merge:mergekit" else own))
                print(f"{NAMES[job]}: {found[job][-1]['wall']:.2f} s", file=sys.stderr, flush=True)
        ours = folder / "merge-vesalius"
        apart = {
            j: difference(ours, folder / j.replace(":", "-")) for j in jobs if j in ("merge:plain", "merge:mergekit")
        }
    text = report(found, apart, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "changes.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
