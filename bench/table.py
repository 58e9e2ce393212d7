"""The benchmark's tables: ratios first, absolute numbers beside them, and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.measure import MB
from bench.work import Work

ORDER = ("hooks", "vesalius", "transformer-lens", "nnsight")
LABEL = {
    "hooks": "Hugging Face + hooks (naive)",
    "vesalius": "Vesalius",
    "transformer-lens": "TransformerLens",
    "nnsight": "nnsight",
}
WHAT = {
    "forward": "plain forward",
    "capture": "forward keeping all head outputs",
    "nodes": "attribution scores of all heads",
    "edges": "attribution scores of all edges",
}
Report = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "" if value is None or math.isnan(value) else form.format(value)


def _difference(report: Report, reference: Report | None) -> str:
    mine, theirs = report.get("values"), (reference or {}).get("values")
    if mine is None or theirs is None:
        return ""
    if len(mine) != len(theirs):
        return f"not comparable: {len(mine)} values against {len(theirs)}"
    return f"{np.abs(np.subtract(mine, theirs)).max():.1e}"


def _note(report: Report) -> str:
    notes = [] if report["status"] == "ok" else [f"**{report['status']}**"]
    notes += [report["note"].replace("|", "/")] if report.get("note") else []
    if report.get("others_cores", 0) > 0.2:
        notes.append(f"disturbed: others used up to {report['others_cores']:.1f} cores")
    if not report.get("peak_is_of_job", True):
        notes.append("peak includes loading")
    return "; ".join(notes)


def _memory(report: Report) -> list[str]:
    if "peak_bytes" not in report:
        return ["", ""]
    peak, rest = report["peak_bytes"], report["rest_bytes"]
    return [f"{peak / MB:.0f}", f"{max(0, peak - rest) / MB:.0f}"]


class Results:
    """Reports by engine and job."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self._by = {(r["engine"], r["job"]): r for r in reports}

    def get(self, engine: str, job: str) -> Report | None:
        """That report, finished or not."""
        return self._by.get((engine, job))

    def of(self, job: str) -> list[Report]:
        """All engines' reports of a job, in the usual order."""
        return [r for e in ORDER if (r := self.get(e, job)) is not None]

    def wall(self, engine: str, job: str) -> float | None:
        """Median seconds, if it was timed."""
        return (self.get(engine, job) or {}).get("wall_s")

    def sweep(self, engine: str, job: str) -> float | None:
        """Seconds for all heads: as measured, or in a quick run in proportion to the sample."""
        report = self.get(engine, job) or {}
        return report["wall_s"] * report.get("scale", 1) if "wall_s" in report else None

    def best_peer(self, job: str) -> float | None:
        """Seconds of the fastest other library."""
        times = [t for e in ORDER[2:] if (t := self.sweep(e, job)) is not None]
        return min(times, default=None)

    def forwards(self, report: Report) -> float | None:
        """How many plain forwards a report's time is worth, against the forward of its own process or environment."""
        plain = report.get("plain_wall_s") or self.wall("hooks", "forward:late")
        return report["wall_s"] / plain if plain and "wall_s" in report else None


def sweep_table(results: Results, job: str) -> str:
    """Exact patching of every head on one prompt set."""
    naive = results.get("hooks", job)
    base = results.sweep("hooks", job)
    rows = []
    for report in results.of(job):
        wall, whole = report.get("wall_s"), results.sweep(report["engine"], job)
        faster = base / whole if base and whole else None
        cpu = _number(report.get("cpu_s"))
        row = [LABEL[report["engine"]], _number(wall), _number(faster, "{:.2f} x"), cpu, *_memory(report)]
        rows.append([*row, _difference(report, naive), _note(report)])
    header = ["", "wall s", "faster than naive", "CPU s", "peak MB", "of it above rest MB", "max difference", "note"]
    return markdown(header, rows)


def pass_table(results: Results) -> str:
    """Forward, capture and attribution."""
    rows = []
    for name, what in WHAT.items():
        job = f"{name}:late"
        reference = results.get("hooks", "nodes:late" if name == "edges" else job)
        for report in results.of(job):
            cost = _number(results.forwards(report), "{:.2f} x")
            row = [what, LABEL[report["engine"]], _number(report.get("wall_s"), "{:.3f}"), cost]
            row += [_number(report.get("cpu_s"), "{:.3f}"), *_memory(report)]
            rows.append([*row, _difference(report, reference), _note(report)])
    header = ["", "", "wall s", "plain forwards", "CPU s", "peak MB", "of it above rest MB", "max difference", "note"]
    return markdown(header, rows)


