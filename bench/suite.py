"""Runs jobs one after another, each in a process of its own, and keeps what they report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import busy_cores, cores
from bench.work import Work, make_work

ROOT = Path(__file__).resolve().parent.parent
JOBS = ("forward:late", "capture:late", "nodes:late", "edges:late", "patch:late", "patch:early")
QUICK_HEADS = 9
MAX_BUSY_CORES = 0.3  # a plain forward slows by a few per cent at this; timings are refused above it


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options both steps share; both must be given the same ones for their results to be put together."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--model", default=os.environ.get("VESALIUS_BENCH_MODEL", "smollm2-135m"))
    options.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--threads", type=int, default=cores(), help="threads of every job (default: all cores)")
    options.add_argument("--pairs", type=int, default=16)
    options.add_argument("--repeats", type=int, default=15, help="of the short jobs; the sweeps run once")
    options.add_argument("--quick", action="store_true", help=f"patch {QUICK_HEADS} heads only, and say so")
    options.add_argument("--force", action="store_true", help="time also on a busy machine")
    options.add_argument("--out", type=Path, default=ROOT / "bench" / "out")
    options.add_argument("--jobs", nargs="+", default=list(JOBS), metavar="JOB:SET", help=" ".join(JOBS))
    return options


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def model_folder(spec: str, out: Path) -> Path:
    """The local folder every engine loads: the one given, or a saved copy of what Vesalius opens under that name."""
    if Path(spec).is_dir():
        return Path(spec)
    folder = out / "models" / spec.replace("/", "--").replace(":", "--")
    if not (folder / "done").exists():
        import vesalius

        say(f"opening {spec} and saving it to {folder} for all engines")
        model: Any = vesalius.open(spec)
        model.hf.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        (folder / "done").touch()
    return folder


def request(args: argparse.Namespace) -> Work:
    """The work these options ask for."""
    args.out.mkdir(parents=True, exist_ok=True)
    folder = model_folder(args.model, args.out)
    name = folder.name if Path(args.model).is_dir() else args.model
    sample = QUICK_HEADS if args.quick else None
    return make_work(folder, args.device, args.dtype, args.threads, args.pairs, sample, name)


def refuse_if_busy(force: bool) -> None:
    """Exits when other processes are computing: their timings and ours would both be wrong."""
    busy = busy_cores()
    if busy <= MAX_BUSY_CORES:
        return
    text = (
        f"other processes keep {busy:.1f} of {cores()} cores busy (load average {os.getloadavg()[0]:.2f}); "
        "timings would mean little"
    )
    if not force:
        say(f"{text}. Wait for them, or pass --force.")
        raise SystemExit(2)
    say(f"{text}; going on because of --force")


def run(engine: str, python: Path, work: Work, jobs: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Runs these jobs of one engine; a job that fails is reported as failed and the others go on."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(work.threads),
        "MKL_NUM_THREADS": str(work.threads),
        "OMP_WAIT_POLICY": "passive",  # threads that wait must not spin
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    reports = []
    with tempfile.TemporaryDirectory(prefix="vesalius-bench-") as place:
        request_path, result_path, log_path = (Path(place) / n for n in ("work.json", "result.json", "log.txt"))
        work.save(request_path)
        for job in jobs:
            say(f"{engine:>17}  {job} ...")
            command = [str(python), "-m", "bench.worker", engine, job, "--work", str(request_path)]
            command += ["--out", str(result_path), "--repeats", str(repeats)]
            result_path.unlink(missing_ok=True)
            start = time.monotonic()
            with log_path.open("w") as log:
                subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
            if result_path.exists():
                report: dict[str, Any] = json.loads(result_path.read_text())
            else:
                report = {
                    "engine": engine,
                    "job": job,
                    "status": "failed",
                    "note": "the process ended without a result",
                }
            if report["status"] == "failed":
                say(log_path.read_text()[-2000:])
            seconds = f"{report['wall_s']:.2f} s" if "wall_s" in report else report["note"]
            say(f"{engine:>17}  {job}: {report['status']}, {seconds} ({time.monotonic() - start:.0f} s in all)")
            reports.append(report)
    return reports


def same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two reports come from machines of the same make."""
    keys = ("cpu", "cores", "gpu", "system")
    return all(a.get("machine", {}).get(k) == b.get("machine", {}).get(k) for k in keys)
