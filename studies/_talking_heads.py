"""The checks of channels between heads: planted ones, those into induction heads, in IOI, and the laundry list."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import vesalius
from vesalius.build import planted_channel
from vesalius.corpus import documents
from vesalius.evaluate.windows import last_losses
from vesalius.find.detectors.repeats import on_repeats
from vesalius.find.detectors.stimuli import repeated
from vesalius.lens import (
    ComponentEdit,
    Subspace,
    Wiring,
    components_between,
    composition,
    coordinates,
    edited,
    inhibition,
    measure,
    token_rows,
)
from vesalius.model import Intervention, Model, Pairs, Site
from vesalius.model.intervene import taps
from vesalius.model.replay import Tape
from vesalius.parts import Edge, Part, parse_part
from vesalius.scores import bootstrap_mean

INDUCTION = ("L18.H6", "L17.H3", "L17.H4", "L18.H7")  # the strongest by their attention on repeated random tokens
Edit = tuple[str, tuple[float, ...]]

# -- 5.1, 5.2: planted channels and numerics -------------------------------------------------------------------------


def planted(seeds: int) -> dict[str, Any]:
    """The planted component among its sender's, the pair among all pairs, and what removing components does."""
    rows = []
    for side, seed in itertools.product("qkv", range(seeds)):
        it = planted_channel(side, seed)
        model = Model.wrap(it.hf, name="planted")
        wired = Wiring.of(model)
        each = components_between(wired, it.edge)
        scores = composition(wired, kinds=side)
        row = scores.parts.index(it.edge)
        found = {
            "side": side,
            "seed": seed,
            "z": float(each["z"][it.component]),
            "z_other": float(each["z"].drop(it.component).max()),
            "p": float(scores.columns["p"][row]),
            "p_whole": float(scores.columns["p_whole"][row]),
        }
        if side == "v":
            ids = torch.randint(0, 8, (32, 6), generator=torch.Generator().manual_seed(seed))
            edits = [ComponentEdit(it.edge.sender, {i: 0.0}).intervention(model) for i in range(32)]
            rows_of = [[], *[[e] for e in edits]]
            logits = model.run(ids.repeat(33, 1), taps=taps(rows_of, len(ids))).logits
            assert logits is not None
            ld = (logits[:, -1, it.right] - logits[:, -1, it.wrong]).double().view(33, -1).numpy()
            lost = np.abs(ld[0] - ld[1:]).mean(1) / np.abs(ld[0]).mean()
            found |= {"lost": float(lost[it.component]), "lost_other": float(np.delete(lost, it.component).max())}
        rows.append(found)
    return {"rows": rows}


def numerics(model: Model) -> dict[str, Any]:
    """Components rebuild the matrices; factored and dense composition scores agree; what each costs, CPU seconds."""
    began = time.process_time()
    wired = Wiring.of(model)
    everything = composition(wired)
    all_pairs_s = time.process_time() - began
    worst = 0.0
    for layer in wired.layers.values():
        u, s, v = layer.components
        dense = layer.ov.dense()
        gap = (u * s[:, None] @ v.mT - dense).abs().amax((1, 2)) / dense.abs().amax((1, 2))
        worst = max(worst, float(gap.max()))
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(40):
        first, second = sorted(rng.choice(model.n_layers, 2, replace=False).tolist())
        a, b = rng.integers(model.n_heads, size=2).tolist()
        sender, receiver = wired.layers["", first, False], wired.layers["", second, False]
        for side, reader in (("q", receiver.qk[b]), ("k", receiver.qk[b].T), ("v", receiver.ov[b])):
            edge = Edge(Part("head", first, a), Part("head", second, b, side))
            score = components_between(wired, edge)["score"].to_numpy()
            matrix = reader.dense()
            rows = sender.components.v[a].T
            gaps.append(np.abs(score - ((rows @ matrix).norm(dim=1) / matrix.norm()).numpy()).max())
    # one pair of heads, decomposition of the sender included: the factored route, and that of the dense matrices
    small, large = wired.layers["", 3, False], wired.layers["", 9, False]

    def factored() -> None:
        v, read = small.ov[2].svd().v, large.qk[6].reader()
        (v.T @ read).norm(dim=1) / read.norm()

    def dense() -> None:
        written, read = small.ov[2].dense(), large.qk[6].dense()
        v = torch.linalg.svd(written, full_matrices=False).Vh[: model.d_head]
        (v @ read).norm(dim=1) / read.norm()

    took = []
    for way, times in ((factored, 20), (dense, 2)):
        way()
        best = math.inf  # of five, since other work on the machine slows both
        for _ in range(5):
            began = time.process_time()
            for _ in range(times):
                way()
            best = min(best, (time.process_time() - began) / times)
        took.append(best)
    return {
        "rebuilt": worst,
        "gap": float(max(gaps)),
        "factored_s": took[0],
        "dense_s": took[1],
        "all_pairs": len(everything),
        "all_pairs_s": all_pairs_s,
    }


