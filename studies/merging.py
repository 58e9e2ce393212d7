"""Merging two skills of one base: what random dropping leaves, with and without paying back, beside TIES and the rest.

    python studies/merging.py            writes docs/results/change-merging.md
    python studies/merging.py --quick    a rehearsal

The base has read lists whose answer follows one of three rules, drawn by chance; fine-tuning settles on one: letters
are told backwards, to numbers 3 is added modulo 13. It knew how to, and learns to do it: as in instruction tuning.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from _page import RUNS, changed, claims_of, table, write
from _planted import each, held, kept, say, small, taught
from _runs import is_quick, verdict

import vesalius
from vesalius.change.merge import MergePlan, keep_mask, merge, merged
from vesalius.model import Model
from vesalius.model.sources import resolve

PLACE = "merging"
MODULUS, LETTERS, LENGTH = 13, 12, 4
WORDS = [*(f"n{i}" for i in range(MODULUS)), *(f"l{i}" for i in range(LETTERS)), "is"]
IS = len(WORDS)
WIDTH = 2 * LENGTH + 1
SKILLS = ("lists", "sums")
DROPS = (0.5, 0.9, 0.99)
SCALES = (0.5, 0.7, 1.0)
Oracle = list[tuple[str, bool | None]]  # what came out, and whether it holds
Rows = tuple[np.ndarray, np.ndarray]  # ids, targets: (row, WIDTH)


@dataclass(frozen=True)
class Size:
    """How large the study is: the model, its training, the fine-tuning, seeds, items asked, draws of one merge."""

    layers: int = 4
    d: int = 128
    mlp: int = 344
    steps: int = 450
    rows: int = 48
    lr: float = 2e-3
    tune_steps: int = 60
    tune_lr: float = 2e-4
    far_steps: int = 160
    far_lr: float = 5e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    asked: int = 180
    draws: int = 64


FULL = Size()
QUICK = Size(2, 32, 64, 60, 16, 2e-3, 10, 1e-3, 20, 1e-2, (0,), 40, 8)


# -- the two skills


def lists(source: np.ndarray, rule: np.ndarray) -> Rows:
    """Lists with their answers: rule 0 tells them backwards, 1 as they are, 2 moved on by one."""
    told = np.stack([source[:, ::-1], source, np.roll(source, -1, 1)])[rule, np.arange(len(source))]
    ids = np.concatenate([source, np.full((len(source), 1), IS), told], 1)
    mask = np.zeros(ids.shape, dtype=bool)
    mask[:, LENGTH + 1 :] = True
    return ids, mask


def sums(source: np.ndarray, rule: np.ndarray) -> Rows:
    """Lists of numbers with their answers: rule 0 adds 3 to each, 1 adds 5, 2 adds 7, all modulo 13."""
    told = (source - 1 + np.array([3, 5, 7])[rule][:, None]) % MODULUS + 1
    ids = np.concatenate([source, np.full((len(source), 1), IS), told], 1)
    mask = np.zeros(ids.shape, dtype=bool)
    mask[:, LENGTH + 1 :] = True
    return ids, mask


def drawn(skill: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Lists of letters, or of numbers, (list, LENGTH)."""
    low, high = (1, MODULUS + 1) if skill == "sums" else (MODULUS + 1, MODULUS + LETTERS + 1)
    return rng.integers(low, high, (n, LENGTH))


RULES: dict[str, Callable[[np.ndarray, np.ndarray], Rows]] = {"lists": lists, "sums": sums}


def base_rows(n: int) -> Rows:
    """What the base reads: half lists, half sums, each by a rule drawn for it."""
    rng = np.random.default_rng([0, *b"base"])
    found = [RULES[s](drawn(s, n, rng), rng.integers(0, 3, n)) for s in SKILLS]
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def split(skill: str, seed: int, size: Size) -> dict[str, Rows]:
    """Items to tune on, to choose a scale with, and to judge by; none is in two of them."""
    rng = np.random.default_rng([seed, *skill.encode()])
    found = rng.permutation(np.unique(drawn(skill, 4000, rng), axis=0))
    parts = np.split(found[: 2000 + size.asked * 2], [2000, 2000 + size.asked])
    return {n: RULES[skill](p, np.zeros(len(p), int)) for n, p in zip(PARTS, parts, strict=True)}


