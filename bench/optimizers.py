"""A step of each optimizer against torch's AdamW, on the same parameters, few and as many as a real model has.

    python -m bench.optimizers [--device cuda] [--rounds 15] [--periods 1,20,200,2000]

The optimizers take turns, round by round, so that what else the machine does falls on all of them; the table gives
medians. Conda's new basis is timed apart, and spread over its period. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.measure import MB, Meter, machine, summary, versions
from bench.table import markdown
from vesalius.train.optimizers import make_optimizer, state_bytes

# layers, width, vocabulary. Small: every matrix fits a cache. Large: matrices of SmolLM2-135M, 6 of its 30 layers
SIZES = {"small": (11, 256, 6144), "large": (6, 576, 49152)}


class Shapes(nn.Module):
    """The tensors of a decoder: blocks with norms and biases, tied embedding."""

    def __init__(self, size: str) -> None:
        super().__init__()
        layers, width, vocabulary = SIZES[size]
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            attention = [nn.Linear(width, width) for _ in range(4)]
            mlp = [nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
            self.blocks.append(nn.ModuleList([*attention, *mlp, nn.LayerNorm(width), nn.LayerNorm(width)]))


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW of torch, fused": ("adamw", {"fused": True}),
    "AdamW of torch, foreach": ("adamw", {"foreach": True}),
    "AdamW of torch, loop": ("adamw", {"foreach": False}),
    "SGD of torch, fused": ("sgdm", {}),
    "Adan, as chosen": ("adan", {}),
    "Adan, foreach": ("adan", {"foreach": True}),
    "Adan, fused": ("adan", {"fused": True}),
    "SGD-SaI, as chosen": ("sgd-sai", {}),
    "SGD-SaI, foreach": ("sgd-sai", {"foreach": True}),
    "PaLM's Adafactor": ("palm", {}),
    "Adafactor of torch": ("adafactor", {}),
    "Conda, between bases": ("conda", {"period": 0}),
    "Muon of torch": ("muon", {}),
}
LARGE = [row for row in ROWS if row.split(",")[0] in ("AdamW of torch", "Adan", "SGD-SaI")]  # what memory holds at once


def make(name: str, chosen: dict[str, Any], device: str, size: str = "small") -> torch.optim.Optimizer:
    """The optimizer on a model of its own, with gradients; the same for all."""
    torch.manual_seed(0)
    model = Shapes(size).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-2
    if name == "adamw" and "foreach" in chosen:
        return torch.optim.AdamW(model.parameters(), foreach=bool(chosen["foreach"]), fused=False)
    return make_optimizer(name, model, **chosen)


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, meter: Meter) -> dict[str, tuple[float, float]]:
    """Median wall seconds of each call, and the most cores that others used meanwhile."""
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _, wall, cpu, others = meter.once(call)
            samples[name].append((wall, cpu, others))
    found = {name: summary(s) for name, s in samples.items()}
    return {name: (t.wall_s, t.others_cores) for name, t in found.items()}


def steps_table(size: str, device: str, rounds: int, meter: Meter) -> tuple[str, dict[str, tuple[float, float]]]:
    """A heading and a table of steps on one size, and the times."""
    chosen = ROWS if size == "small" else {row: ROWS[row] for row in LARGE}
    made = {row: make(name, options, device, size) for row, (name, options) in chosen.items()}
    for optimizer in made.values():
        for _ in range(2):
            optimizer.step()
    times = interleaved({row: o.step for row, o in made.items()}, rounds, meter)
    parameters = sum(p.numel() for g in made["Adan, as chosen"].param_groups for p in g["params"])
    against = ["AdamW of torch, fused", "AdamW of torch, foreach", "AdamW of torch, loop"]
    rows = []
    for row, optimizer in made.items():
        wall = times[row][0]
        ratios = [f"{wall / times[base][0]:.2f}" for base in against]
        held = state_bytes(optimizer)
        rows.append([row, f"{1e3 * wall:.2f}", *ratios, f"{held / MB:.1f}", f"{held / (4 * parameters):.2f}"])
    header = ["", "ms a step", "x fused", "x foreach", "x loop", "state MB", "state / parameters"]
    layers, width, vocabulary = SIZES[size]
    busiest = max(others for _, others in times.values())
    head = f"## {parameters / 1e6:.1f} M parameters: {layers} layers of {width}, {vocabulary:,} words"
    told = f"Medians of {rounds} rounds taken in turns; others used up to {busiest:.1f} cores."
    return "\n".join([head, "", told, "", markdown(header, rows), ""]), times


def report(device: str, rounds: int, periods: list[int]) -> str:
    """All tables."""
    meter = Meter(device)
    facts = machine(device)
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    small, times = steps_table("small", device, rounds, meter)
    large, _ = steps_table("large", device, rounds, meter)
    lines = [
        f"# A step of each optimizer, {where}",
        "",
        f"torch {versions('torch')['torch']}, {torch.get_num_threads()} threads.",
        "",
        small,
        large,
        "## Conda's bases",
        "",
        conda_table(device, periods, times, meter),
    ]
    return "\n".join(lines)


def conda_table(device: str, periods: list[int], times: dict[str, tuple[float, float]], meter: Meter) -> str:
    """What a new basis for every matrix costs, and a step with it spread over the period."""
    renewing = make("conda", {"period": 1}, device)
    renewing.step()
    walls = sorted(meter.once(renewing.step)[1] for _ in range(3))
    plain, base = times["Conda, between bases"][0], times["AdamW of torch, fused"][0]
    bases = walls[1] - plain
    rows = []
    for period in periods:
        mean = plain + bases / period
        rows.append(
            [
                str(period),
                f"{1e3 * bases:.0f}",
                f"{1e3 * bases / period:.2f}",
                f"{1e3 * mean:.2f}",
                f"{mean / base:.1f}",
            ]
        )
    return markdown(["period", "ms for all bases", "ms a step for them", "ms a step in all", "x AdamW fused"], rows)


def main() -> int:
    """Command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--periods", default="1,20,200,2000")
    args = options.parse_args()
    print(report(args.device, args.rounds, [int(p) for p in args.periods.split(",")]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
