"""Indirect object identification in a real model: found on some prompts, proved on others.

The bounds leave room for another processor's rounding; what was measured stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import vesalius
from vesalius.model import Model, Pairs
from vesalius.parts import parse_part
from vesalius.prove import smallest
from vesalius.prove.faithfulness import evaluate
from vesalius.prove.proof import controls
from vesalius.scores import Scores
from vesalius.tasks.base import Task

pytestmark = [pytest.mark.real, pytest.mark.slow]
N = 16


@dataclass(frozen=True)
class Study:
    model: Model
    finding: Task
    proving: Task
    pairs: Pairs
    exact: Scores


@pytest.fixture(scope="module")
def study(smollm2: Model) -> Study:
    finding = vesalius.task("ioi", n=N, seed=0)
    proving = finding.held_out(N)
    pairs = finding.pairs(smollm2)
    return Study(
        smollm2, finding, proving, pairs, vesalius.find("activation-patching", smollm2, pairs, direction="noise")
    )


def plain_difference(model: Model, prompt: str, answer: str, wrong: str) -> float:
    """Right minus wrong at the last token of one prompt alone, by transformers."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    right, other = (model.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (answer, wrong))
    with torch.no_grad():
        logits = model.hf(ids).logits[0, -1]
    return float(logits[right] - logits[other])


def test_the_model_does_the_task(study: Study) -> None:
    """Measured: 32 of 32 right, the logit difference 4.7 and 3.9."""
    differences = {}
    for name, task in (("finding", study.finding), ("proving", study.proving)):
        examples = task.examples(study.model.tokenizer)
        differences[name] = [plain_difference(study.model, e.clean, e.answer[0], e.wrong[0]) for e in examples]
    both = np.array([*differences["finding"], *differences["proving"]])
    assert (both > 0).mean() >= 0.9
    assert all(np.mean(d) > 2 for d in differences.values())


def test_exact_patching_is_one_plain_hook_on_one_prompt(study: Study) -> None:
    """The strongest heads, an MLP and a head that does nothing, each prompt alone and without padding."""
    model, exact = study.model, study.exact
    examples = study.finding.examples(model.tokenizer)
    heads = [str(p) for p in exact.kind("head").top(3).parts]
    width = model.hf.config.head_dim
    for index in (0, 7, 15):
        e = examples[index]
        for name in [*heads, "L0.H0", "L14.MLP"]:
            part = parse_part(name)
            layer = model.hf.model.layers[part.layer]
            module = layer.self_attn.o_proj if part.kind == "head" else layer.mlp
            lanes = slice(part.index * width, (part.index + 1) * width) if part.kind == "head" else slice(None)
            seen: list[Tensor] = []

            def change(x: Tensor, seen: list[Tensor] = seen, lanes: slice = lanes) -> Tensor:
                if not seen:
                    seen.append(x.clone())
                    return x
                x = x.clone()
                x[..., lanes] = seen[0][..., lanes]
                return x

            if part.kind == "head":
                handle = module.register_forward_pre_hook(lambda _, args, change=change: (change(args[0]),))
            else:
                handle = module.register_forward_hook(lambda _, __, out, change=change: change(out))
            plain = plain_difference(model, e.corrupted, e.answer[0], e.wrong[0])  # records
            patched = plain_difference(model, e.clean, e.answer[0], e.wrong[0])
            handle.remove()
            clean = plain_difference(model, e.clean, e.answer[0], e.wrong[0])
            assert plain < clean
            row = exact.per_example[list(exact.parts).index(part)]
            assert row[index] == pytest.approx(clean - patched, abs=2e-4), (name, index)


def test_a_quarter_of_the_heads_does_the_job_on_prompts_not_used_to_find_them(study: Study) -> None:
    """Measured: 37 of 270 heads and 23 MLPs, faithfulness 0.89 [0.85, 0.94].

    Of 40 random circuits of its size 37 keep at most 0.05. The other three keep 0.36, 0.42 and 0.52, and each holds
    L23.H3, one of the two strongest heads.
    """
    mine = {e.clean for e in study.finding.examples(study.model.tokenizer)}
    theirs = {e.clean for e in study.proving.examples(study.model.tokenizer)}
    assert len(mine) == len(theirs) == N and mine.isdisjoint(theirs)
    circuit, _ = smallest(study.exact, study.model, study.pairs, target=0.8, max_heads=0.25)
    proof = circuit.prove(study.model, study.proving, ablations=("counterfactual",), curve=False)
    faithfulness = float(proof.faithfulness["counterfactual"].values[0])
    assert len(circuit.heads) <= 0.25 * len(study.model.parts(("head",)))
    assert faithfulness >= 0.8
    drawn = controls(circuit, study.model, 40, 1000)
    values, ends = evaluate(study.model, study.proving.pairs(study.model), drawn)
    random = (values.mean(1) - ends.empty.mean()) / (ends.full.mean() - ends.empty.mean())
    assert np.allclose(random[:10], proof.random["counterfactual"], atol=1e-3)  # the proof's own ten come first
    strongest = set(study.exact.kind("head").top(2).parts)
    without_them = np.array([not strongest & c.nodes for c in drawn])
    assert without_them.sum() >= 20
    assert faithfulness > random[without_them].max() + 0.5
    assert faithfulness > random.mean() + 0.5 and faithfulness > random.max() + 0.2
    assert np.mean(faithfulness > random + 0.5) >= 0.9
    # Without the circuit the rest of the model does nothing of the job.
    without = proof.completeness.set_index("removed").loc["all of it", "model_without"]
    assert abs(without) < 0.1


def test_relevance_and_integrated_gradients_agree_with_exact_patching_where_plain_gradients_fail(study: Study) -> None:
    """Measured for heads and MLPs: RelP 0.975 and 0.938, EAP-IG 0.956 and 0.986, plain gradient 0.880 and 0.254."""
    estimates = {
        "relp": vesalius.find("relp", study.model, study.pairs, direction="noise"),
        "eap-ig": vesalius.find("eap-ig", study.model, study.pairs),
        "plain": vesalius.find("attribution-patching", study.model, study.pairs, direction="noise"),
    }
    heads = {name: s.kind("head").correlation(study.exact.kind("head")) for name, s in estimates.items()}
    mlps = {name: s.kind("mlp").correlation(study.exact.kind("mlp")) for name, s in estimates.items()}
    assert heads["relp"] > 0.95 and heads["eap-ig"] > 0.93
    assert mlps["relp"] > 0.88 and mlps["eap-ig"] > 0.95
    assert heads["relp"] > heads["plain"]
    assert mlps["relp"] > mlps["plain"] + 0.3
    # The heads that matter most are the same ones, whoever looks.
    for name in ("relp", "eap-ig"):
        assert estimates[name].kind("head").overlap(study.exact.kind("head"), 10) >= 0.7, name