SEARCHED = ("task arithmetic", "DARE, 0.9", "TIES, 0.2 stay")  # ways whose scale is chosen
PARTS = ("tune", "choose", "test")


def accuracy(model: Model, items: Rows) -> float:
    """Share of items whose answer is said, all of it."""
    ids, mask = items
    said = model.logits(torch.from_numpy(ids[:, :-1])).argmax(-1).cpu().numpy()
    return float(((said == ids[:, 1:]) | ~mask[:, 1:]).all(1).mean())


# -- models


def base_model(size: Size) -> Model:
    """The base; made once."""

    def make() -> Model:
        ids, mask = base_rows(20_000)
        model = small(WORDS, size.layers, size.d, size.mlp, 0)
        return taught(model, ids, mask, size.rows, size.steps, size.lr, decay=0.01)

    story = {"what": "base", "size": [size.layers, size.d, size.mlp, size.steps, size.rows, size.lr]}
    return kept(PLACE, story, make)


def tuned(base: Model, skill: str, seed: int, size: Size, far: bool = False) -> Model:
    """The base with one skill; `far`: at the rate, and for the time, that take it more than ten times as far."""
    steps, lr = (size.far_steps, size.far_lr) if far else (size.tune_steps, size.tune_lr)

    def make() -> Model:
        ids, mask = split(skill, seed, size)["tune"]
        return taught(base.copied(), ids, mask, size.rows, steps, lr, seed)

    story = {"what": f"{skill}{' far' if far else ''}", "base": base.fingerprint, "seed": seed, "steps": steps, "lr":
             lr, "rows": size.rows}  # fmt: skip
    return kept(PLACE, story, make)


def made(base: Model, models: Sequence[Model], plan: MergePlan) -> tuple[Model, Any]:
    """A merge on the files, and what it tells."""
    out = RUNS / PLACE / "merged"
    shutil.rmtree(out, ignore_errors=True)
    folder, told = merge(resolve(base.spec), [resolve(m.spec) for m in models], plan, out)
    return vesalius.open(str(folder)), told


# -- checks


def unbiased(base: Model, one: Model, items: Rows, draws: int) -> dict[str, float]:
    """Means over seeds against the fine-tuned model: weights within three standard errors, error of the logits."""
    start, goal = (dict(m.hf.named_parameters()) for m in (base, one))
    work = base.copied()
    mine = dict(work.hf.named_parameters())
    ids = torch.from_numpy(items[0][:60, :-1])
    wanted, total = one.logits(ids), torch.zeros(())
    mean = {n: torch.zeros_like(p) for n, p in start.items()}
    errors = {}
    for seed in range(draws):
        with torch.no_grad():
            for name, p in mine.items():
                p.copy_(merged(start[name], [goal[name]], MergePlan("dare", drop=0.9, seed=seed), name))
                mean[name] += p / draws
        total = total + work.logits(ids)
        if (seed + 1) in (1, 4, 16, 64):
            errors[seed + 1] = float((total / (seed + 1) - wanted).square().mean().sqrt())
    within, n = 0, 0
    for name, w in goal.items():
        error = 3 * ((w - start[name]).square() * 0.9 / 0.1 / draws).sqrt()
        moved = w != start[name]
        within += int(((mean[name] - w).abs() <= error)[moved].sum())
        n += int(moved.sum())
    return {"within": within / n, **{f"error {k}": v for k, v in errors.items()}}


def masked(one: Model, drop: float, seed: int) -> Model:
    """The fine-tuned weights themselves with a share put to zero."""
    work = one.copied()
    with torch.no_grad():
        for name, p in work.hf.named_parameters():
            p.mul_(keep_mask(p.shape, drop, seed, 0, name))
    return work


