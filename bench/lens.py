"""Training a tuned lens: tokens a second and peak memory, against the plain way of doing it.

    python -m bench.lens [--rounds 3] [--steps 6] [--rows 2] [--length 128] [--model NAME] [--device cuda]

The same model reads the same random tokens; all layers' translators (full matrices, from zero) are trained on the same
states with AdamW. The plain way asks transformers for hidden states, and for one layer after another takes logits over
the whole vocabulary, log-softmax, KL and a backward pass. Vesalius runs once with the whole vocabulary, which is the
same arithmetic (the last KLs must agree), and once as it comes, with 4096 words standing for the vocabulary, which is
an estimate and marked as such. Every engine runs in a process of its own, in turns; speed is the median over all steps
but the first, memory the largest resident set after loading (on a GPU, the largest allocation).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.measure import MB, Meter, machine, versions
from bench.suite import refuse_if_busy
from bench.table import markdown

ENGINES = {
    "plain": "hidden states and a loop over layers",
    "vesalius": "Vesalius, whole vocabulary",
    "estimate": "Vesalius as it comes (4096 words)",
}
LR, BETAS, DECAY, WARM_UP = 1e-3, (0.9, 0.999), 1e-3, 1
SHOWN = 20_000  # ids drawn below SHOWN, where every vocabulary has words


@dataclass
class Rows:
    """Random tokens as a source of batches."""

    rows: int
    length: int
    vocab_size: int
    fingerprint: str = "random"

    def batch(self, step: int) -> Any:
        """The rows of a step."""
        from vesalius.corpus.batches import Batch

        rng = np.random.default_rng([0, step])
        ids = rng.integers(3, min(SHOWN, self.vocab_size), (self.rows, self.length + 1))
        return Batch(step, ids, np.zeros_like(ids))

    def describe(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}


def plain(model: Any, source: Rows, steps: int) -> Callable[[int], float]:
    """One step of what one writes without a library; gives its mean KL."""
    hf = model.hf
    norm, head = model.anatomy.main.final_norm.module, model.anatomy.main.head[-1]
    layers, d = model.n_layers, model.d_model
    maps = nn.ModuleList(nn.Linear(d, d) for _ in range(layers)).to(model.device)
    for module in maps:
        nn.init.zeros_(module.weight)  # type: ignore[arg-type]
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    matrices = [p for p in maps.parameters() if p.dim() > 1]
    vectors = [p for p in maps.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def step(number: int) -> float:
        ids = torch.from_numpy(source.batch(number).ids[:, :-1].copy()).to(model.device)
        with torch.no_grad():
            out = hf(ids, output_hidden_states=True)
            log_p = out.logits[:, 1:].flatten(0, 1).float().log_softmax(-1)
        total = 0.0
        for layer, module in enumerate(maps):
            h = out.hidden_states[layer][:, 1:].flatten(0, 1)
            log_q = head(norm(h + module(h))).float().log_softmax(-1)
            kl = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
            kl.backward()
            total += float(kl.detach())
        adam.step()
        adam.zero_grad()
        return total / layers

    return step


def ours(model: Any, source: Rows, steps: int, words: int | None) -> Callable[[int], float]:
    """One step of the trainer; gives its mean KL."""
    from vesalius.lens import TunedLens
    from vesalius.lens.objective import Reader, objective_for
    from vesalius.train import Trainer, World, make_optimizer

    lens = TunedLens.for_model(model)
    reader = Reader(lens, model)
    objective = objective_for(reader, source.rows * source.length, words)
    optimizer = make_optimizer("adamw", lens, lr=LR, betas=BETAS, weight_decay=DECAY)
    trainer = Trainer(reader, source, objective, optimizer, clip=None, world=World.single(model.device))
    return lambda number: trainer.step().loss / model.n_layers


def work(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one engine in this process."""
    import vesalius

    model = vesalius.open(args.model, device=args.device)
    source = Rows(args.rows, args.length, int(model.hf.config.vocab_size))
    if engine == "plain":
        step = plain(model, source, args.steps)
    else:
        step = ours(model, source, args.steps, 4096 if engine == "estimate" else None)
    meter = Meter(args.device)
    rest = meter.rest_bytes()
    meter.reset()
    samples, kl = [], []
    for number in range(args.steps):
        value, wall, _, others = meter.once(lambda n=number: step(n))  # type: ignore[misc]
        kl.append(value)
        samples.append((wall, others))
    return {
        "engine": engine,
        "walls": [w for w, _ in samples[WARM_UP:]],
        "others": max(o for _, o in samples),
        "peak_bytes": meter.peak_bytes(),
        "rest_bytes": rest,
        "kl": kl,
        "layers": model.n_layers,
        "vocabulary": int(model.hf.config.vocab_size),
    }


def report(found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The table."""
    states = args.rows * (args.length - 1)
    tokens = args.rows * args.length
    base = statistics.median(w for r in found if r["engine"] == "plain" for w in r["walls"])
    rows = []
    for engine, name in ENGINES.items():
        mine = [r for r in found if r["engine"] == engine]
        wall = statistics.median(w for r in mine for w in r["walls"])
        peak, rest = (statistics.median(r[k] for r in mine) / MB for k in ("peak_bytes", "rest_bytes"))
        rows.append(
            [name, f"{tokens / wall:.0f}", f"{wall:.2f}", f"{base / wall:.2f}", f"{peak:.0f}", f"{peak - rest:.0f}",
             f"{mine[0]['kl'][-1]:.4f}"]
        )  # fmt: skip
    facts = machine(args.device)
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    first = found[0]
    lines = [
        f"# Training a tuned lens of {args.model}, {where}",
        "",
        f"{first['layers']} translators, {states} states a step, vocabulary {first['vocabulary']:,}; torch "
        f"{versions('torch')['torch']}, {args.threads} threads; {args.rounds} rounds of {args.steps} steps in turns; "
        f"others used up to {max(r['others'] for r in found):.1f} cores.",
        "",
        markdown(
            ["", "tokens/s", "s a step", "x plain", "peak MB", "of it above the loaded model", "last mean KL"], rows
        ),
        "",
        "The first two do the same arithmetic; the third estimates the sum over the vocabulary.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    from bench.measure import cores

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=cores())
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--rows", type=int, default=2)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--force", action="store_true", help="time also on a busy machine")
    options.add_argument("--worker", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of lens.md")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(work(args.worker, args)))
        return 0
    refuse_if_busy(args.force)
    found = []
    for _ in range(args.rounds):
        for engine in ENGINES:
            began = time.monotonic()
            command = [sys.executable, "-m", "bench.lens", "--worker", engine, *sys.argv[1:]]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{engine}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    same = {r["engine"]: r["kl"] for r in found}
    if not np.allclose(same["plain"], same["vesalius"], rtol=2e-3):
        print(f"plain and Vesalius did not do the same work: {same['plain']} and {same['vesalius']}", file=sys.stderr)
        return 1
    text = report(found, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lens.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
