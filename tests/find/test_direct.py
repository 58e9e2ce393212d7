"""Direct logit attribution: what each part writes towards the answer, the final norm held at its actual scale."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from families import tiny
from plain import LAYOUTS, T5, Change, Prompt, module_of, padded_pairs, prompts, record
from test_path_patching import subject
from torch import Tensor, nn

from vesalius.errors import VesaliusError
from vesalius.find.base import find
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.tasks.metrics import make_metric

FINAL = {
    "gpt2": ("transformer.ln_f", "layer"),
    "gptj": ("transformer.ln_f", "layer"),
    "opt": ("model.decoder.final_layer_norm", "layer"),
    "llama": ("model.norm", "rms"),
    "qwen3": ("model.norm", "rms"),
    "t5": ("decoder.final_layer_norm", "rms"),
}
KINDS = "head,xhead,mlp,embed"


@cache
def opened(family: str) -> Model:
    return tiny(family)


def frozen(norm: nn.Module, kind: str, x: Tensor) -> Change:
    """The norm as the linear map that it is at x, its bias left out."""
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()

    def apply(v: Tensor) -> Tensor:
        v = v - v.mean(-1, keepdim=True) if kind == "layer" else v
        return v * scale * norm.weight

    return apply


def written_terms(model: Model, prompt: Prompt, side: str, parts: list[Part]) -> tuple[dict[Part, float], float]:
    """Each part's term, and the logit difference, from transformers' modules alone."""
    name, kind = FINAL[model.name]
    norm = model.hf.get_submodule(name)
    found: list[Tensor] = []
    first: list[Tensor] = []
    blocks = T5["dec"][0] if model.name == "t5" else LAYOUTS[model.name].blocks
    handles = [
        norm.register_forward_pre_hook(lambda _, args: found.append(args[0])),
        model.hf.get_submodule(f"{blocks}.0").register_forward_pre_hook(lambda _, args: first.append(args[0])),
    ]
    with torch.no_grad():
        whole, seen = record(model, prompt, side, [p for p in parts if p.kind != "embed"])
    for handle in handles:
        handle.remove()
    at = frozen(norm, kind, found[0])
    rows = model.hf.get_output_embeddings().weight
    direction = rows[prompt.right] - rows[prompt.wrong]
    if model.name == "t5":  # tied to the embedding: transformers scales what it reads
        direction = direction * model.hf.config.d_model**-0.5
    terms = {}
    for part in parts:
        if part.kind == "embed":
            write = first[0]
        elif part.kind == "mlp":
            write = seen[part]
        else:
            module, width = module_of(model, part), seen[part].shape[-1]
            lanes = slice(part.index * width, (part.index + 1) * width)
            transposed = type(module).__name__ == "Conv1D"
            write = seen[part] @ (module.weight[lanes] if transposed else module.weight[:, lanes].T)
        terms[part] = float((at(write) @ direction)[0, prompt.read])
    return terms, whole


@pytest.mark.parametrize("family", FINAL)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_term_is_the_parts_write_through_the_frozen_norm(family: str, padding: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, [6, 9, 7], padding)
    scores = find("direct", model, pairs, parts=KINDS)
    contrast = find("direct", model, pairs, parts=KINDS, contrast=True)
    wholes = []
    for column, prompt in enumerate(prompts(pairs)):
        clean, whole = written_terms(model, prompt, "clean", list(scores.parts))
        corrupted, other = written_terms(model, prompt, "corrupted", list(scores.parts))
        wholes.append((whole, other))
        assert np.allclose(scores.per_example[:, column], list(clean.values()), atol=1e-4)
        difference = [clean[p] - corrupted[p] for p in contrast.parts]
        assert np.allclose(contrast.per_example[:, column], difference, atol=1e-4)
    whole, other = np.mean(wholes, axis=0)
    assert scores.values.sum() + scores.info["bias"] == pytest.approx(whole, abs=1e-4)
    assert scores.info["sum"] == pytest.approx(whole, abs=1e-4)
    assert contrast.values.sum() + contrast.info["bias"] == pytest.approx(whole - other, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_without_biases_the_parts_and_the_embedding_are_all_there_is(family: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, [6, 9, 7], "left")
    scores = find("direct", model, pairs)
    whole = [record(model, p, "clean", [])[0] for p in prompts(pairs)]
    assert scores.info["bias"] == pytest.approx(0, abs=1e-7)
    assert np.allclose(scores.per_example.sum(0), whole, atol=1e-4)


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("task", "last"),
    [
        ("induction", "induction"),
        ("ioi", "mover"),
        ("who-stayed", "mover"),
        ("successor", "successor"),
        ("successor-mlp", "successor"),
    ],
)
def test_in_planted_models_one_part_writes_the_answer(base: str, task: str, last: str) -> None:
    truth, model, pairs = subject(task, base)
    scores = find("direct", model, pairs, contrast=True)
    writer = next(p for p, role in truth.roles.items() if role == last)
    assert scores[writer] == pytest.approx(scores.info["sum"], rel=0.01)
    assert all(abs(v) < 1e-3 * scores[writer] for p, v in zip(scores.parts, scores.values, strict=True) if p != writer)


def test_answers_of_several_tokens_are_refused() -> None:
    model = opened("llama")
    pairs = padded_pairs(model, [6, 6], "left")
    rows = {
        "reads": torch.tensor([[4, 5], [4, 5]]),
        "read_mask": torch.ones(2, 2, dtype=torch.bool),
        "row_example": torch.tensor([0, 0]),
        "row_right": torch.tensor([True, False]),
        "targets": torch.tensor([[7, 8], [9, 10]]),
        "answers": pairs.answers[:1],
        "wrong": pairs.wrong[:1],
        "metric": make_metric("logit-diff", sequence=True),
    }
    several = replace(pairs, **rows)
    assert len(find("attribution-patching", model, several)) == 15  # other methods can
    with pytest.raises(VesaliusError, match="one token.*single-token answers, or another method"):
        find("direct", model, several)


@pytest.mark.parametrize("kind", ["neuron", "heads", "resid_post"])
def test_only_parts_that_write_to_the_stream_have_a_term(kind: str) -> None:
    model = opened("llama")
    with pytest.raises(VesaliusError, match=f"'{kind}'.*head, mlp, xhead"):
        find("direct", model, padded_pairs(model, [6], "left"), parts=f"head,{kind}")