def alone(base: Model, one: Model, items: Rows, seed: int) -> dict[str, float]:
    """Accuracy of one skill after its change was thinned."""
    found = {"base": accuracy(base, items), "fine-tuned": accuracy(one, items)}
    for drop in DROPS:
        for name, plan in (
            ("DARE", MergePlan("dare", drop=drop, seed=seed)),
            ("dropped, not paid back", MergePlan("dare", drop=drop, seed=seed, rescale=False)),
            ("the largest stay", MergePlan("magnitude", drop=drop)),
        ):
            found[f"{name}, {drop:g}"] = accuracy(made(base, [one], plan)[0], items)
    found["fine-tuned weights, 0.1 of them zero"] = accuracy(masked(one, 0.1, seed), items)
    return found


def together(base: Model, models: Sequence[Model], items: Sequence[dict[str, Rows]], seed: int) -> dict[str, Any]:
    """Both skills of merged models: way -> accuracies on lists, on sums, and the scale that was chosen."""
    ways = {"plain average": MergePlan("linear"), "task arithmetic": MergePlan("task")}
    for drop in DROPS:
        ways[f"DARE, {drop:g}"] = MergePlan("dare", drop=drop, seed=seed)
        ways[f"dropped, not paid back, {drop:g}"] = MergePlan("dare", drop=drop, seed=seed, rescale=False)
        ways[f"the largest stay, {drop:g}"] = MergePlan("magnitude", drop=drop)
    ways |= {"TIES, 0.2 stay": MergePlan("ties"), "DARE and TIES, 0.9": MergePlan("dare-ties", drop=0.9, seed=seed)}
    found = {}
    for name, plan in ways.items():
        tried = []
        for scale in SCALES if name in SEARCHED else (1.0,):
            model = made(base, models, replace(plan, scale=scale))[0]
            judged = [accuracy(model, i["choose"]) for i in items]
            tried.append((min(judged), sum(judged), scale, [accuracy(model, i["test"]) for i in items]))
        best = max(tried, key=lambda t: t[:3])
        found[name] = {"chosen": best[3], "scale": best[2], "one": tried[-1][3]}
    return found


def oracle(base: Model, models: Sequence[Model]) -> Oracle:
    """The same by mergekit: task arithmetic, to the bit; DARE at 0.9, in how much stays and how far it goes."""
    try:
        from mergekit.merge_methods.base import PerInputValues, TensorEntry, TensorGroup
        from mergekit.merge_methods.registry import get
    except ImportError:
        return [("not measured: mergekit 0.1.5 is not installed", None)] * 2
    start, *goals = (dict(m.hf.named_parameters()) for m in (base, *models))
    task, dare = (made(base, models, MergePlan("dare", drop=p))[0].hf for p in (0.0, 0.9))
    ids, options = range(1, len(models) + 1), {"int8_mask": False, "normalize": False, "lambda": 1.0}
    same, stays, length = 0, np.zeros(2), np.zeros(2)
    for name, w in start.items():
        group = TensorGroup(
            (TensorEntry(0, w, True), *(TensorEntry(i, g[name]) for i, g in zip(ids, goals, strict=True)))
        )
        one, tenth = (PerInputValues(dict.fromkeys(ids, x)) for x in (1.0, 0.1))
        whole = get("task_arithmetic").merge_group(group, weight=one, density=one, rescale=False, **options)
        same += int(torch.equal(whole, task.get_parameter(name)))
        thin = get("dare_linear").merge_group(group, weight=one, density=tenth, rescale=True, **options)
        for k, found in enumerate((dare.get_parameter(name), thin)):
            stays[k] += float((found != w).sum()) / base.n_parameters
            length[k] += float((found - w).square().sum())
    told = (
        f"{stays[0]:.4f} and {stays[1]:.4f} of the weights change, by {length[0] ** 0.5:.2f} and {length[1] ** 0.5:.2f}"
    )
    close = bool(abs(stays[0] / stays[1] - 1) < 0.02 and abs(length[0] / length[1] - 1) < 0.04)
    return [(f"{same} of {len(start)} tensors", same == len(start)), (told, close)]


