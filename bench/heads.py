"""Every head by seven attention detectors and one of needles: one shared sweep against each detector on its own.

    python -m bench.heads [--model smollm2-135m] [--rounds 3] [--device cpu]

The plain way: for each detector a forward pass of its prompts and of its shuffled ones with `output_attentions=True`
(patterns of all blocks kept at once, as transformers hands them out), then the same sums; for needles `generate` with
attentions of prompt and steps. Both are given the same prompts and the same permutation tests. Engines take turns, each
in a process of its own; results are compared number by number.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vesalius
from bench.measure import MB, Meter, machine
from bench.table import markdown
from vesalius.find.detectors import HeadContext, detect
from vesalius.find.detectors.base import ask
from vesalius.find.detectors.looks import Look, by_row
from vesalius.find.detectors.needles import EXTRA, RECALL, make_needles, recall
from vesalius.find.detectors.ngrams import ORDERS
from vesalius.find.detectors.repeats import looks_on_repeats
from vesalius.find.detectors.retrieval import hits, of_needles
from vesalius.find.detectors.significance import exchange
from vesalius.find.detectors.stimuli import (
    REPEATED_LENGTH,
    REPEATED_ROWS,
    STRING_LENGTH,
    STRING_ROWS,
    after_ngram,
    repeated,
    strings,
    unrepeated,
)
from vesalius.model import Model

REPEATS = ("previous-token", "duplicate-token", "induction")
NGRAMS = tuple(f"{n}-gram" for n in ORDERS)
NEEDLES, LENGTH = 4, 256
ENGINES = {"plain": "each detector on its own, output_attentions", "vesalius": "Vesalius, one shared sweep"}
Result = dict[str, list[float]]


def look_of(model: Model, name: str) -> tuple[torch.Tensor, Look]:
    """A detector's prompts, its shuffled ones after them, and where it looks."""
    if name in REPEATS:
        ids = repeated(model, 0, REPEATED_ROWS, REPEATED_LENGTH)
        return torch.cat([ids, unrepeated(ids)]), looks_on_repeats(len(ids), ids.shape[1], seed=0)[name]
    ids = strings(model, 0, STRING_ROWS, STRING_LENGTH).ids
    others = torch.tensor([[r for r in range(len(ids)) if r != row] for row in range(len(ids))])
    return ids, Look.of(after_ngram(ids, int(name[0]))).in_prompts(others)


def plain(model: Model) -> Result:
    """Each detector on its own, by transformers' `output_attentions`."""
    hf, found = model.hf, {}
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        for name in (*REPEATS, *NGRAMS):
            ids, look = look_of(model, name)
            patterns = hf(input_ids=ids.to(model.device), output_attentions=True, use_cache=False).attentions
            each, chance = [], []
            for pattern in patterns:
                x = pattern.float().cpu()
                each.append(by_row(x[look.rows, :, look.queries, look.keys] * look.weights[:, None], look).T)
                there = x[look.other_rows, :, look.queries[:, None], look.other_keys] * look.weights[:, None, None]
                chance.append(by_row(there, look).permute(2, 0, 1))
            values, null = torch.cat(each).numpy(), torch.cat(chance).numpy()
            exchange(values, null, 0)
            found[name] = np.nanmean(values, axis=1).tolist()
        found["retrieval"] = plain_needles(model)
    return found


def plain_needles(model: Model) -> list[float]:
    """By `generate`, whose attentions cover the prompt too."""
    scores = []
    for needle in make_needles(model, NEEDLES, (LENGTH,)):
        ids = torch.tensor([needle.ids]).to(model.device)
        steps = len(needle.answer) + EXTRA
        out: Any = model.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
            output_attentions=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        tokens = out.sequences[0, ids.shape[1] :].cpu()
        best = torch.stack([torch.cat([p[0, :, -1].argmax(-1) for p in step]) for step in out.attentions]).cpu()
        if recall(model, needle, tokens.tolist()) > RECALL:
            scores.append(hits(needle, tokens, best))
    return np.mean(scores, axis=0).tolist() if scores else []


def shared(model: Model) -> Result:
    """All of them by `detect`, and needles by the detector's own decoding."""
    found = detect(model, [*REPEATS, *NGRAMS])
    result = {name: scores.values.tolist() for name, scores in found.scores.items()}
    needles = make_needles(model, NEEDLES, (LENGTH,))
    result["retrieval"] = of_needles(model, needles, HeadContext()).values.tolist()
    return result


def one(engine: str, spec: str, device: str) -> dict[str, Any]:
    """What one process measured."""
    model = vesalius.open(spec, device=device)
    ask("arithmetic", model, HeadContext(), n=2)  # warm-up
    meter = Meter(device)
    meter.reset()
    rest = meter.rest_bytes()
    work = {"plain": plain, "vesalius": shared}[engine]
    result, wall, cpu, others = meter.once(lambda: work(model))
    return {"wall": wall, "cpu": cpu, "others": others, "peak": meter.peak_bytes() - rest, "result": result}


def render(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    """The Markdown table."""
    first = {engine: runs[0]["result"] for engine, runs in found.items()}
    apart = max(
        float(np.abs(np.array(first["plain"][k]) - np.array(first["vesalius"][k])).max()) for k in first["plain"]
    )
    rows = []
    base = statistics.median(r["cpu"] for r in found["plain"])
    for engine, runs in found.items():
        wall, cpu = (statistics.median(r[k] for r in runs) for k in ("wall", "cpu"))
        peak = max(r["peak"] for r in runs) / MB
        rows.append([ENGINES[engine], f"{wall:.1f}", f"{cpu:.1f}", f"{base / cpu:.1f}", f"{peak:,.0f}"])
    facts = machine(args.device)
    names = ", ".join(next(iter(first.values())))
    busiest = max(r["others"] for runs in found.values() for r in runs)
    return "\n".join(
        [
            f"# Head detectors over every head of {args.model}, {facts.get('gpu') or facts['cpu']}",
            "",
            f"{names}; medians of {args.rounds} processes each, in turns, {torch.get_num_threads()} threads; others "
            f"used up to {busiest:.1f} cores. Memory is what was added to the loaded model. Largest difference of a "
            f"score: {apart:.1e}.",
            "",
            markdown(["", "seconds", "CPU seconds", "times as fast (CPU)", "peak MB"], rows),
            "",
        ]
    )


def main() -> int:
    """Command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, default=Path("bench/out"))
    options.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.engine:
        print(json.dumps(one(args.engine, args.model, args.device)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for _ in range(args.rounds):
        for engine in ENGINES:
            command = [sys.executable, "-m", "bench.heads", "--engine", engine, "--model", args.model]
            done = subprocess.run([*command, "--device", args.device], stdout=subprocess.PIPE, text=True, check=True)
            found[engine].append(json.loads(done.stdout.splitlines()[-1]))
    text = render(found, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heads.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