def wanted(results: Results) -> list[tuple[str, float | None, float, bool]]:
    """What was asked of Vesalius: (what, measured, limit, whether larger is better)."""

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    ours = "vesalius"
    goals: list[tuple[str, float | None, float, bool]] = []
    for name, limit in (("late", 8.0), ("early", 3.0)):
        job = f"patch:{name}"
        mine = results.sweep(ours, job)
        goals.append((f"sweep, {name}: times faster than naive", ratio(results.sweep("hooks", job), mine), limit, True))
        goals.append(
            (f"sweep, {name}: times faster than the best other", ratio(results.best_peer(job), mine), limit, True)
        )
    for name, what, limit in (
        ("capture", "forward keeping all head outputs, in plain forwards", 1.05),
        ("nodes", "attribution of all heads, in plain forwards", 3.0),
        ("edges", "attribution of all edges, in plain forwards", 10.0),
    ):
        report = results.get(ours, f"{name}:late")
        goals.append((what, results.forwards(report) if report else None, limit, False))
    edges, plain = results.get(ours, "edges:late") or {}, results.get("hooks", "forward:late") or {}
    memory = ratio(edges.get("peak_bytes"), plain.get("peak_bytes"))
    goals.append(("attribution of all edges, peak memory against a plain forward's", memory, 2.0, False))
    return goals


def wanted_table(results: Results) -> str:
    """The goals, measured or not."""
    rows = []
    for what, value, limit, larger in wanted(results):
        met = "not measured" if value is None else "yes" if (value >= limit) == larger or value == limit else "**no**"
        rows.append([what, f"{'at least' if larger else 'at most'} {limit:g}", _number(value), met])
    return markdown(["", "wanted", "measured", "reached"], rows)


def render(work: Work, reports: Sequence[Report], peers_line: str) -> str:
    """The whole page."""
    heads = work.n_layers * work.n_heads
    scale = (heads + 2) / (len(work.heads) + 2)  # one forward a head, and the two runs every sweep starts from
    sampled = [r for r in reports if r["job"].startswith("patch") and not r.get("all_heads") and not work.complete]
    for report in sampled:
        report["scale"] = scale
    results = Results(reports)
    facts = next((r for r in reports if "machine" in r), {})
    machine = facts.get("machine", {})
    device = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('cores')} cores"
    versions: dict[str, str] = {}
    for report in reports:
        versions |= report.get("versions", {})
    loads = [r["machine"]["load_average"][0] for r in reports if "machine" in r]
    sets = work.sets
    n, length = len(sets["late"].clean), len(sets["late"].clean[0])
    lines = [
        f"# Benchmark: {work.model}, {work.dtype}, {device}",
        "",
        f"{n} prompt pairs of {length} tokens; {work.threads} threads; "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + f"; load average {min(loads, default=0):.2f} to {max(loads, default=0):.2f}, the jobs' own load included.",
        "",
        "Each job ran in a process of its own. Short jobs: medians. Peak memory is that of the job with weights and "
        "libraries; beside it the part above what was resident before the job. 'Max difference' is from the naive "
        "loop's numbers (edges: summed by sender, against the heads' scores). " + peers_line,
    ]
    if not work.complete:
        text = (
            f"Quick run: {len(work.heads)} of {heads} heads were patched where one forward a head is needed, and ratios"
        )
        lines += ["", f"**{text} take {scale:.1f} times as long for all of them. Not the benchmark.**"]
    for name in ("late", "early"):
        if not results.of(f"patch:{name}"):
            continue
        start = sets[name].first_difference
        where = f"pairs differing from token {start + 1} of {length}"
        lines += ["", f"## Exact patching of {len(work.heads)} heads, {where} (`{name}`)", ""]
        lines.append(sweep_table(results, f"patch:{name}"))
    lines += ["", "## Forward, capture, attribution", "", pass_table(results)]
    lines += ["", "## What was wanted", "", wanted_table(results), ""]
    return "\n".join(lines)
