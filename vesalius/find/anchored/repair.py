"""Repairs of an anchored model: a few value vectors, an even look at the options' letters; and what they cost.

**Value vectors.** Neurons of the last layers that fire at "Answer:" and little elsewhere are given a small common write
so that, on the mean question of a development set, no letter is ahead:

    v_i <- v_i + d / (k c_i),      U_L diag(g) r d = mean over letters of logit_L - logit_L     (least |d|)

with c_i the neuron's mean activation, k neurons, U_L the letters' unembedding, g and r the final norm's gain and mean
scale. No label is used, where the paper adds the right option's own vector: that edit is `label_aware`, per question,
and an upper bound. **Attention.** In heads that look at the letters most, the end's attention is spread evenly over the
letters (label-free; an intervention alone: no weight does this). Li and Gao, arXiv 2405.03205, sec. 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.find.anchored.bias import Taps, letter_logits, letter_tokens, right_places, rows_of, variation
from vesalius.find.anchored.diagnosis import firing, neuron, value_vectors
from vesalius.find.anchored.questions import LETTERS, Choice
from vesalius.find.recall.heads import unembedded
from vesalius.model import Model, Site
from vesalius.model.replay import Tape
from vesalius.model.saving import holds, origin_of, save_model
from vesalius.model.sweep import BATCH
from vesalius.model.weights import parameter_of
from vesalius.parts import Part

Floats = NDArray[np.float64]
LAYERS = 3  # the last ones, whose neurons are considered
ROUNDS = 3  # of fitting: the final norm and the letters' softmax are not linear
MOST = 10  # neurons or heads


@dataclass(frozen=True)
class ValueEdit:
    """A change of some value vectors.

    Attributes:
        neurons: which. change: what is added to each, (neuron, d_model).
    """

    neurons: list[Part]
    change: Tensor

    def _add(self, model: Model, sign: float) -> None:
        with torch.no_grad():
            for part, delta in zip(self.neurons, self.change, strict=True):
                row = value_vectors(model, part.layer or 0)[part.index]
                row.add_(sign * delta.to(row))

    def apply(self, model: Model) -> None:
        """Changes the model's weights in place."""
        self._add(model, 1.0)

    def undo(self, model: Model) -> None:
        """Takes the change back (to rounding)."""
        self._add(model, -1.0)

    @contextmanager
    def on(self, model: Model) -> Iterator[Model]:
        """The model with the change, for a `with` block; the weights come back to the bit."""
        kept = [value_vectors(model, p.layer or 0)[p.index].clone() for p in self.neurons]
        self.apply(model)
        try:
            yield model
        finally:
            with torch.no_grad():
                for part, old in zip(self.neurons, kept, strict=True):
                    value_vectors(model, part.layer or 0)[part.index].copy_(old)

    def save(self, model: Model, folder: Path | str) -> Path:
        """Writes the changed model as an ordinary Hugging Face folder, unless it is there already."""
        story = {"edit": "value vectors", "of": origin_of(model), "neurons": [str(p) for p in self.neurons]}
        if holds(folder, story):
            return Path(folder)
        with self.on(model):
            return save_model(model, folder, story)


def choose_neurons(model: Model, questions: Sequence[Choice], text: Tensor, k: int = 5) -> list[tuple[Part, float]]:
    """The k neurons of the last layers that are most particular to the end of questions, and their mean activation.

    Particular: |mean activation there| over its spread there and its root mean square in plain text together, among
    neurons that fire with at least a hundredth of their layer's largest mean.
    """
    if not 1 <= k <= MOST:
        raise VesaliusError(f"{k} neurons cannot be edited; give 1 to {MOST}")
    found = []
    for it in firing(model, range(max(0, model.n_layers - LAYERS), model.n_layers), questions, text):
        size = it.mean.abs()
        noise = (it.usual.square() + it.spread.square()).sqrt().clamp(min=1e-3 * float(size.max()))
        ratio = torch.where(size >= 0.01 * size.max(), size / noise, 0.0)
        best = ratio.topk(min(k, len(ratio)))
        found += [
            (float(r), neuron(it.layer, int(i), model), float(it.mean[i]))
            for r, i in zip(best.values, best.indices, strict=True)
        ]
    found.sort(key=lambda f: -f[0])
    return [(part, c) for _, part, c in found[:k]]


