"""nnsight: one trace a head, as its documentation shows interventions."""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from nnsight import TransformersModel

from bench.hooks import fingerprint, logit_difference, tensors
from bench.work import Job, Outcome, PromptSet, Work


def load(work: Work) -> Any:
    """The traced model around the same local folder, its weights frozen."""
    model = TransformersModel(
        work.folder, task="text-generation", dispatch=True, dtype=getattr(torch, work.dtype), device_map=work.device
    )
    model.eval()
    model.requires_grad_(False)
    return model


def forward(model: Any, work: Work, prompts: PromptSet) -> Job:
    """One trace of all clean prompts."""
    clean, _, answer, wrong = tensors(prompts, work.device)

    @torch.no_grad()
    def run() -> Outcome:
        with model.trace(clean):
            logits = model.output.logits.save()
        return Outcome(logit_difference(logits, answer, wrong).tolist())

    return Job(run)


def capture(model: Any, work: Work, prompts: PromptSet) -> Job:
    """One trace that saves every head's output at every position."""
    clean = tensors(prompts, work.device)[0]

    @torch.no_grad()
    def run() -> Outcome:
        with model.trace(clean):
            kept = nnsight.save([])
            for layer in model.model.layers:
                kept.append(layer.self_attn.o_proj.input)
        return Outcome(fingerprint(kept, work.n_heads))

    return Job(run)


def patch(model: Any, work: Work, prompts: PromptSet) -> Job:
    """One trace a head."""
    clean, corrupted, answer, wrong = tensors(prompts, work.device)

    @torch.no_grad()
    def run() -> Outcome:
        with model.trace(clean):
            source = nnsight.save([])
            for layer in model.model.layers:
                source.append(layer.self_attn.o_proj.input)
        with model.trace(corrupted):
            logits = model.output.logits.save()
        base = logit_difference(logits, answer, wrong)
        size = source[0].shape[-1] // work.n_heads
        effects = []
        for layer, head in work.heads:
            start, stop = head * size, (head + 1) * size
            with model.trace(corrupted):
                model.model.layers[layer].self_attn.o_proj.input[:, :, start:stop] = source[layer][:, :, start:stop]
                logits = model.output.logits.save()
            effects.append(float((logit_difference(logits, answer, wrong) - base).mean()))
        return Outcome(effects, "one trace a head")

    return Job(run)


def nodes(model: Any, work: Work, prompts: PromptSet) -> Job:
    """Attribution patching of every head, all pairs in one batch: two traces, one of them with a backward."""
    clean, corrupted, answer, wrong = tensors(prompts, work.device)

    def run() -> Outcome:
        with torch.no_grad(), model.trace(clean):
            source = nnsight.save([])
            for layer in model.model.layers:
                source.append(layer.self_attn.o_proj.input)
        with model.trace(corrupted):
            target, gradients = nnsight.save([]), nnsight.save([])
            model.model.embed_tokens.output.requires_grad_(True)
            for layer in model.model.layers:
                target.append(layer.self_attn.o_proj.input)
            with logit_difference(model.output.logits, answer, wrong).sum().backward():
                for z in reversed(target):
                    gradients.append(z.grad)
        scores = [
            ((s - t.detach()) * g).unflatten(-1, (work.n_heads, -1)).sum(dim=(0, 1, 3)) / len(answer)
            for s, t, g in zip(source, target, reversed(gradients), strict=True)
        ]
        return Outcome(torch.cat(scores).tolist(), "2 traces, 1 backward, written with its primitives")

    return Job(run)


JOBS = {"forward": forward, "capture": capture, "patch": patch, "nodes": nodes}
MISSING = {"edges": "has no edge method"}
