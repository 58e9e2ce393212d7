"""Time, memory and the state of the machine."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
MB = 1_000_000


def _status_bytes(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> bool:
    """Forgets the peak so far (Linux only); False where that cannot be done, and the peak then includes loading."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started, or since `reset_peak`.

    The kernel's high-water mark is preferred to getrusage, whose figure a child inherits from its parent.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats of one job; `others_cores` is what other processes used meanwhile."""

    wall_s: float
    cpu_s: float
    others_cores: float
    repeats: int
    wall_all_s: list[float]


class Meter:
    """Times calls on a device, waiting for queued work before and after."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def _sync(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def once(self, call: Callable[[], T]) -> tuple[T, float, float, float]:
        """The result, wall seconds, CPU seconds of this process, and cores used by other processes."""
        self._sync()
        busy, cpu, wall = _busy_seconds(), time.process_time(), time.perf_counter()
        result = call()
        self._sync()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        others = max(0.0, _busy_seconds() - busy - cpu) / max(wall, 1e-9)
        return result, wall, cpu, others

    def reset(self) -> bool:
        """Forgets the memory peak of the device in use."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return True
        return reset_peak()

    def peak_bytes(self) -> int:
        """Peak memory of the device in use: of the GPU's allocator, or resident memory."""
        if self.cuda:
            import torch

            return int(torch.cuda.max_memory_allocated())
        return peak_rss_bytes()

    def rest_bytes(self) -> int:
        """Memory in use now: weights and libraries before a job starts."""
        if self.cuda:
            import torch

            return int(torch.cuda.memory_allocated())
        return rss_bytes()


def summary(samples: list[tuple[float, float, float]]) -> Timing:
    """Medians of (wall, cpu, others) samples."""
    wall, cpu, others = (list(column) for column in zip(*samples, strict=True))
    return Timing(statistics.median(wall), statistics.median(cpu), max(others), len(wall), wall)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def busy_cores(seconds: float = 2.0) -> float:
    """How many cores other processes keep busy right now, watched for that long."""
    before, start = _busy_seconds(), time.perf_counter()
    time.sleep(seconds)
    return (_busy_seconds() - before) / (time.perf_counter() - start)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def machine(device: str) -> dict[str, Any]:
    """Facts about the machine that decide the numbers."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    facts: dict[str, Any] = {
        "cpu": name,
        "cores": cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }
    if device.startswith("cuda"):
        import torch

        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions(*names: str) -> dict[str, str]:
    """Installed versions of these packages, those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
