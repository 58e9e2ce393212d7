"""Every built-in task on the default model: how often it prefers the right answer."""

from __future__ import annotations

from _page import estimate, table, write

import vesalius
from vesalius.tasks import TASKS
from vesalius.tasks.performance import performance

N = 64
VARIANTS = {
    "ioi": ({}, {"corruption": "abc"}),
    "arithmetic": ({}, {"operation": "subtract"}),
    "successor": ({"kind": "days"}, {"kind": "months"}, {"kind": "numbers"}, {"kind": "letters"}),
}


def main() -> None:
    """Takes about two minutes on two cores and writes docs/results/tasks.md."""
    model = vesalius.open("smollm2-135m")
    rows = []
    for entry in TASKS:
        for params in VARIANTS.get(entry.name, ({},)):
            pairs = vesalius.task(entry.name, n=N, seed=0, **params).pairs(model)
            found = performance(model, pairs)
            what = ", ".join(f"{k}={v}" for k, v in params.items())
            top = "-" if found.top1 is None else f"{found.top1:.2f}"
            clean, corrupted = found.estimate("clean"), found.estimate("corrupted")
            line = [entry.name, what, f"{found.accuracy:.2f}", f"{found.chance:.2f}", top]
            rows.append([*line, estimate(clean), estimate(corrupted), pairs.metric.unit])
    write(
        "tasks",
        "Every task on SmolLM2-135M-Instruct",
        "python studies/tasks.py",
        f"{N} prompts of each. Accuracy is the share on which a right answer is preferred to all wrong ones; top-1 the "
        "share on which it is the likeliest token of all. A circuit for a task that the model cannot do means nothing: "
        "below 0.7 `vesalius circuit` stops unless told `--anyway`.",
        table(["task", "parameters", "accuracy", "chance", "top-1", "metric, clean", "corrupted", "unit"], rows),
    )


if __name__ == "__main__":
    main()