# -- 5.3: previous-token heads and induction heads -------------------------------------------------------------------


def induction(model: Model, prompts: int, components: int) -> dict[str, Any]:
    """Channels into the keys of induction heads, by weights; and what taking components out does to them."""
    wired = Wiring.of(model)
    looks, _, _ = on_repeats(model, repeated(model, 0))
    previous = looks.set_index("part")["previous-token"]
    sender = parse_part(str(previous.idxmax()))
    keys = composition(wired, kinds="k")
    edges = [Edge(sender, parse_part(f"{head}.k")) for head in INDUCTION]
    each = [components_between(wired, edge) for edge in edges]
    rows = []
    for edge in edges:
        row = keys.parts.index(edge)
        column = {name: float(values[row]) for name, values in keys.columns.items()}
        rows.append(
            {
                "edge": str(edge),
                "score": float(keys.values[row]),
                "component": int(column["component"]),
                "z": column["z"],
                "p": column["p"],
                "rank": int((keys.values > keys.values[row]).sum()) + 1,
                "rank_whole": int((keys.columns["whole"] > column["whole"]).sum()) + 1,
            }
        )
    ids = repeated(model, 1, rows=prompts, length=32)
    half = ids.shape[1] // 2
    layer, heads = int(sender.layer or 0), [parse_part(h) for h in INDUCTION]
    tape = Tape(model, ids, torch.ones_like(ids), torch.full((len(ids), 1), 2 * half - 1), capture=[Site("z", layer)])
    mean = tape.sites[Site("z", layer)][:, :, sender.index].mean((0, 1))
    query = torch.arange(half, 2 * half - 1)

    def looking(numbers: Sequence[int]) -> Any:
        """Induction attention of the heads with components of the sender at their mean, (head,)."""
        eye = torch.eye(model.d_head)
        z = ComponentEdit(sender, dict.fromkeys(numbers, 0.0)).matrix(model) if numbers else eye
        functions = taps([[Intervention(sender, "map", z), Intervention(sender, "add", mean @ (eye - z))]], len(ids))
        seen: dict[int, Tensor] = {}
        for n in {int(h.layer or 0) for h in heads}:
            site = Site("pattern", n)
            functions.setdefault(site, []).append(lambda x, n=n: seen.__setitem__(n, x))  # type: ignore[misc]
        with torch.no_grad():
            tape.replay(layer, 1, functions)
        return np.array([float(seen[int(h.layer or 0)][:, h.index, query, query - half + 1].mean()) for h in heads])

    base = looking([])
    fall = 1 - np.stack([looking([i]) for i in range(components)]) / base  # (component, head)
    everything = 1 - looking(range(model.d_head)) / base
    for h, row in enumerate(rows):
        row |= {
            "fall": float(fall[row["component"], h]) if row["component"] < components else float("nan"),
            "fall_mean": float(fall[:, h].mean()),
            "fall_max": float(fall[:, h].max()),
            "fall_head": float(everything[h]),
            "correlation": float(np.corrcoef(each[h]["score"].head(components), fall[:, h])[0, 1]),
        }
    ranked = sum(e["score"] * e["sigma"] for e in each).sort_values(ascending=False).index.tolist()  # type: ignore[union-attr]
    sets = []
    for k in (1, 2, 4, 8, 16, 32) if components > 8 else (4,):
        rng = np.random.default_rng(k)
        random = [1 - looking(rng.choice(model.d_head, k, replace=False).tolist()) / base for _ in range(5)]
        top = 1 - looking(ranked[:k]) / base
        sets.append({"k": k, "top": float(top.mean()), "random": float(np.mean(random)), "most": float(np.max(random))})
    return {
        "rows": rows,
        "pairs": len(keys),
        "previous": {"head": str(sender), "attention": float(previous.max())},
        "base": base.tolist(),
        "sets": sets,
    }