def endings(model: Model, questions: Sequence[Choice], edits: Sequence[ValueEdit | None]) -> list[Tensor]:
    """The last residual stream at the end of questions under each edit, (question, d_model).

    The prompts are read once; an edit runs its own layers again, at the end alone.
    """
    found: list[list[Tensor]] = [[] for _ in edits]
    for rows in rows_of(model, [q.prompt for q in questions]).batches():
        tape = Tape(model, rows.ids, rows.mask, rows.reads, start=int(rows.reads[0, 0]))
        for edit, out in zip(edits, found, strict=True):
            if edit is None:
                out.append(tape.final[:, 0])
                continue
            with torch.no_grad(), edit.on(model):
                out.append(tape.replay(min(p.layer or 0 for p in edit.neurons), 1, {})[:, 0])
    return [torch.cat(out) for out in found]


def letters_under(model: Model, questions: Sequence[Choice], edits: Sequence[ValueEdit | None]) -> list[Floats]:
    """Letters' log-probabilities under each edit, (question, letter)."""
    tokens = letter_tokens(model, len(questions[0].options))
    with torch.no_grad():
        said = [model.readout(h, tokens).float().log_softmax(-1).cpu() for h in endings(model, questions, edits)]
    return [s.double().numpy() for s in said]


def least_write(model: Model, ends: Tensor, letters: Tensor, wanted: Floats) -> Tensor:
    """The shortest change of the last residual stream, (d_model,), that moves the letters' logits by `wanted`.

    Args:
        ends: that stream at the end of questions, (question, d_model), for the final norm's mean scale.
    """
    norm, eye = model.anatomy.main.final_norm, torch.eye(model.d_model)
    seen = eye if norm is None else norm.linear(eye, norm.scale(ends).mean().cpu())
    rows_l = unembedded(model, seen, letters).double()  # (d_model, letter)
    rows_l = rows_l - rows_l.mean(1, keepdim=True)  # only differences between letters matter
    target = torch.from_numpy(wanted - wanted.mean())
    return (torch.linalg.pinv(rows_l.T, rtol=1e-6) @ target).float()


def fit_values(
    model: Model,
    questions: Sequence[Choice],
    text: Tensor,
    k: int = 5,
    chosen: Sequence[tuple[Part, float]] | None = None,
) -> ValueEdit:
    """The label-free edit of value vectors that leaves no letter ahead on the mean development question.

    Args:
        questions: development questions, whose labels are not read. text: plain text (row, pos), to find neurons that
            fire little in it. k: neurons. chosen: neurons and their mean activations, instead of finding them.
    """
    neurons = list(chosen if chosen is not None else choose_neurons(model, questions, text, k))
    edit = ValueEdit([p for p, _ in neurons], torch.zeros(len(neurons), model.d_model))
    letters = letter_tokens(model, len(questions[0].options))
    for _ in range(ROUNDS):
        (ends,) = endings(model, questions, [edit])
        with torch.no_grad():
            ahead = model.readout(ends, letters).float().log_softmax(-1).double().mean(0).cpu().numpy()
        d = least_write(model, ends, letters, -ahead)
        share = torch.stack([d / (len(neurons) * c) for _, c in neurons])
        edit = ValueEdit(edit.neurons, edit.change + share)
    return edit


def random_values(model: Model, edit: ValueEdit, seed: int = 0) -> ValueEdit:
    """As many random neurons of the same layers, changed by as much in random directions."""
    g = torch.Generator().manual_seed(seed)
    parts = [neuron(p.layer or 0, int(torch.randint(model.d_mlp, (1,), generator=g)), model) for p in edit.neurons]
    r = torch.randn(edit.change.shape, generator=g)
    return ValueEdit(parts, r / r.norm(dim=1, keepdim=True) * edit.change.norm(dim=1, keepdim=True))


# -- attention


def letter_places(model: Model, questions: Sequence[Choice]) -> Tensor:
    """Where the options' letters stand in the padded prompts, (question, letter)."""
    rows = rows_of(model, [q.prompt for q in questions])
    encoder_ids, found = rows.ids.tolist(), []
    assert model.tokenizer is not None
    for q, ids, mask in zip(questions, encoder_ids, rows.mask.tolist(), strict=True):
        first, at, places = mask.index(1), 0, []
        ends = [len(str(model.tokenizer.decode(ids[first : first + n + 1]))) for n in range(len(ids) - first)]
        whole = str(model.tokenizer.decode(ids[first:]))
        for letter in LETTERS[: len(q.options)]:
            at = whole.index(f"{letter}:", at)
            places.append(first + next(i for i, e in enumerate(ends) if e > at))
        found.append(places)
    return torch.tensor(found)


