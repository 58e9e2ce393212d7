"""A step of each optimizer against torch's AdamW, on the same 10 M parameters and gradients.

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

LAYERS, WIDTH, VOCAB = 11, 256, 6144


class Shapes(nn.Module):
    """The tensors of a small decoder: 11 blocks of width 256 with norms and biases, tied embedding of 6144; 10.3 M."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList()
        for _ in range(LAYERS):
            attention = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
            mlp = [nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)]
            self.blocks.append(nn.ModuleList([*attention, *mlp, nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)]))


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW of torch, fused": ("adamw", {"fused": True}),
    "AdamW of torch, foreach": ("adamw", {"foreach": True}),
    "AdamW of torch, loop": ("adamw", {"foreach": False}),
    "SGD of torch, fused": ("sgdm", {}),
    "Adan, as chosen": ("adan", {}),
    "Adan, foreach": ("adan", {"foreach": True}),
    "SGD-SaI, as chosen": ("sgd-sai", {}),
    "SGD-SaI, foreach": ("sgd-sai", {"foreach": True}),
    "PaLM's Adafactor": ("palm", {}),
    "Adafactor of torch": ("adafactor", {}),
    "Conda, between bases": ("conda", {"period": 0}),
    "Muon of torch": ("muon", {}),
}


def make(name: str, chosen: dict[str, Any], device: str) -> torch.optim.Optimizer:
    """The optimizer on a model of its own, with gradients; the same for all."""
    torch.manual_seed(0)
    model = Shapes().to(device)
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


def report(device: str, rounds: int, periods: list[int]) -> str:
    """Both tables."""
    meter = Meter(device)
    made = {row: make(name, chosen, device) for row, (name, chosen) in ROWS.items()}
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
        size = state_bytes(optimizer)
        rows.append([row, f"{1e3 * wall:.2f}", *ratios, f"{size / MB:.1f}", f"{size / (4 * parameters):.2f}"])
    header = ["", "ms a step", "x fused", "x foreach", "x loop", "state MB", "state / parameters"]
    facts = machine(device)
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    busiest = max(others for _, others in times.values())
    lines = [
        f"# A step on {parameters / 1e6:.1f} M parameters, {where}",
        "",
        f"torch {versions('torch')['torch']}, {torch.get_num_threads()} threads, medians of {rounds} rounds taken in "
        f"turns; others used up to {busiest:.1f} cores.",
        "",
        markdown(header, rows),
        "",
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