# -- IOI: one component of an inhibition head, and where the mover looks ---------------------------------------------


def inhibiting(model: Model, n: int, components: int) -> dict[str, Any]:
    """Inhibition scores of every component of the heads END needs most, for the heads that look at the right name."""
    wired = Wiring.of(model)
    task = vesalius.task("ioi", n=n, seed=3)
    pairs = task.pairs(model)
    heads = model.parts(("head",))
    looks = measure(model, pairs, lambda g: [[]], watch=heads, places=("IO", "S2")).attention[0]
    gap = np.nanmean(looks[..., 0] - looks[..., 1], axis=-1)
    lost = _lost(model, pairs, lambda end: [[Intervention(h, "zero", None, end)] for h in heads])
    movers = [heads[i] for i in np.argsort(-gap)[:3]]
    before = min(int(m.layer or 0) for m in movers)
    senders = [heads[i] for i in np.argsort(-lost) if int(heads[i].layer or 0) < before][:3]
    edges = [Edge(s, Part("head", m.layer, m.index, "q")) for s in senders for m in movers]
    found = inhibition(wired, pairs, edges, components=[range(components)] * len(edges))
    low, high = found.interval()
    rows = []
    for e, edge in enumerate(edges):
        mine = slice(e * components, (e + 1) * components)
        effect = found.values[mine]
        score = components_between(wired, edge)["score"].to_numpy()[:components]
        best = int(np.abs(effect).argmax())
        rows.append(
            {
                "edge": str(edge),
                "gap": float(gap[heads.index(movers[e % len(movers)])]),
                "head_lost": float(lost[heads.index(edge.sender)]),
                "component": best,
                "effect": float(effect[best]),
                "low": float(low[mine][best]),
                "high": float(high[mine][best]),
                "median": float(np.median(np.abs(effect))),
                "logits": float(found.columns["logit_effect"][mine][best]),
                "rank": int((score > score[best]).sum()) + 1,
                "rho": float(spearmanr(np.abs(effect), score).statistic),
            }
        )
    return {"rows": rows, "n": n}


# -- 5.4: the laundry list -------------------------------------------------------------------------------------------

STRETCH, SHIFT = (0.0, 2.0, 4.0), (-2.0, 0.0, 2.0)  # factors, and standard deviations of the prompts' own states
TEXT = 256  # tokens of a row of plain text
ALLOWED = 0.02  # nats that an edit may cost on plain text


