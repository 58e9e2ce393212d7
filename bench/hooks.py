"""The naive engine: Hugging Face's model and hand-written PyTorch hooks, as anyone would write them.

Exact patching is one hook and one full forward a head. For models whose blocks are at `model.layers[i]` with
`self_attn.o_proj` (Llama, Mistral, Qwen, Gemma, Phi-3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.work import Job, Outcome, PromptSet, Work


def load(work: Work) -> nn.Module:
    """The model, frozen and in evaluation mode."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(work.folder, dtype=getattr(torch, work.dtype))
    return model.to(work.device).eval().requires_grad_(False)


def tensors(prompts: PromptSet, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean and corrupted ids (pair, pos), answers and wrong answers (pair,)."""
    rows = (prompts.clean, prompts.corrupted, prompts.answer, prompts.wrong)
    clean, corrupted, answer, wrong = (torch.tensor(row, device=device) for row in rows)
    return clean, corrupted, answer, wrong


def logit_difference(logits: Tensor, answer: Tensor, wrong: Tensor) -> Tensor:
    """Right minus wrong answer's logit at the last position, (pair,), from logits (pair, pos, vocabulary)."""
    last = logits[:, -1].float()
    return (last.gather(1, answer[:, None]) - last.gather(1, wrong[:, None]))[:, 0]


def projections(model: Any) -> list[nn.Module]:
    """The output projection of every block's attention; its input is all head outputs side by side."""
    return [block.self_attn.o_proj for block in model.model.layers]


def head_outputs(model: Any, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Head outputs of every block (pair, pos, head * d_head), and the logits."""
    kept: list[Tensor] = []
    handles = [p.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for p in projections(model)]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return kept, logits


def fingerprint(outputs: list[Tensor], n_heads: int) -> list[float]:
    """Mean of each head's output at the last position, for comparison between engines."""
    return [float(v) for z in outputs for v in z[:, -1].float().unflatten(-1, (n_heads, -1)).mean(dim=(0, 2))]


def forward(model: Any, work: Work, prompts: PromptSet) -> Job:
    """One forward of all clean prompts."""
    clean, _, answer, wrong = tensors(prompts, work.device)

    @torch.no_grad()
    def run() -> Outcome:
        return Outcome(logit_difference(model(input_ids=clean, use_cache=False).logits, answer, wrong).tolist())

    return Job(run)


def capture(model: Any, work: Work, prompts: PromptSet) -> Job:
    """One forward that keeps every head's output at every position."""
    clean = tensors(prompts, work.device)[0]

    @torch.no_grad()
    def run() -> Outcome:
        return Outcome(fingerprint(head_outputs(model, clean)[0], work.n_heads))

    return Job(run, torch.no_grad()(lambda: model(input_ids=clean, use_cache=False).logits))


def patch(model: Any, work: Work, prompts: PromptSet) -> Job:
    """Exact patching: each head's clean output into the corrupted run, one full forward each."""
    clean, corrupted, answer, wrong = tensors(prompts, work.device)

    @torch.no_grad()
    def run() -> Outcome:
        source, _ = head_outputs(model, clean)
        base = logit_difference(model(input_ids=corrupted, use_cache=False).logits, answer, wrong)
        size = source[0].shape[-1] // work.n_heads
        effects = []
        for layer, head in work.heads:
            columns = slice(head * size, (head + 1) * size)

            def replace(
                _: nn.Module, args: tuple[Tensor], layer: int = layer, columns: slice = columns
            ) -> tuple[Tensor]:
                z = args[0].clone()
                z[..., columns] = source[layer][..., columns]
                return (z,)

            handle = projections(model)[layer].register_forward_pre_hook(replace)
            try:
                logits = model(input_ids=corrupted, use_cache=False).logits
            finally:
                handle.remove()
            effects.append(float((logit_difference(logits, answer, wrong) - base).mean()))
        return Outcome(effects, f"{len(effects)} forwards")

    return Job(run)


def nodes(model: Any, work: Work, prompts: PromptSet) -> Job:
    """Attribution patching of every head: two forwards and one backward, all pairs in one batch."""
    clean, corrupted, answer, wrong = tensors(prompts, work.device)

    def run() -> Outcome:
        with torch.no_grad():
            source, _ = head_outputs(model, clean)
        start = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        try:
            target, logits = head_outputs(model, corrupted)
        finally:
            start.remove()
        gradients = torch.autograd.grad(logit_difference(logits, answer, wrong).sum(), target)
        scores = [
            ((s - t.detach()) * g).unflatten(-1, (work.n_heads, -1)).sum(dim=(0, 1, 3)) / len(answer)
            for s, t, g in zip(source, target, gradients, strict=True)
        ]
        return Outcome(torch.cat(scores).tolist(), "2 forwards, 1 backward")

    return Job(run, torch.no_grad()(lambda: model(input_ids=clean, use_cache=False).logits))


JOBS = {"forward": forward, "capture": capture, "patch": patch, "nodes": nodes}
MISSING = {"edges": "nobody writes this by hand"}
