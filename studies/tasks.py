"""Every built-in task on the default model: can it do it, and how small a circuit keeps it."""

from __future__ import annotations

from _page import estimate, run, table, write

TASKS = {
    "ioi": "",
    "greater-than": "",
    "docstring": "",
    "induction": "",
    "successor": "",
    "capital": "",
    "arithmetic": "",
    "colored-objects": "--anyway",
}


def main() -> None:
    """Runs everything (about a quarter of an hour on two cores) and writes docs/results/tasks.md."""
    rows = []
    for name, more in TASKS.items():
        command = f"circuit --task {name} --n 16 --prove-n 16 --compare none {more}".strip()
        s = run(command)
        size = f"{s['size']['heads']} of {s['total']['heads']} + {s['size']['mlps']} of {s['total']['mlps']}"
        line = [name, f"{s['accuracy']:.2f} ({s['chance']:.2f})", estimate(s["logit_diff"]), s["unit"], size]
        rows.append([*line, estimate(s["faithfulness"]), estimate(s["random"].get("high")), f"`vesalius {command}`"])
    header = [
        "task",
        "accuracy (chance)",
        "metric",
        "unit",
        "heads + MLPs",
        "faithfulness",
        "largest random",
        "command",
    ]
    write(
        "tasks",
        "Every task on SmolLM2-135M-Instruct",
        "python studies/tasks.py",
        "Exact activation patching (noising) on 16 prompts; the smallest circuit that reaches 0.85 there with at most "
        "a quarter of the heads, or the most faithful one; faithfulness on 16 held-out prompts, counterfactual "
        "ablation; the largest of ten random circuits of its size. A task that the model cannot do needs `--anyway`, "
        "and its circuit means little.",
        table(header, rows),
    )


if __name__ == "__main__":
    main()