def laundry(
    model: Model, lengths: Sequence[int], dev: int, test: int, random: int, components: int, rows_of_text: int
) -> dict[str, Any]:
    """Accuracy by length and place; a subspace edit chosen on a dev split, against random subspaces; a weight edit."""
    first = vesalius.task("laundry-list", n=dev, seed=11, items=4).pairs(model)
    heads = [h for h in model.parts(("head",)) if model.n_layers // 2 <= int(h.layer or 0) < model.n_layers - 4]
    lost = _lost(model, first, lambda end: [[Intervention(h, "zero", None, end)] for h in heads])
    channels = []
    for i in np.argsort(-lost)[:3]:
        maps = [ComponentEdit(heads[i], {c: 0.0}).matrix(model) for c in range(components)]
        each = _lost(model, first, lambda end, h=heads[i], m=maps: [[Intervention(h, "map", z, end)] for z in m])  # type: ignore[misc]
        best = np.argsort(-each)[:3].tolist()
        channels.append(
            {"head": str(heads[i]), "lost": float(lost[i]), "best": best, "component_lost": float(each[best[0]])}
        )
    where = Part("resid_pre", max(int(parse_part(c["head"]).layer or 0) for c in channels) + 1)
    own = Subspace.of_channels(model, [(c["head"], c["best"][0]) for c in channels])
    spaces = [own, *[Subspace.random(model, 3, seed) for seed in range(random)]]
    text = Text(model, where, rows_of_text)
    rows, places, before = [], [], {}
    for items in lengths:
        compared = spaces if items in lengths[::3] else spaces[:1]
        found, by_place, before[items] = _subspaces(model, compared, where, text, items, dev, test)
        rows.append(found)
        places += by_place
    return {
        "rows": rows,
        "places": places,
        "channels": channels,
        "where": str(where),
        "loss": text.before,
        "tokens": text.judged * TEXT,
        "weights": _weights(model, channels, lengths[::3], dev, test, text, before),
    }


class Text:
    """What an edit at every position costs on plain text: rows to choose edits by, and others to judge them by."""

    def __init__(self, model: Model, where: Part, rows: int) -> None:
        texts = (d.text for d in documents("anarchism"))
        every = [r for r in token_rows(model, texts, 4 * (TEXT + 1) * rows, length=TEXT + 1) if r.shape[1] == TEXT + 1]
        self.model, self.layer, self.judged = model, int(where.layer or 0), rows
        self.tapes = []
        for ids in torch.cat(every[: rows + 4]).split(4):  # the first four are those to choose by
            reads = torch.arange(TEXT).expand(len(ids), -1)
            self.tapes.append((Tape(model, ids[:, :-1], torch.ones_like(ids[:, :-1]), reads), ids[:, 1:]))
        self.rows = torch.cat(every[4 : rows + 4])
        self.plain = [self._loss(tape, targets, []) for tape, targets in self.tapes]
        self.before = float(np.mean(self.plain[1:]))

    def cost(self, changes: Sequence[Intervention], choosing: bool = False) -> float:
        """Change of the mean loss, nats a token."""
        some = slice(0, 1) if choosing else slice(1, None)
        after = [self._loss(tape, targets, changes) for tape, targets in self.tapes[some]]
        return float(np.mean(after) - np.mean(self.plain[some]))

    @torch.no_grad()
    def _loss(self, tape: Tape, targets: Tensor, changes: Sequence[Intervention]) -> float:
        hidden = tape.replay(self.layer, 1, taps([list(changes)], tape.rows) if changes else None)
        logits = self.model.readout(hidden).float().flatten(0, 1)
        return float(nn.functional.cross_entropy(logits, targets.flatten()))


def _lost(model: Model, pairs: Pairs, make: Callable[[Tensor], Sequence[Sequence[Intervention]]]) -> Any:
    """Mean logits lost under each variant, (variant,)."""
    found = measure(model, pairs, lambda group: [[], *make(group.reads[:, :1])]).metric
    return (found[0] - found[1:]).mean(1)


def _edits(model: Model, pairs: Pairs, space: Subspace, where: Part) -> list[Edit]:
    spread = coordinates(model, pairs, space, where).std(0)
    stretch: list[Edit] = [("scale", p) for p in itertools.product(STRETCH, repeat=3)]
    shift: list[Edit] = [
        ("add", tuple(float(s * w) for s, w in zip(p, spread, strict=True))) for p in itertools.product(SHIFT, repeat=3)
    ]
    return [*stretch, *shift]


def _subspaces(
    model: Model, spaces: Sequence[Subspace], where: Part, text: Text, items: int, dev: int, test: int
) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """For each subspace the edit that does best on dev prompts, and what it does on held-out ones; the first is ours.

    Ours is chosen twice: freely, and among edits that plain text hardly notices. Last: which prompts the model itself
    gets right.
    """
    task = vesalius.task("laundry-list", n=dev, seed=1, items=items)
    held_out = task.held_out(test)
    some = task.pairs(model)
    candidates = [(s, how, point) for s in spaces for how, point in _edits(model, some, s, where)]
    a_space = len(candidates) // len(spaces)

    def applied(chosen: Sequence[tuple[Subspace, str, tuple[float, ...]]]) -> Callable[[Pairs], Any]:
        return lambda g: [[], *[s.interventions(where, p, how, g.reads[:, :1]) for s, how, p in chosen]]  # type: ignore[arg-type]

    tried = measure(model, some, applied(candidates))
    good = list(zip(tried.preferred[1:].mean(1), tried.metric[1:].mean(1), strict=True))
    chosen = [max(range(i, i + a_space), key=lambda c: good[c]) for i in range(0, len(candidates), a_space)]
    mild = None
    for c in sorted(range(a_space), key=lambda c: good[c], reverse=True):
        if good[c][0] <= tried.preferred[0].mean():
            break
        if text.cost(candidates[c][0].interventions(where, candidates[c][2], candidates[c][1]), True) <= ALLOWED:  # type: ignore[arg-type]
            mild = c
            break
    picked = [*chosen, *([] if mild is None else [mild])]
    held = measure(model, held_out.pairs(model), applied([candidates[c] for c in picked])).preferred.astype(float)
    ours = [_told(candidates[chosen[0]], held[0], held[1], text, where)]
    if mild is not None:
        ours.append(_told(candidates[mild], held[0], held[-1], text, where))
    gains = (held[2 : 1 + len(spaces)].mean(1) - held[0].mean()).tolist()
    groups = np.array([int(e.group) for e in held_out.examples(model.tokenizer)])
    places = [
        {
            "items": items,
            "place": int(p),
            "before": float(held[0][groups == p].mean()),
            "after": float(held[1][groups == p].mean()),
        }
        for p in np.unique(groups)
    ]
    row = {"items": items, "before": float(held[0].mean()), "free": ours[0], "mild": ours[1] if len(ours) > 1 else None}
    return row | {"random": gains}, places, held[0]


def _told(chosen: Any, before: Any, after: Any, text: Text, where: Part) -> dict[str, Any]:
    space, how, point = chosen
    low, high = bootstrap_mean((after - before)[None])
    return {
        "edit": f"{how} {', '.join(f'{v:.3g}' for v in point)}",
        "after": float(after.mean()),
        "gain": float((after - before).mean()),
        "low": float(low[0]),
        "high": float(high[0]),
        "loss": text.cost(space.interventions(where, point, how)),
    }


def _weights(
    model: Model,
    channels: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    dev: int,
    test: int,
    text: Text,
    plain: Mapping[int, Any],
) -> dict[str, Any]:
    """Singular values scaled one after the other by what helps the dev prompts most; then in the weights themselves."""
    some = [vesalius.task("laundry-list", n=max(4, dev // 2), seed=2, items=n).pairs(model) for n in lengths]
    factors: dict[str, dict[int, float]] = {}

    def tried(options: Sequence[dict[str, dict[int, float]]]) -> Any:
        def variants(group: Pairs) -> list[list[Intervention]]:
            end = group.reads[:, :1]
            return [[ComponentEdit.of(h, f).intervention(model, end) for h, f in o.items()] for o in options]

        return np.mean([measure(model, pairs, variants).preferred.mean(1) for pairs in some], axis=0)

    steps: list[dict[str, Any]] = []
    best = start = float(tried([{}])[0])
    while len(steps) < 4:
        options = []
        for head, number, factor in (
            (c["head"], i, f) for c in channels for i in c["best"] for f in (-1.0, 0.0, 2.0, 4.0)
        ):
            option = {h: dict(f) for h, f in factors.items()}
            option.setdefault(head, {})[number] = factor
            options.append((option, {"head": head, "component": number, "factor": factor}))
        found = tried([o for o, _ in options])
        top = int(np.argmax(found))
        if float(found[top]) <= best:
            break
        factors, best = options[top][0], float(found[top])
        steps.append(options[top][1] | {"dev": best})
    edits = [ComponentEdit.of(h, f) for h, f in factors.items()]
    rows = []
    for items in lengths:
        pairs = vesalius.task("laundry-list", n=dev, seed=1, items=items).held_out(test).pairs(model)
        before = plain[items]
        with edited(model, edits):
            after = measure(model, pairs, lambda group: [[]]).preferred[0].astype(float)
        low, high = bootstrap_mean((after - before)[None])
        rows.append(
            {
                "items": items,
                "before": float(before.mean()),
                "after": float(after.mean()),
                "low": float(low[0]),
                "high": float(high[0]),
            }
        )
    with edited(model, edits):
        loss = float(last_losses(model, text.rows, TEXT, TEXT, batch=4).mean()) - text.before
    return {"steps": steps, "dev_before": start, "rows": rows, "loss": loss}
