"""Masks: what may be read is read, and nothing else, proved by the gradient over all pairs of positions."""

from __future__ import annotations

import pytest
import torch
from families import CAUSAL, MASKED, some_ids, tiny_hf
from torch.nn.attention.flex_attention import create_mask

from vesalius.errors import VesaliusError
from vesalius.train.masks import (
    PADDING,
    REFUSES_MASK,
    TAKES_MASK,
    Mask,
    attention_inputs,
    compare,
    leaks,
    packed_inputs,
    positions,
)

LENGTH = 9
PACKED = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [3, 3, 4, 4, 4, 4, 5, -1, -1], [7] * 9])
ONE = torch.zeros(3, LENGTH, dtype=torch.long)
PADDED = torch.tensor([[0] * 9, [0] * 7 + [-1] * 2, [0] * 4 + [-1] * 5])
PACKED_PREFIX = torch.tensor(
    [[1, 1, 1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool
)
MASKS = {
    "causal": Mask.causal(ONE),
    "causal, packed": Mask.causal(PACKED),
    "causal, padded": Mask.causal(PADDED),
    "causal, padded before": Mask.causal(PADDED.flip(1)),
    "prefix": Mask.prefix(ONE, torch.tensor([0, 4, 9])),
    "prefix, packed": Mask.prefix(PACKED, PACKED_PREFIX),
    "full, packed": Mask.full(PACKED),
    "full, padded": Mask.full(PADDED),
    "full": Mask.full(ONE),
}
DECODERS = [f for f in CAUSAL if f not in ("bloom", "mistral", "gemma2", "gemma3", "gpt-neox-serial", "llama-bias")]
IDS = some_ids(3, LENGTH)


def by_definition(mask: Mask) -> torch.Tensor:
    """The definition at the head of the module, one pair at a time."""
    out = torch.zeros(len(mask), mask.query.shape[1], mask.key.shape[1], dtype=torch.bool)
    for r in range(len(out)):
        for t in range(out.shape[1]):
            for s in range(out.shape[2]):
                both = mask.both_ways is not None and bool(mask.both_ways[r, s])
                order = s <= t or both or mask.shape == "full"
                out[r, t, s] = order and mask.query[r, t] == mask.key[r, s] != PADDING
    return out


@pytest.mark.parametrize("name", MASKS)
def test_mask_is_its_definition_in_every_form(name):
    mask = MASKS[name]
    allowed = mask.allowed()
    pad = mask.query == PADDING
    expected = by_definition(mask) | torch.diag_embed(pad)
    assert torch.equal(allowed[:, 0], expected)
    assert allowed.any(-1).all()  # no empty softmax
    assert torch.equal(mask.additive(torch.bfloat16) == 0, allowed)
    assert mask.additive(torch.bfloat16).dtype == torch.bfloat16
    block = mask.block(block_size=128)
    dense = create_mask(block.mask_mod, 3, 1, LENGTH, LENGTH, device="cpu")
    assert torch.equal(dense, allowed)
    blocks = block.to_dense()
    assert blocks.shape == (3, 1, 1, 1)
    assert torch.equal(mask[1:2].allowed(), allowed[1:2])


def test_cross_mask_in_every_form():
    decoder = torch.tensor([[0, 0, 1, 1, -1]])
    encoder = torch.tensor([[0, 0, 0, 1, -1, -1]])
    mask = Mask.cross(decoder, encoder)
    expected = by_definition(mask) | (decoder == PADDING)[:, :, None]
    assert torch.equal(mask.allowed()[:, 0], expected)
    assert torch.equal(create_mask(mask.block().mask_mod, 1, 1, 5, 6, device="cpu"), mask.allowed())


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_decoders_read_exactly_what_is_allowed(family, how):
    model = tiny_hf(family)
    try:
        model.set_attn_implementation(how)
    except ValueError:
        pytest.skip(f"{family} has no {how} attention in transformers")
    for name, mask in MASKS.items():
        assert leaks(model, mask, IDS) == (0, 0), name
        if "packed" in name:
            assert leaks(model, mask, IDS, restart_positions=True) == (0, 0), name


@pytest.mark.parametrize("family", MASKED)
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_encoders_read_exactly_what_is_allowed(family, how):
    model = tiny_hf(family)
    model.set_attn_implementation(how)
    for name, mask in MASKS.items():
        assert leaks(model, mask, IDS) == (0, 0), name


def test_every_prefix_length():
    model = tiny_hf("llama")
    segments = torch.zeros(LENGTH + 1, LENGTH, dtype=torch.long)
    assert leaks(model, Mask.prefix(segments, torch.arange(LENGTH + 1)), some_ids(LENGTH + 1, LENGTH)) == (0, 0)


def test_a_leak_is_found():
    model = tiny_hf("llama")
    vectors = model.get_input_embeddings()(IDS).detach().requires_grad_()
    from vesalius.train.masks import _read

    read = _read(model(inputs_embeds=vectors).logits, vectors)  # causal over the whole row
    violations, missing = compare(Mask.causal(PACKED), read)
    assert violations > 0 and missing == 0
    violations, missing = compare(Mask.full(ONE), read)
    assert violations == 0 and missing == 3 * LENGTH * (LENGTH - 1) // 2


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_encoder_decoder_reads_exactly_what_is_allowed(family, how):
    from vesalius.train.masks import _read

    model = tiny_hf(family)
    model.set_attn_implementation(how)
    encoder_docs = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, -1, -1]])
    decoder_docs = torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, -1, -1]])
    one = torch.zeros(2, 5, dtype=torch.long)
    padded = torch.tensor([[0] * 7, [0] * 4 + [-1] * 3])
    ids, decoder_ids = some_ids(2, 7), some_ids(2, 5, seed=1)
    for packed, encoder, decoder in [
        (True, Mask.full(encoder_docs), Mask.causal(decoder_docs)),
        (False, Mask.full(padded), Mask.causal(one)),
    ]:
        read_from = model.get_input_embeddings()(ids).detach().requires_grad_()
        written = model.get_input_embeddings()(decoder_ids).detach().requires_grad_()
        if packed:
            hook = model.encoder.register_forward_pre_hook(
                lambda module, args, kwargs, v=read_from: (args, kwargs | {"input_ids": None, "inputs_embeds": v}),
                with_kwargs=True,
            )
            inputs = packed_inputs(model, ids, encoder, decoder)
            hook.remove()
        else:
            inputs = {"inputs_embeds": read_from} | attention_inputs(encoder, model)
        logits = model(decoder_inputs_embeds=written, **inputs).logits
        assert compare(decoder, _read(logits, written)) == (0, 0)
        assert compare(Mask.cross(decoder.query, encoder.key), _read(logits, read_from)) == (0, 0)


