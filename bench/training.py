"""`make bench-train`: tokens a second and peak memory of training, against a plain loop and Hugging Face's Trainer.

    python -m bench.training [--steps 40] [--size 6x256] [--device cuda]

The same stock GPT-NeoX from the same seed reads the same batches with AdamW, clipping at 1.0 and a cosine schedule.
Every engine has a process of its own, and they take turns step by step, so that a machine whose speed drifts slows all
of them alike. Speed is the median over all steps but the first five, and the ratio the median of the ratios within each
turn; memory is the largest resident set (on a GPU, the largest allocation). That all did the same work is checked by
their last losses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import MB, peak_rss_bytes

ENGINES = {"plain": "plain PyTorch loop (60 lines)", "vesalius": "Vesalius", "hf": "Hugging Face Trainer"}
VOCABULARY, LENGTH, ROWS, WARM_UP, LR = 4096, 128, 16, 5, 1e-3


def model_of(size: str, device: str) -> Any:
    """A stock GPT-NeoX; the same weights every time."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    layers, width = map(int, size.split("x"))
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, max_position_embeddings=LENGTH, rotary_pct=0.25, use_cache=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).to(device)


def rows_of(steps: int) -> Tensor:
    """Token rows of all steps, (step, row, LENGTH + 1)."""
    return torch.randint(VOCABULARY, (steps, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def factor(step: int, steps: int) -> float:
    """Cosine to a tenth, without warm-up."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))


class Turns:
    """A process's turns: it waits for a line before each step and says when the step is done."""

    def __enter__(self) -> None:
        sys.stdin.readline()

    def __exit__(self, *_: object) -> None:
        print("done", flush=True)


TURN = Turns()


# -- the plain loop: what one writes without a library


def plain(size: str, steps: int, device: str) -> tuple[list[float], float]:
    """Seconds of each step, and the last loss."""
    model = model_of(size, device).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    data = rows_of(steps)
    seconds, loss = [], torch.zeros(())
    for step in range(steps):
        with TURN:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = LR * factor(step, steps)
            rows = data[step].to(device)
            logits = model(input_ids=rows[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = loss.item()
            seconds.append(time.perf_counter() - began)
    return seconds, last


# -- ours


class Rows:
    """The rows as a source of batches."""

    fingerprint, vocab_size, rows, length = "bench", VOCABULARY, ROWS, LENGTH

    def __init__(self, steps: int) -> None:
        self.data = rows_of(steps).numpy()

    def batch(self, step: int) -> Any:
        import numpy as np

        from vesalius.corpus.batches import Batch

        ids = self.data[step]
        return Batch(step, ids, np.zeros_like(ids))

    def describe(self) -> dict[str, Any]:
        return {"bench": True}


def vesalius(size: str, steps: int, device: str, exact: bool = False) -> tuple[list[float], float]:
    """The same by our trainer, with its step's log."""
    from vesalius.train.objectives import Needs, make_objective
    from vesalius.train.optimizers import make_optimizer
    from vesalius.train.trainer import Trainer, deterministic

    model = model_of(size, device)
    optimizer = make_optimizer("adamw", model, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, no_decay=("vector",))
    objective = make_objective("causal-lm", Needs(VOCABULARY))
    trainer = Trainer(model, Rows(steps), objective, optimizer, lambda s: factor(s, steps))
    logs, made = [], trainer.steps(steps)
    with deterministic(exact):
        for _ in range(steps):
            with TURN:
                logs.append(next(made))
    return [log.seconds for log in logs], logs[-1].loss


# -- Hugging Face


def hf(size: str, steps: int, device: str) -> tuple[list[float], float]:
    """The same by transformers' Trainer, its reporting and saving turned off."""
    import tempfile

    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = rows_of(steps).flatten(0, 1)
    times: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            TURN.__enter__()
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()
            TURN.__exit__()

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            losses.extend([logs["loss"]] if logs and "loss" in logs else [])

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(data)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **__: Any) -> Any:
            rows = inputs["rows"]
            logits = model(input_ids=rows[:, :-1]).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=steps, learning_rate=LR, weight_decay=0.1,
            adam_beta2=0.95, max_grad_norm=1.0, lr_scheduler_type="constant", optim="adamw_torch_fused",
            logging_steps=1, logging_first_step=True, report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=device == "cpu", dataloader_pin_memory=False, remove_unused_columns=False,
        )  # fmt: skip
        trainer = InOrder(
            model=model_of(size, device),
            args=arguments,
            train_dataset=[{"rows": row} for row in data],
            data_collator=lambda items: {"rows": torch.stack([i["rows"] for i in items])},
            callbacks=[Watch()],
        )
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda s: factor(s, steps))
        trainer.train()
    return times, losses[-1]


# -- running them in turns


def one(engine: str, size: str, steps: int, device: str, exact: bool) -> dict[str, Any]:
    """What one process measured."""
    run: Callable[..., tuple[list[float], float]] = {"plain": plain, "hf": hf, "vesalius": vesalius}[engine]
    seconds, loss = run(size, steps, device, **({"exact": exact} if engine == "vesalius" else {}))
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_rss_bytes()
    return {"seconds": seconds[WARM_UP:], "loss": loss, "peak": peak}


def main() -> int:
    """Command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=40, help="steps of each engine")
    options.add_argument("--size", default="6x256", help="layers x width")
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, default=Path("bench/out"))
    options.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    options.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.engine:
        print(json.dumps(one(args.engine, args.size, args.steps, args.device, args.exact)))
        return 0
    found = in_turns(args)
    text = render(found, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "training.md").write_text(text)
    print(text)
    return 0


def in_turns(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What every engine measured, all alive at once and stepping one after the other."""
    processes = {}
    for label in (*ENGINES, "exact"):
        command = [sys.executable, "-m", "bench.training", "--engine", "vesalius" if label == "exact" else label]
        command += ["--steps", str(args.steps), "--size", args.size, "--device", args.device]
        command += ["--exact"] if label == "exact" else []
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # who waits does not spin
        processes[label] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    for _ in range(args.steps):
        for label, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            while (line := process.stdout.readline()) != "done\n":
                if not line:
                    raise SystemExit(f"the engine '{label}' ended early")
    found = {}
    for label, process in processes.items():
        assert process.stdout is not None
        found[label] = json.loads(process.stdout.read().splitlines()[-1])
        process.wait()
    return found


def render(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """The Markdown table."""
    tokens = ROWS * LENGTH
    plain_seconds = found["plain"]["seconds"]
    lines = [
        f"# Training GPT-NeoX {args.size}, vocabulary {VOCABULARY}, {ROWS} x {LENGTH} tokens a step, {args.device}",
        "",
        f"Median of {args.steps - WARM_UP} steps taken in turns, torch {torch.__version__}, {torch.get_num_threads()} "
        "threads; the ratio is the median of the turns' own, with its quartiles.",
        "",
        "| | tokens/s | of the plain loop | peak MB | last loss |",
        "|---|---|---|---|---|",
    ]
    names = {**ENGINES, "exact": "Vesalius, deterministic mode (its default on a CPU)"}
    for label, run in found.items():
        speed = tokens / statistics.median(run["seconds"])
        low, ratio, high = statistics.quantiles(
            [p / s for p, s in zip(plain_seconds, run["seconds"], strict=True)], n=4, method="inclusive"
        )
        told = "1.000" if label == "plain" else f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {names[label]} | {speed:,.0f} | {told} | {run['peak'] / MB:,.0f} | {run['loss']:.6f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
