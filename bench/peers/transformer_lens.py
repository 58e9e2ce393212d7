"""TransformerLens 4 (TransformerBridge), by its own utilities.

Patching is `patching.get_act_patch_attn_head_out_all_pos`; attribution is `tools.analysis.attribution_patching`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

from bench.hooks import fingerprint, logit_difference, tensors
from bench.work import Job, Outcome, PromptSet, Refused, Work


def load(work: Work) -> Any:
    """The bridge around the same local folder, its weights frozen but for the embedding.

    Attribution needs a graph to start somewhere; with every weight trainable it would only keep more memory.
    """
    model = TransformerBridge.boot_transformers(work.folder, device=work.device, dtype=getattr(torch, work.dtype))
    model.eval().requires_grad_(False)
    model.original_model.get_input_embeddings().requires_grad_(True)
    return model


def _is_head_output(name: str) -> bool:
    return name.endswith("attn.hook_z")


def _hook(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def forward(model: Any, work: Work, prompts: PromptSet) -> Job:
    """One forward of all clean prompts."""
    clean, _, answer, wrong = tensors(prompts, work.device)

    @torch.no_grad()
    def run() -> Outcome:
        return Outcome(logit_difference(model(clean), answer, wrong).tolist())

    return Job(run)


def capture(model: Any, work: Work, prompts: PromptSet) -> Job:
    """`run_with_cache`, filtered to head outputs."""
    clean = tensors(prompts, work.device)[0]

    @torch.no_grad()
    def run() -> Outcome:
        _, cache = model.run_with_cache(clean, names_filter=_is_head_output)
        outputs = [cache[_hook(layer)].flatten(2) for layer in range(work.n_layers)]
        return Outcome(fingerprint(outputs, work.n_heads))

    return Job(run)


def patch(model: Any, work: Work, prompts: PromptSet) -> Job:
    """The library's own sweep over heads."""
    clean, corrupted, answer, wrong = tensors(prompts, work.device)

    def metric(logits: Tensor) -> Tensor:
        return logit_difference(logits, answer, wrong).mean()

    @torch.no_grad()
    def run() -> Outcome:
        _, cache = model.run_with_cache(clean, names_filter=_is_head_output)
        base = metric(model(corrupted))
        if work.complete:
            values = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric).flatten()
        else:
            sample = pd.DataFrame(work.heads, columns=["layer", "head"])
            setter = patching.layer_head_vector_patch_setter
            values = patching.generic_activation_patch(model, corrupted, cache, metric, setter, "z", index_df=sample)
        return Outcome((values - base.to(values)).tolist(), "get_act_patch_attn_head_out_all_pos")

    return Job(run)


def nodes(model: Any, work: Work, prompts: PromptSet) -> Job:
    """`attribution_patch` over every node and position, summed over positions for the heads."""
    return _attribution(model, work, prompts, "node")


def edges(model: Any, work: Work, prompts: PromptSet) -> Job:
    """`attribution_patch` at edge granularity; the library refuses some models."""
    return _attribution(model, work, prompts, "edge")


def _attribution(model: Any, work: Work, prompts: PromptSet, granularity: Any) -> Job:
    clean, corrupted, answer, wrong = tensors(prompts, work.device)

    def run() -> Outcome:
        totals = torch.zeros(work.n_layers, work.n_heads)
        for i in range(len(answer)):  # the metric differs from pair to pair, and its function sees logits alone
            row = slice(i, i + 1)

            def metric(logits: Tensor, row: slice = row) -> Tensor:
                return logit_difference(logits, answer[row], wrong[row]).sum()

            try:
                config = EdgeAttributionConfig(granularity=granularity)
                result = attribution_patch(model, clean[row], corrupted[row], metric, config)
            except (ValueError, NotImplementedError) as reason:
                raise Refused(str(reason).strip().splitlines()[0]) from reason
            for node, value in result.node_scores.items():
                if node.kind == "attn_head_out":
                    totals[node.layer, node.head] += float(value)
        return Outcome((totals / len(answer)).flatten().tolist(), "also scores MLPs and positions; one pair at a time")

    return Job(run)


JOBS = {"forward": forward, "capture": capture, "patch": patch, "nodes": nodes, "edges": edges}