def test_a_causal_model_keeps_its_fast_path():
    model = tiny_hf("llama")
    assert attention_inputs(Mask.causal(ONE), model) == {}
    assert attention_inputs(Mask.causal(PADDED), model) == {}  # nothing reads what comes later
    assert set(attention_inputs(Mask.causal(PACKED), model, restart_positions=True)) == {
        "attention_mask",
        "position_ids",
    }
    assert attention_inputs(Mask.full(ONE), tiny_hf("bert")) == {}


def test_positions_restart():
    assert positions(PACKED).tolist()[1] == [0, 1, 0, 1, 2, 3, 0, 0, 1]
    model = tiny_hf("gpt2")
    together = model(IDS[:1], **attention_inputs(Mask.causal(PACKED[:1]), model, restart_positions=True)).logits
    alone = model(IDS[:1, 4:]).logits
    assert torch.allclose(together[:, 4:], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "mask", "words"),
    [
        ("bloom", Mask.causal(PACKED), "bloom .*cross_document: allow"),
        ("mistral", Mask.causal(PACKED), "window of 6"),
        ("gemma2", Mask.prefix(ONE, torch.tensor([1, 2, 3])), "window of 8"),
        ("t5", Mask.full(PACKED), "packed_inputs"),
    ],
)
def test_what_cannot_be_honoured_is_refused(family, mask, words):
    with pytest.raises(VesaliusError, match=words):
        attention_inputs(mask, tiny_hf(family))


def test_bloom_is_trained_without_a_mask():
    assert leaks(tiny_hf("bloom"), Mask.causal(ONE), IDS) == (0, 0)
    assert not TAKES_MASK & set(REFUSES_MASK)


def test_unknown_family_is_refused():
    model = tiny_hf("llama")
    model.config.model_type = "novel"
    with pytest.raises(VesaliusError, match="'novel'.*leaks"):
        attention_inputs(Mask.causal(PACKED), model)
