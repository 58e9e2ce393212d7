"""Value-output circuits against interventions, and successor heads where they were planted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from families import VOCAB, tiny
from torch import Tensor

from vesalius.build import planted
from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.detectors import HeadContext, detect
from vesalius.find.detectors.base import MARGIN, ask
from vesalius.find.detectors.copying import eigenvalues
from vesalius.find.detectors.kinds import kinds_of, series
from vesalius.find.detectors.ov import bearing, head_values, opening, ov_logits
from vesalius.find.detectors.successor import succession
from vesalius.model import Model, Site

FAMILIES = ["llama", "gpt2", "bloom", "gptj", "gemma2", "gpt-neox"]
TOKENS = [7, 11, 30, 55, 90]


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_what_heads_write_when_they_attend_to_the_token_alone(family: str) -> None:
    """Up to what is the same for every token: the values' biases."""
    model = tiny(family)
    ids = torch.tensor([[opening(model), t] for t in TOKENS])
    values = head_values(model, TOKENS)
    for layer in range(model.n_layers):

        def itself(pattern: Tensor) -> Tensor:
            return torch.eye(2).expand_as(pattern).contiguous()

        z = model.run(ids, capture=[Site("z", layer)], taps={Site("pattern", layer): [itself]})["z", layer][:, 1]
        torch.testing.assert_close(centred(values.v[layer]), centred(z), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gptj", "opt-350m"])
def test_bearing_is_the_readout_of_the_write_alone(family: str) -> None:
    model = tiny(family)
    write = torch.randn(4, model.d_model, generator=torch.Generator().manual_seed(0))
    norm = model.anatomy.main.final_norm
    plain = model.readout(write) - model.readout(torch.zeros_like(write))
    scale = torch.ones(4, 1) if norm is None else norm.scale(write)
    torch.testing.assert_close(bearing(model, 1, write) * scale, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bearing(model, 1, write, TOKENS), bearing(model, 1, write)[:, TOKENS])


@pytest.mark.parametrize("form", ["embedding+mlp0", "mlp0"])
def test_static_forms_come_from_the_first_mlp_alone(form: str) -> None:
    model = tiny("llama")
    block = model.anatomy.block(0)
    x = model.hf.get_input_embeddings().weight[TOKENS]
    made = block.module.mlp(block.norm_mid.module(x))
    x = made if form == "mlp0" else x + made
    late = model.anatomy.block(2)
    weight = late.projections["v"].weight.view(2, 8, -1)[torch.tensor([0, 0, 1, 1])]  # two heads share one
    wanted = torch.einsum("td,hed->the", late.norm_in.module(x), weight)
    torch.testing.assert_close(head_values(model, TOKENS, form).v[2], wanted, atol=1e-5, rtol=1e-4)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="contextual"):
        head_values(model, TOKENS, "embedding")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_eigenvalues_are_those_of_the_whole_circuit(family: str) -> None:
    """Of the matrix from every word to every word, for which the small one stands."""
    model = tiny(family)
    a, stack = model.anatomy, model.anatomy.main
    assert stack.final_norm is not None
    embedding = model.hf.get_input_embeddings().weight.double()
    out = model.hf.get_output_embeddings().weight.double()
    found = eigenvalues(model).reshape(model.n_layers, model.n_heads)
    for layer in range(model.n_layers):
        block = a.block(layer)
        for head in range(model.n_heads):
            w = (a.head_in(block, "v")[0][head] @ a.head_out(block)[head]).double()
            whole = (embedding * block.norm_in.gain) @ w @ (out * stack.final_norm.gain).T  # (word, word)
            values = np.linalg.eigvals(whole.numpy())
            assert found[layer, head] == pytest.approx(values.real.sum() / np.abs(values).sum(), abs=1e-3)


