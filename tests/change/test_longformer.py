"""BERT and RoBERTa as Longformers: the same hidden states, tiled positions, and files that transformers opens alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import VOCAB, tiny

import vesalius
from vesalius.change.longformer import tiled, to_longformer
from vesalius.corpus import far_news
from vesalius.errors import ModelError, PartError, VesaliusError
from vesalius.model import Model
from vesalius.model.global_attention import global_attention
from vesalius.model.saving import save_model
from vesalius.model.sources.quiet import quiet_transformers

LENGTHS = {"bert": 64, "roberta": 69}  # positions that the tiny models have
BOTH = ["bert", "roberta"]


def rows(family: str, length: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask, the second row shorter."""
    ids = torch.randint(5, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def hidden(hf: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    """All hidden states of what is no padding."""
    with quiet_transformers():
        states = hf(input_ids=ids, attention_mask=mask, output_hidden_states=True, **more).hidden_states
    return torch.stack(states)[:, mask.bool()]


@pytest.mark.parametrize("family", BOTH)
def test_with_a_window_as_wide_as_the_text_it_is_the_source(family: str) -> None:
    model, length = tiny(family), 48
    before = {n: p.clone() for n, p in model.hf.state_dict().items()}
    made = to_longformer(model, window=2 * length, length=LENGTHS[family], global_tokens=0)
    ids, mask = rows(family, length)
    assert global_attention(made.hf, ids)["global_attention_mask"].sum() == 0
    assert torch.allclose(hidden(model.hf, ids, mask), hidden(made.hf, ids, mask), atol=1e-3)
    ours, theirs = made.logits(ids, mask), model.logits(ids, mask)
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-3)  # the head too
    assert all(torch.equal(p, before[n]) for n, p in model.hf.state_dict().items())
    # the check can fail: through a narrow window it is another model
    narrow = to_longformer(model, window=8, length=LENGTHS[family], global_tokens=0)
    assert not torch.allclose(hidden(model.hf, ids, mask), hidden(narrow.hf, ids, mask), atol=1e-1)


@pytest.mark.parametrize("family", BOTH)
def test_positions_repeat_beyond_those_learnt(family: str) -> None:
    model, learnt = tiny(family), LENGTHS[family]
    made = to_longformer(model, window=16, length=3 * learnt + 5)
    table = {m: x.hf.base_model.embeddings.position_embeddings.weight for m, x in (("old", model), ("new", made))}
    first = 1 if family == "roberta" else 0  # the tiny models pad with token 0
    new = table["new"][1:]
    assert made.hf.config.max_position_embeddings == len(table["new"]) == 3 * learnt + 6
    for i in (0, 1, learnt - 1, learnt, 2 * learnt + 3, 3 * learnt + 4):
        assert torch.equal(new[i], table["old"][first + i % learnt])
    ids = torch.full((1, learnt + 1), 7)
    with torch.no_grad():
        embedded = made.hf.base_model.embeddings(ids)[0]
    assert torch.allclose(embedded[0], embedded[learnt]) and not torch.allclose(embedded[0], embedded[1])


def test_an_offset_of_two_as_in_robertas_own_checkpoints() -> None:
    """pad_token_id 1: positions 0 and 1 are of no token, the first token has row 2."""
    config = tf.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=22, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Model.wrap(tf.RobertaForMaskedLM(config), name="roberta")
    made = to_longformer(model, window=40, length=20, global_tokens=0)
    old, new = (m.hf.base_model.embeddings.position_embeddings.weight for m in (model, made))
    assert torch.equal(old, new)  # as long as before: the same table
    ids = torch.randint(3, 40, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    assert torch.allclose(hidden(model.hf, ids, mask), hidden(made.hf, ids, mask), atol=1e-4)
    longer = to_longformer(model, window=4, length=50).hf.base_model.embeddings.position_embeddings.weight
    assert len(longer) == 52 and torch.equal(longer[2 + 45], old[2 + 5]) and torch.equal(longer[:2], old[:2])
    assert tiled(torch.arange(3.0)[:, None], 0, 1, 4)[:, 0].tolist() == [0, 0, 1, 2, 0]


def test_global_projections_begin_as_the_local_ones_and_cls_reads_all() -> None:
    model = tiny("bert")
    made = to_longformer(model, window=4, length=64)
    for layer in made.hf.base_model.encoder.layer:
        own = layer.attention.self
        for side in ("query", "key", "value"):
            assert torch.equal(getattr(own, side).weight, getattr(own, f"{side}_global").weight)
            assert torch.equal(getattr(own, side).bias, getattr(own, f"{side}_global").bias)
            assert getattr(own, side).weight.data_ptr() != getattr(own, f"{side}_global").weight.data_ptr()
    ids = torch.randint(5, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 39] = 5 if int(ids[0, 39]) != 5 else 6

    def moved(m: Model, place: int) -> bool:
        one, two = (m.run(x, capture=[("resid_post", 0)])["resid_post", 0][0, place] for x in (ids, other))
        return not torch.allclose(one, two, atol=1e-6)

    assert moved(made, 0) and not moved(made, 20)  # far from the change: only the global position sees it
    without = to_longformer(model, window=4, length=64, global_tokens=0)
    assert not moved(without, 0)


def test_what_is_saved_opens_in_plain_transformers(tmp_path: Path) -> None:
    tokenizer = far_news.tokenizer(64)
    config = tf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    source = Model.wrap(tf.BertForMaskedLM(config), tokenizer, name="bert")
    made = to_longformer(source, window=8, length=200)
    assert (made.tokenizer.model_max_length, tokenizer.model_max_length) == (200, 64)
    save_model(made, tmp_path / "long", {"change": "longformer"})
    ids = tokenizer("nobody had forgotten belaba by then .", return_tensors="pt")["input_ids"]
    torch.save({"ids": ids, "logits": made.logits(ids)}, tmp_path / "told.pt")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        "model = AutoModelForMaskedLM.from_pretrained(sys.argv[1])\n"
        "told = torch.load(sys.argv[2])\n"
        "mask = torch.zeros_like(told['ids']); mask[:, 0] = 1\n"
        "with torch.no_grad(): found = model(told['ids'], global_attention_mask=mask).logits\n"
        "assert type(model).__name__ == 'LongformerForMaskedLM' and 'vesalius' not in sys.modules\n"
        "assert torch.allclose(found, told['logits'], atol=1e-5)\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1]).model_max_length == 200\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "long", tmp_path / "told.pt"], check=True)
    again = vesalius.open(str(tmp_path / "long"))
    assert again.kind == "masked" and again.hf.config.global_tokens == 1
    assert torch.equal(again.logits(ids), made.logits(ids))


def test_its_heads_are_not_shown_and_the_rest_is() -> None:
    made = to_longformer(tiny("bert"), window=4, length=64)
    ids = torch.randint(5, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = made.run(ids, capture=[("resid_mid", 1), ("neurons", 1), ("attn_out", 0)])
    assert seen["neurons", 1].shape == (2, 12, 48) and seen["attn_out", 0].shape == (2, 12, 32)
    for site in ("q", "pattern"):
        with pytest.raises(PartError, match="longformer shows no"):
            made.run(ids, capture=[(site, 0)])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ModelError, match="is llama; a Longformer is made of BERT or RoBERTa"):
        to_longformer(tiny("llama"), 8, 64)
    with pytest.raises(VesaliusError, match="window 7 is no even number"):
        to_longformer(tiny("bert"), 7, 64)
    with pytest.raises(VesaliusError, match="length 0"):
        to_longformer(tiny("bert"), 8, 0)
