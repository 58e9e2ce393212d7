"""Runs one job of one engine in a process of its own and writes what it took.

    python -m bench.worker ENGINE JOB --work work.json --out result.json

A fresh process a job makes the memory peak that job's alone. Loading the model and one warm-up call come first; the
peak is read after the first timed call, then the job is repeated, alternating with a plain forward where the engine
gives one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ENGINES = {
    "hooks": "bench.hooks",
    "vesalius": "bench.ours",
    "transformer-lens": "bench.peers.transformer_lens",
    "nnsight": "bench.peers.nnsight",
}
SHORT = ("forward", "capture", "nodes", "edges")  # repeated; the sweeps run once


def execute(engine: str, job_name: str, work_path: Path, repeats: int) -> dict[str, Any]:
    """Loads the engine, runs the job, and returns everything that was measured."""
    import torch

    from bench.measure import Meter, machine, summary, versions
    from bench.work import Refused, Work

    work = Work.load(work_path)
    torch.set_num_threads(work.threads)
    name, _, set_name = job_name.partition(":")
    module = importlib.import_module(ENGINES[engine])
    meter = Meter(work.device)
    report: dict[str, Any] = {
        "engine": engine,
        "job": job_name,
        "work": work.digest,
        "threads": torch.get_num_threads(),
        "machine": machine(work.device),
        "versions": versions("torch", "transformers", "transformer-lens", "nnsight", "vesalius"),
    }
    start = time.perf_counter()
    model = module.load(work)
    report["load_s"] = time.perf_counter() - start
    if name not in module.JOBS:
        return report | {"status": "not offered", "note": getattr(module, "MISSING", {}).get(name, "")}
    try:
        module.JOBS["forward"](model, work, work.sets[set_name]).run()  # warms up allocator, kernels and caches
        job = module.JOBS[name](model, work, work.sets[set_name])
        report["rest_bytes"] = meter.rest_bytes()
        report["peak_is_of_job"] = meter.reset()
        outcome, wall, cpu, others = meter.once(job.run)
        report["peak_bytes"] = meter.peak_bytes()
    except Refused as reason:
        return report | {"status": "refused", "note": str(reason)}
    samples, plain = [(wall, cpu, others)], []
    if name in SHORT:
        samples = []  # the first call also warmed the job up
        for _ in range(repeats):
            if job.plain is not None:
                plain.append(meter.once(job.plain)[1:])
            samples.append(meter.once(job.run)[1:])
    report |= dataclasses.asdict(summary(samples))
    if plain:
        report["plain_wall_s"] = summary(plain).wall_s
        report["plain_cpu_s"] = summary(plain).cpu_s
    return report | {"status": "ok"} | outcome._asdict()


def main() -> int:
    """Command line; the result file is always written, also when the job fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("job")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        report = execute(args.engine, args.job, args.work, args.repeats)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        note = f"{type(error).__name__}: {lines[0] if lines else ''}"
        report = {"engine": args.engine, "job": args.job, "status": "failed", "note": note}
    args.out.write_text(json.dumps(report))
    return 0 if report["status"] != "failed" else 1


if __name__ == "__main__":
    sys.exit(main())
