"""A card tells what changed, with the interval of the change, against plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from families import some_ids, tiny

from vesalius.change import Keep, cut, recording
from vesalius.corpus import far_news
from vesalius.errors import VesaliusError
from vesalius.evaluate.card import Measured, Yardstick, card, foretold, measure
from vesalius.model import Model


def yard(rows: int = 6) -> Yardstick:
    return Yardstick(some_ids(rows, 12), timed=False)


def table(before: Measured, after: Measured) -> dict[str, dict[str, float]]:
    return {str(r["metric"]): r for r in card(before, after).to_dict("records")}  # type: ignore[misc]


def test_a_model_beside_itself_has_not_changed() -> None:
    model = tiny("llama")
    one = measure(model, yard(), base=model)
    rows = table(one, one)
    assert rows["perplexity"]["change"] == rows["perplexity"]["low"] == rows["perplexity"]["high"] == 1.0
    assert rows["divergence"]["after"] == pytest.approx(0, abs=1e-9)
    assert rows["parameters"]["change"] == rows["bytes"]["change"] == 1.0


def test_losses_and_divergences_are_those_of_plain_transformers() -> None:
    model, other = tiny("gpt2"), tiny("gpt2", seed=1)
    ids = yard().text
    found = measure(other, yard(), base=model)
    q, p = (m.hf(ids).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    loss = torch.stack([torch.stack([-p[r, t, ids[r, t + 1]] for t in range(11)]).mean() for r in range(6)])
    assert np.allclose(found.loss, loss.numpy(), atol=1e-5)
    kl = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean(1)
    assert found.divergence is not None and np.allclose(found.divergence, kl.numpy(), atol=1e-5)


def test_what_was_taken_out_and_zeroed_is_counted() -> None:
    model = tiny("llama")
    keep = Keep.of(model, neurons={i: range(40) for i in range(model.n_layers)})
    rows = table(measure(model, yard()), measure(cut(model, keep), yard(), base=model))
    gone = 8 * 3 * 32 * model.n_layers
    assert rows["parameters"]["before"] - rows["parameters"]["after"] == gone
    assert rows["bytes"]["before"] - rows["bytes"]["after"] == 4 * gone
    assert rows["divergence"]["low"] <= rows["divergence"]["after"] <= rows["divergence"]["high"]
    before = measure(model, yard())
    with recording(model, "zeros") as recorder:
        recorder.set("model.norm.weight", torch.zeros(32), "all")
    rows = table(before, measure(model, yard()))
    assert rows["not zero"]["before"] - rows["not zero"]["after"] == 32 and rows["parameters"]["change"] == 1
    assert rows["perplexity"]["after"] == pytest.approx(97, rel=1e-5)  # nothing is known: the size of the vocabulary


def test_a_paired_interval_holds_the_change_and_shrinks_with_rows() -> None:
    rng = np.random.default_rng(0)

    def pair(n: int) -> dict[str, float]:
        loss = rng.normal(3, 1, n)
        before, after = (Measured("m", x, None, {}, {}) for x in (loss, loss + rng.normal(0.1, 0.05, n)))
        return table(before, after)["perplexity"]

    few, many = pair(16), pair(1024)
    for row in (few, many):
        assert row["low"] < np.exp(0.1) < row["high"]
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 4


def test_unlike_measurements_are_not_compared() -> None:
    model = tiny("llama")
    with pytest.raises(VesaliusError, match="different text or prompts"):
        card(measure(model, yard(4)), measure(model, yard(6)))
    with pytest.raises(VesaliusError, match="models that foretell tokens"):
        measure(tiny("t5"), yard())
    with pytest.raises(VesaliusError, match="without a tokenizer, so no words can be hidden"):
        measure(tiny("bert"), yard())


def test_a_masked_model_is_asked_for_hidden_words() -> None:
    """The same words of both models; losses and hits are those of plain transformers at these places."""
    reader = far_news.tokenizer(64)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = tf.BertConfig(
            vocab_size=len(reader), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        models.append(Model.wrap(tf.BertForMaskedLM(config), reader, name=f"bert-{seed}"))
    model, other = models
    ids = torch.randint(5, len(reader), (6, 40), generator=torch.Generator().manual_seed(0))
    yard = Yardstick(ids, timed=True)
    asked = foretold(model, yard)
    given, targets = asked.inputs["input_ids"], asked.targets
    assert (given[:, 0] == reader.cls_token_id).all() and (given[:, -1] == reader.sep_token_id).all()
    assert (targets[targets != -100] == torch.cat([ids[:, :1], ids], 1)[:, :40][targets != -100]).all()
    assert 20 <= int((targets != -100).sum()) <= 50
    found = measure(other, yard, base=model)
    with torch.no_grad():
        p, q = (m.hf(given, attention_mask=asked.inputs.get("attention_mask")).logits.double() for m in (model, other))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    losses, kl, right = [], [], []
    for row in range(6):
        at = [i for i in range(40) if int(targets[row, i]) != -100]
        losses.append(float(torch.stack([-q[row, i, targets[row, i]] for i in at]).mean()))
        kl.append(float(torch.stack([(p[row, i].exp() * (p[row, i] - q[row, i])).sum() for i in at]).mean()))
        right += [bool(q[row, i].argmax() == targets[row, i]) for i in at]
    assert np.allclose(found.loss, losses, atol=1e-5) and found.right["hidden words"].tolist() == right
    assert found.divergence is not None and np.allclose(found.divergence, kl, atol=1e-5)
    rows = table(measure(model, yard), found)
    assert {"hidden words accuracy", "perplexity", "prefill"} <= set(rows) and "decode" not in rows