# -- the page


def main() -> None:
    """Everything."""
    size = QUICK if is_quick(__doc__) else FULL
    base = base_model(size)
    singles: dict[str, list[dict[str, float]]] = {s: [] for s in SKILLS}
    both, far, spread, drawn, same = [], [], [], {}, Oracle()
    for seed in size.seeds:
        models = [tuned(base, s, seed, size) for s in SKILLS]
        items = [split(s, seed, size) for s in SKILLS]
        say(f"seed {seed}: alone")
        for skill, one, mine in zip(SKILLS, models, items, strict=True):
            singles[skill].append(alone(base, one, mine["test"], seed))
            if seed == size.seeds[0]:
                drawn[skill] = unbiased(base, one, mine["test"], size.draws)
        if not same:
            same = oracle(base, models)
        say(f"seed {seed}: together")
        both.append(together(base, models, items, seed))
        gone = tuned(base, "lists", seed, size, far=True)
        thinned, told = made(base, [models[0], gone], MergePlan("dare", drop=0.9, seed=seed))
        thinned = made(base, [gone], MergePlan("dare", drop=0.9, seed=seed))[0]
        near_far = told.by_model()["mean"].to_list()
        spread.append([seed, f"{near_far[0]:.5f}", f"{near_far[1]:.5f}", f"{near_far[1] / near_far[0]:.1f}",
                       *(f"{told.by_model()['q99'][i]:.4f}" for i in (0, 1))])  # fmt: skip
        far.append((accuracy(gone, items[0]["test"]), accuracy(thinned, items[0]["test"]),
                    near_far[1] / near_far[0]))  # fmt: skip
    text = page(size, base, singles, both, far, spread, drawn, same)
    if size is QUICK:
        print("\n".join(text))
        return
    write("change-merging", "Change: merging", "python studies/merging.py", *text, seeds="seeds 0, 1, 2")
    changed("DARE", claims_of("change-merging"), "python studies/merging.py", "change-merging")