def test_copying_is_that_of_a_loop_and_a_head_made_to_copy_does() -> None:
    model = tiny("llama")
    block = model.anatomy.block(1)
    with torch.no_grad():  # head 1 of block 1 writes back what it read, as far as 8 dimensions allow
        q, _ = torch.linalg.qr(torch.randn(model.d_model, 8, generator=torch.Generator().manual_seed(1)))
        block.projections["v"].weight[:8] = q.T
        block.o.weight[:, 8:16] = q
        model.hf.lm_head.weight.copy_(model.hf.get_input_embeddings().weight)
    scores = ask("copying", model, HeadContext(seed=3), tokens=40)
    rng = np.random.default_rng([3, 40])
    sample = rng.choice(np.arange(VOCAB), 40, replace=False).tolist()
    for layer, logits in ov_logits(model, head_values(model, sample), sample):
        for head in range(4):
            hits = [int(logits[head, i].argmax()) == i for i in range(40)]  # the top 1 % of 40 is one
            i = scores.parts.index(model.parts(("head",))[layer * 4 + head])
            assert scores.values[i] == pytest.approx(np.mean(hits))
    assert str(scores.top(1, "value").parts[0]) == "L1.H1"
    assert scores["L1.H1"] > 0.12 and scores.columns["q"][5] < 0.01 and scores.columns["eigen"][5] > 0.9
    assert scores.columns["null"] == pytest.approx(1 / 40, abs=0.003)


@pytest.mark.parametrize("form", ["contextual", "embedding+mlp0"])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_the_planted_successor_head_is_found_and_no_other(base: str, form: str) -> None:
    made = planted("successor", base)
    model = Model.wrap(made.hf, made.tokenizer, name="successor")
    (head,) = (str(p) for p in made.roles)
    found = detect(model, "successor", options={"successor": {"form": form}})
    scores = found["successor"]
    assert scores[head] >= 0.9 and [str(p) for p in found.heads("successor", margin=MARGIN)] == [head]
    idle = [i for i, p in enumerate(scores.parts) if str(p) != head]
    assert np.median(scores.values[idle]) < 0.15
    place = [str(p) for p in scores.parts].index(head)
    assert scores.columns["masked"][place] >= 0.9 and scores.columns["q"][place] < 0.01
    assert scores.columns["centred"][place] >= 0.9 and scores.columns["centred_q"][place] < 0.01
    assert set(scores.info["kinds"]) >= {"days", "months", "number words", "letters"}


@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_what_a_head_says_whatever_it_reads_is_taken_off(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planted("successor", base)
    model = Model.wrap(made.hf, made.tokenizer, name="successor")
    place = [str(p) for p in model.parts(("head",))].index(str(next(iter(made.roles))))
    kinds = kinds_of(model)
    plain = succession(model, kinds)

    def louder(*given: object) -> Iterator[tuple[int, Tensor]]:
        for layer, logits in ov_logits(*given):  # type: ignore[arg-type]
            offset = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(layer))
            yield layer, logits.double() + 3 * logits.abs().max() * offset

    monkeypatch.setattr("vesalius.find.detectors.successor.ov_logits", louder)
    found = succession(model, kinds)
    assert found.values[place] < 0.3 and found.columns["centred"][place] >= 0.9
    np.testing.assert_allclose(found.columns["centred"], plain.columns["centred"], atol=0.02)


def test_series_take_the_form_that_the_vocabulary_has() -> None:
    made = planted("successor", "gpt2")
    model = Model.wrap(made.hf, made.tokenizer)
    kinds = {k.name: k for k in kinds_of(model)}
    days = kinds["days"]
    assert [t.strip() for t in days.texts] == [d.lower() for d in series()["days"][0]]
    assert days.follows == (1, 2, 3, 4, 5, 6, 0)
    letters = kinds["letters"]  # X is the last this vocabulary knows
    assert len(letters.tokens) == 24 and letters.follows[-1] == -1 and len(letters.pairs) == 23
    assert [k.name for k in kinds_of(model, "months,days")] == ["months", "days"]
    with pytest.raises(UnknownName, match="months"):
        kinds_of(model, "month")
    with pytest.raises(VesaliusError, match="ordinals"):
        kinds_of(model, "ordinals")


@pytest.mark.real
@pytest.mark.slow
def test_the_strongest_head_of_the_default_model(smollm2: Model) -> None:
    """23.3 names successors most often; once the item itself may not win, 24.7 does: a copier with a bias."""
    scores = detect(smollm2, "successor")["successor"]
    assert str(scores.top(1, "value").parts[0]) == "L23.H3"
    assert scores.columns["q"][int(np.argmax(scores.values))] < 0.05
    assert str(scores.parts[int(np.argmax(scores.columns["masked"]))]) == "L24.H7"