@torch.no_grad()
def looking_heads(model: Model, questions: Sequence[Choice], k: int = MOST) -> list[Part]:
    """The heads whose end looks most at A rather than at the other letters."""
    rows, places = rows_of(model, [q.prompt for q in questions]), letter_places(model, questions)
    prefix = model.anatomy.main.prefix
    sites = [Site("pattern", layer, prefix) for layer in range(model.n_layers)]
    total = torch.zeros(model.n_layers, model.n_heads)
    for lo in range(0, rows.n, BATCH):
        some = slice(lo, lo + BATCH)
        run = model.run(rows.ids[some], rows.mask[some], capture=sites)
        index = places[some, None, :].expand(-1, model.n_heads, -1)
        for layer, site in enumerate(sites):
            look = run[site][:, :, -1].gather(-1, index)  # (row, head, letter)
            total[layer] += (look[..., 0] - look[..., 1:].mean(-1)).sum(0).float().cpu()
    order = total.flatten().argsort(descending=True)[:k].tolist()
    return [Part("head", i // model.n_heads, i % model.n_heads, stack=prefix) for i in order]


def even_look(model: Model, questions: Sequence[Choice], heads: Sequence[Part]) -> Floats:
    """Letters' log-probabilities with these heads' attention from the end spread evenly over the letters."""
    found = []
    for lo in range(0, len(questions), BATCH):
        some = questions[lo : lo + BATCH]
        found.append(letter_logits(model, some, _even(model, some, heads)))
    return np.concatenate(found)


def _even(model: Model, questions: Sequence[Choice], heads: Sequence[Part]) -> Taps:
    places = letter_places(model, questions)
    by_layer: dict[int, list[int]] = {}
    for p in heads:
        by_layer.setdefault(p.layer or 0, []).append(p.index or 0)

    def tap_of(chosen: list[int]):  # type: ignore[no-untyped-def]
        def tap(pattern: Tensor) -> Tensor:
            pattern = pattern.clone()
            for h in chosen:
                row = pattern[:, h, -1]  # (row, key)
                row.scatter_(1, places, row.gather(1, places).mean(1, keepdim=True).expand_as(places))
            return pattern

        return tap

    return {Site("pattern", layer, model.anatomy.main.prefix): [tap_of(chosen)] for layer, chosen in by_layer.items()}


# -- the paper's own edit, and costs


def label_aware(model: Model, questions: Sequence[Choice], minus: float = 1.0, plus: float = 8.0) -> float:
    """Share of anchored questions that turn to the right letter under the paper's per-question edit; an upper bound.

    One neuron of the last layer with the largest |c| |v|, v <- v - minus U_A + plus U_right: the label is in the edit.
    """
    layer, prefix = model.n_layers - 1, model.anatomy.main.prefix
    letters = letter_tokens(model, len(questions[0].options))
    assert model.anatomy.main.unembed is not None
    weight = parameter_of(model.anatomy.main.unembed, "weight")
    assert weight is not None
    size = value_vectors(model, layer).norm(dim=1)
    before = letter_logits(model, questions).argmax(1)
    turned, total = 0, 0
    for i, (q, said) in enumerate(zip(questions, before, strict=True)):
        if said != 0 or q.right == 0:
            continue
        rows = rows_of(model, [questions[i].prompt])
        with torch.no_grad():
            c = model.run(rows.ids, rows.mask, capture=[Site("neurons", layer, prefix)])[
                Site("neurons", layer, prefix)
            ][0, -1]
        best = int((c.abs() * size).argmax())
        # the sign of v follows that of c, so that the write goes towards the right letter
        delta = torch.sign(c[best]) * (-minus * weight[letters[0]] + plus * weight[letters[q.right]])
        with ValueEdit([neuron(layer, best, model)], delta[None].detach()).on(model):
            turned += int(letter_logits(model, [q]).argmax(1)[0] == q.right)
        total += 1
    return turned / total if total else float("nan")


@torch.no_grad()
def text_loss(model: Model, text: Tensor) -> float:
    """Mean surprisal of the next token of plain text (row, pos), in nats."""
    total = count = 0.0
    for lo in range(0, len(text), BATCH):
        logits = model.logits(text[lo : lo + BATCH])[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), text[lo : lo + BATCH, 1:].flatten(), reduction="sum"
            )
        )
        count += logits.shape[0] * logits.shape[1]
    return total / count


def moved(before: Floats, after: Floats, questions: Sequence[Choice]) -> dict[str, float]:
    """Variation and accuracy before and after."""
    right, size = right_places(questions), before.shape[1]
    return {
        "variation_before": variation(before.argmax(1), size),
        "variation": variation(after.argmax(1), size),
        "accuracy_before": float((before.argmax(1) == right).mean()),
        "accuracy": float((after.argmax(1) == right).mean()),
    }  # fmt: skip