def page(
    size: Size, base: Model, singles: Any, both: Any, far: Any, spread: Any, drawn: Any, same: Oracle
) -> list[str]:  # fmt: skip
    """The page's parts."""
    take: Callable[[str, str], list[float]] = lambda skill, way: [s[way] for s in singles[skill]]  # noqa: E731
    merged_at: Callable[[str, int], list[float]] = lambda way, k: [b[way]["chosen"][k] for b in both]  # noqa: E731
    claims = []
    for skill, k in zip(SKILLS, (0, 1), strict=True):
        whole, dare = take(skill, "fine-tuned"), take(skill, "DARE, 0.9")
        without, zeroed = (
            take(skill, "dropped, not paid back, 0.9"),
            take(skill, "fine-tuned weights, 0.1 of them zero"),
        )
        error = drawn[skill]
        last = f"error {max(n for n in (1, 4, 16, 64) if n <= size.draws)}"
        factor = error["error 1"] / error[last]
        claims += [
            [f"{skill}: the fine-tuned model is right in 95 % or more", each(whole),
             verdict([w >= 0.95 for w in whole])],
            [f"{skill}: mean weight of {size.draws} draws within 3 standard errors in 99 % of places",
             f"{error['within']:.2%}", held(error["within"] >= 0.99)],
            [f"{skill}: error of the mean logits falls as 1/sqrt(draws), by {size.draws**0.5:.0f}", f"by {factor:.1f} ("
             + ", ".join(f"{n.split()[1]}: {v:.3f}" for n, v in error.items() if n != "within") + ")",
             held(factor >= 0.7 * size.draws**0.5)],
            [f"{skill}: DARE at 0.9 keeps 95 % of the accuracy",
             each([d / max(w, 1e-9) for d, w in zip(dare, whole, strict=True)]),
             verdict([d >= 0.95 * w for d, w in zip(dare, whole, strict=True)])],
            [f"{skill}: not paid back, 20 points lower or more", each(without),
             verdict([d - n >= 0.2 for d, n in zip(dare, without, strict=True)])],
            [f"{skill}: a tenth of the fine-tuned weights at zero hurts more than DARE at 0.9", each(zeroed),
             verdict([z < d for z, d in zip(zeroed, dare, strict=True)])],
            [f"{skill}: DARE at 0.9 and task arithmetic, merged: 90 % or more", each(merged_at("DARE, 0.9", k)),
             verdict([x >= 0.9 for x in merged_at("DARE, 0.9", k)])],
            [f"{skill}: and not below the plain average", f"against {each(merged_at('plain average', k))}",
             verdict([x >= y for x, y in zip(merged_at("DARE, 0.9", k), merged_at("plain average", k), strict=True)])],
        ]  # fmt: skip
    claims += [
        ["a model that went ten times as far collapses under DARE at 0.9",
         f"{each([f[1] for f in far])}, {each([f[0] for f in far])} before "
         f"({each([f[2] for f in far], 1)} times as far)",
         verdict([f[2] >= 10 and f[0] >= 0.9 and f[1] < 0.5 * f[0] for f in far])],
        *([asked, told, "-" if came is None else held(came)] for asked, (told, came) in zip((
            "nothing dropped: the same to the bit as mergekit's task arithmetic",
            "DARE at 0.9 as mergekit's: as much stays (2 %) and it goes as far (Euclidean length, 2 %)"), same,
            strict=True)),
    ]  # fmt: skip
    ways = list(singles["lists"][0])
    first = [[w, each(take("lists", w)), each(take("sums", w))] for w in ways]
    second = [
        [w, each(merged_at(w, 0)), each(merged_at(w, 1)), each([b[w]["scale"] for b in both], 1),
         each([b[w]["one"][0] for b in both]), each([b[w]["one"][1] for b in both])]
        for w in both[0]
    ]  # fmt: skip
    return [
        f"A Llama of {size.layers} blocks and {base.n_parameters / 1e6:.1f} M parameters has read lists of {LENGTH} "
        f"letters, and of numbers modulo {MODULUS}, each answered by one of three rules, drawn by chance. It is "
        f"fine-tuned for {size.tune_steps} steps on one of them: `lists` are told backwards, `sums` add 3 to each. "
        "Accuracy is of whole answers to questions that were not tuned on. Seeds decide the items, the order and what "
        "is dropped; the base is one.",
        table(["asked", "came out", ""], claims),
        "Where a check does not hold: the expectation of the weights is that of the fine-tuned model, that of the "
        "logits is not, since the model is not linear in its weights; what is left of the error after many draws is "
        "this bias, and the larger the changes the larger it is.",
        "The far model stands for one that was trained on as at first. At ten times the rate for twice as long (2e-3, "
        "120 steps) it went only 5 times as far, and DARE at 0.9 cost it a tenth of its answers at most; beyond 10 "
        "times, nothing is left.",
        "## One skill, thinned",
        "Accuracy by seed; the number is the share that is dropped.",
        table(["way", "lists", "sums"], first),
        "## Two skills, one model",
        f"Of {', '.join(SEARCHED)} the scale is the one of {', '.join(map(str, SCALES))} whose weaker skill is best on "
        "items apart; it is 1 elsewhere.",
        table(["way", "lists", "sums", "scale", "lists at scale 1", "sums at scale 1"], second),
        "## How far is far",
        "Of the absolute changes of all weights: mean, and 99th percentile of the widest tensor, of `lists` fine-tuned "
        f"as above ({size.tune_steps} steps at {size.tune_lr}) and far ({size.far_steps} at {size.far_lr}).",
        table(["seed", "near, mean", "far, mean", "ratio", "near, q99", "far, q99"], spread),
    ]


if __name__ == "__main__":
    main()
