"""Encoder-decoders of parts: T5's logits, gradients and text from T5's parts; who reads whom, with any parts."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vesalius
from vesalius.build import Architecture, adopt, build, export, parameters, preset, stock_config, stock_name, why_not
from vesalius.build.encoder_decoder import (
    VesaliusEncoderDecoder,
    VesaliusEncoderDecoderConfig,
    VesaliusForConditionalGeneration,
)
from vesalius.build.hf import VesaliusConfig, VesaliusForCausalLM
from vesalius.build.moves import MOVES, pack
from vesalius.errors import VesaliusError
from vesalius.train.masks import Mask, compare, packed_inputs
from vesalius.train.masks import _read as read_by

V = 259


def loud(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.05 if p.dim() > 1 else 0.2))
    return model.eval()


def some_ids(rows: int = 3, length: int = 17, seed: int = 1) -> Tensor:
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


SOURCE, TARGET = some_ids(3, 40), some_ids(3, 11, seed=2)
WHOLE = torch.ones(3, 40, dtype=torch.long)


def hiding(*where: tuple[int, slice]) -> Tensor:
    mask = WHOLE.clone()
    for row, hidden in where:
        mask[row, hidden] = 0
    return mask


MASKS = {
    "none": None,
    "right": hiding((0, slice(25, 40)), (2, slice(39, 40))),
    "left": hiding((1, slice(0, 9))),
    "inside": hiding((0, slice(3, 8)), (1, slice(20, 21))),
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "deep encoder": {"layers": 1, "encoder_layers": 4, "heads": 2, "d_head": 24},
    "few buckets": {"layers": 3, "d_model": 48, "d_ff": 96, "positions": {"buckets": 8, "max_distance": 20}},
}
HEADS = {"tied": {"tied": True, "logit_scale": "inverse-sqrt"}, "untied": {"tied": False}}
CELLS = [(f, h, s) for f in ("geglu-tanh", "relu") for h in HEADS for s in SIZES]
cells = pytest.mark.parametrize(("feed", "head", "size"), CELLS)


def t5(feed: str = "geglu-tanh", head: str = "untied", size: str = "tiny", **changes: Any) -> Architecture:
    return preset("tiny-t5", feed_forward=feed, **HEADS[head], **SIZES[size], **changes)


# Parts that no stock class has together, one of each kind at least.
PARTS: dict[str, dict[str, Any]] = {
    "t5": {},
    "bart-like": {"norm": {"kind": "layer"}, "positions": {"kind": "learned"}, "bias": True, "feed_forward": "gelu"},
    "rotary": {"feed_forward": "swiglu", "positions": {"kind": "rotary"}, "kv_heads": 2, **HEADS["tied"]},
    "alibi": {"positions": {"kind": "alibi"}, "norm": {"embedding": True}, "embedding_scale": "sqrt"},
    "unordered": {"positions": {"kind": "none"}, "mixer_options": {"attn": {"scaled": False}}},
    "recurrent": {"positions": {"kind": "none"}, "mixers": "[qlstm,attn]", "encoder_mixers": "attn"},
    "post-norm": {"norm": {"place": "post"}, "positions": {"kind": "learned"}, "encoder_layers": 1},
}
parts = pytest.mark.parametrize("name", PARTS)


def of_parts(name: str) -> PreTrainedModel:
    return loud(build(preset("tiny-t5", **PARTS[name]), seed=2, stock=False))


# -- T5's twin ---------------------------------------------------------------------------------------------------------


@cells
@pytest.mark.parametrize("mask", MASKS)
def test_logits_are_those_of_t5(feed: str, head: str, size: str, mask: str) -> None:
    ours = loud(build(t5(feed, head, size), seed=1, stock=False))
    stock = export(ours)
    assert type(ours) is VesaliusForConditionalGeneration
    assert type(stock) is transformers.T5ForConditionalGeneration
    inputs = {"input_ids": SOURCE, "attention_mask": MASKS[mask], "decoder_input_ids": TARGET}
    with torch.no_grad():
        want, got = stock(**inputs), ours(**inputs)
    assert want.logits.std() > 0.5
    assert (got.logits - want.logits).abs().max() <= 1e-5
    real = slice(None) if MASKS[mask] is None else MASKS[mask].bool()
    states = got.encoder_last_hidden_state[real], want.encoder_last_hidden_state[real]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("logit_scale", ["none", "inverse-sqrt"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_scale_of_logits_and_tying_are_apart(tied: bool, logit_scale: str, tmp_path) -> None:
    ours = loud(build(preset("tiny-t5", tied=tied, logit_scale=logit_scale), stock=False))
    stock = export(ours)
    stock.save_pretrained(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want, got, saved = (m(input_ids=SOURCE, decoder_input_ids=TARGET).logits for m in (ours, stock, again))
    assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.std()))
    assert torch.equal(saved, got) and (ours.lm_head.weight is ours.model.encoder.embed.weight) == tied


@cells
def test_gradients_are_those_of_t5(feed: str, head: str, size: str) -> None:
    a = t5(feed, head, size)
    ours = loud(build(a, seed=1, stock=False)).train()
    stock = export(ours)
    labels = TARGET.clone()
    labels[0, 6:] = -100
    losses = [m(input_ids=SOURCE, attention_mask=MASKS["right"], labels=labels).loss for m in (ours, stock)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    mine, theirs = dict(ours.named_parameters()), dict(stock.named_parameters(remove_duplicate=False))
    for move in MOVES["T5"](a):
        want, got = theirs[move.theirs].grad, pack(move, [mine[n].grad for n in move.ours], a)
        assert want.abs().max() > 0, move.theirs
        assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max())), move.theirs


@cells
def test_export_and_adopt_are_one_another_backwards(feed: str, head: str, size: str) -> None:
    a = t5(feed, head, size)
    ours = loud(build(a, stock=False, eos_token_id=7, pad_token_id=3, decoder_start_token_id=5))
    stock = export(ours)
    again = adopt(stock, a)
    twice = export(again)
    for first, second in ((ours, again), (stock, twice)):
        assert first.state_dict().keys() == second.state_dict().keys()
        assert all(torch.equal(x, second.state_dict()[n]) for n, x in first.state_dict().items())
        ids = [(m.config.eos_token_id, m.config.pad_token_id, m.config.decoder_start_token_id) for m in (first, second)]
        assert ids == [(7, 3, 5)] * 2
    assert parameters(a) == sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())


def test_one_seed_is_one_model() -> None:
    for head in HEADS:
        stock, ours = build(t5(head=head), seed=5), build(t5(head=head), seed=5, stock=False)
        twin = export(ours).state_dict()
        assert all(torch.equal(x, twin[n]) for n, x in stock.state_dict().items())
    deviations = {
        "encoder.layers.0.mixer.q": (64 * 16) ** -0.5,  # for scores that nothing divides
        "decoder.layers.1.cross.q": (64 * 16) ** -0.5,
        "decoder.layers.1.cross.k": 64**-0.5,
        "decoder.layers.0.ffn.down": 128**-0.5,
        "encoder.positions.biases": 64**-0.5,
        "encoder.embed": 1.0,
    }
    for name, want in deviations.items():
        assert ours.model.get_submodule(name).weight.std().item() == pytest.approx(want, rel=0.1), name
    divided = build(preset("tiny-t5", positions={"kind": "rotary"}), seed=5)
    assert divided.model.encoder.layers[0].mixer.q.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_a_t5_of_transformers_is_adopted() -> None:
    """Not our numbers: its class as it makes itself, in its own precision and mode."""
    a = t5("relu", "tied")
    torch.manual_seed(5)
    theirs = loud(transformers.T5ForConditionalGeneration(stock_config(a))).double().train()
    ours = adopt(theirs, a)
    assert ours.training and ours.dtype == torch.float64
    with torch.no_grad():
        got, want = (m.eval()(input_ids=SOURCE, decoder_input_ids=TARGET).logits for m in (ours, theirs))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # its norms compute in float32
    for other, words in (
        (a.replace(encoder_layers=3), r"has no encoder\.block\.2"),
        (a.replace(encoder_layers=1), r"has encoder\.block\.1"),
        (a.replace(feed_forward="geglu-tanh"), "wi"),
        (a.replace(d_ff=64), r"\(128, 64\).*\(64, 64\)"),
        (preset("tiny-gpt2"), "computed by GPT2LMHeadModel"),
        (a.replace(positions={"kind": "rotary"}), "computed by a parts model"),
    ):
        with pytest.raises(VesaliusError, match=words):
            adopt(theirs, other)
    untied = export(loud(build(t5("relu", "untied", logit_scale="inverse-sqrt"), stock=False)))
    with pytest.raises(VesaliusError, match=r"has lm_head\.weight.*change layers, tied"):
        adopt(untied, a)


def test_what_is_not_t5_says_so() -> None:
    assert stock_name(t5()) == stock_name(t5("relu", "tied", "few buckets")) == "T5"
    assert stock_name(preset("tiny-t5", mixer_options={"attn": {"scaled": False}})) == "T5"
    for change, words in (
        ({"feed_forward": "swiglu"}, "feed_forward is 'swiglu'"),
        ({"positions": {"kind": "rotary"}}, "positions.kind is 'rotary'"),
        ({"mixers": "[qlstm,attn]", "encoder_mixers": "attn"}, "mixers are attn, qlstm"),
        ({"kv_heads": 2}, "kv_heads is 2"),
        ({"mixer_options": {"attn": {"scaled": True}}}, "scores are divided by sqrt(d_head), unlike those of T5"),
    ):
        a = preset("tiny-t5", **change)
        assert words in "; ".join(why_not(a)["T5"])
        with pytest.raises(VesaliusError, match="no stock class computes this architecture; nearest is T5"):
            export(build(a))
    unscaled = preset("tiny-llama", mixer_options={"attn": {"scaled": False}})
    assert "scores are not divided" in why_not(unscaled)["Llama"][0] and stock_name(unscaled) is None


def test_unscaled_scores_are_larger_queries() -> None:
    """In any kind of model: as if queries were multiplied by sqrt(d_head)."""
    a = preset("tiny-llama")
    plain, other = (loud(build(x, stock=False)) for x in (a, a.replace(mixer_options={"attn": {"scaled": False}})))
    with torch.no_grad():
        for block in plain.model.layers:
            block.mixer.q.weight.mul_(a.d_head**0.5)
        torch.testing.assert_close(plain(SOURCE).logits, other(SOURCE).logits, atol=1e-5, rtol=1e-5)


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("feed", "head"), [("geglu-tanh", "untied"), ("relu", "tied")])
def test_generated_text_is_that_of_t5(feed: str, head: str) -> None:
    ours = loud(build(t5(feed, head), seed=3, stock=False))
    stock = export(ours)
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}):
        told = {"attention_mask": MASKS["right"], "max_new_tokens": 20, "do_sample": False, **settings}
        got, want = (m.generate(SOURCE, **told) for m in (ours, stock))
        assert got.shape[1] > 2 and torch.equal(got, want)


@parts
def test_one_token_at_a_time_is_the_forward_pass(name: str) -> None:
    model = of_parts(name)
    told = {"input_ids": SOURCE, "attention_mask": MASKS["right"]}
    asked: list[Tensor] = []
    handle = model.model.decoder.layers[0].cross.k.register_forward_hook(lambda *_: asked.append(_[1][0]))
    with torch.no_grad():
        want = model(**told, decoder_input_ids=TARGET, use_cache=False).logits
        asked.clear()
        out = model(**told, decoder_input_ids=TARGET[:, :1])
        found, states = [out.logits], out.encoder_last_hidden_state
        for t in range(1, 9):
            out = model(
                attention_mask=MASKS["right"],
                encoder_outputs=(states,),
                decoder_input_ids=TARGET[:, t : t + 1],
                past_key_values=out.past_key_values,
            )
            found.append(out.logits)
        last = {"decoder_input_ids": TARGET[:, 9:], "past_key_values": out.past_key_values}  # and two at once
        found.append(model(attention_mask=MASKS["right"], encoder_outputs=(states,), **last).logits)
    handle.remove()
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-5, rtol=1e-4)
    assert len(asked) == 1  # the encoder's keys are computed once, and kept
    kept = out.past_key_values
    assert kept.get_seq_length() == 11 and kept.cross_attention_cache.get_seq_length() == 40


@parts
def test_generate_is_greedy_decoding(name: str) -> None:
    model = of_parts(name)
    want = torch.zeros(3, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(8):
            told = {"input_ids": SOURCE, "attention_mask": MASKS["left"], "decoder_input_ids": want}
            want = torch.cat([want, model(**told, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    told = {"attention_mask": MASKS["left"], "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(SOURCE, max_new_tokens=8, **told), want)
    beams = [model.generate(SOURCE, max_new_tokens=8, num_beams=3, use_cache=c, **told) for c in (True, False)]
    assert torch.equal(*beams)


# -- who reads whom ----------------------------------------------------------------------------------------------------


@parts
def test_the_past_does_not_see_the_future_and_all_see_the_source(name: str) -> None:
    model, length = of_parts(name), TARGET.shape[1]
    with torch.no_grad():
        base = model(input_ids=SOURCE, decoder_input_ids=TARGET).logits
        for t in range(length):
            other = TARGET.clone()
            other[:, t] = (other[:, t] + 7) % V
            new = model(input_ids=SOURCE, decoder_input_ids=other).logits
            assert torch.equal(new[:, :t], base[:, :t])
            assert all(not torch.equal(new[:, s], base[:, s]) for s in range(t, length))
        for s in (0, 19, 39):
            other = SOURCE.clone()
            other[:, s] = (other[:, s] + 7) % V
            new = model(input_ids=other, decoder_input_ids=TARGET).logits
            assert all(not torch.equal(new[:, t], base[:, t]) for t in range(length))


@parts
@pytest.mark.parametrize("left", [True, False])
def test_padding_of_the_source_changes_nothing(name: str, left: bool) -> None:
    model, pad = of_parts(name), torch.full((3, 6), 3)
    none, ones = torch.zeros(3, 6, dtype=torch.long), WHOLE
    ids, mask = ([pad, SOURCE], [none, ones]) if left else ([SOURCE, pad], [ones, none])
    padded = {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(mask, 1)}
    with torch.no_grad():
        want = model(input_ids=SOURCE, decoder_input_ids=TARGET).logits
        got = model(**padded, decoder_input_ids=TARGET).logits
        padded["input_ids"] = torch.where(padded["attention_mask"] == 0, 99, padded["input_ids"])
        assert torch.equal(model(**padded, decoder_input_ids=TARGET).logits, got)  # whatever stands there
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in PARTS if n != "recurrent"])
def test_texts_packed_in_one_row_are_alone(name: str) -> None:
    """Masks of pairs on all three sides; the gradient says who was read."""
    model = of_parts(name)
    sources = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, -1, -1]])
    targets = torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, -1, -1]])
    encoder, decoder = Mask.full(sources), Mask.causal(targets)
    written = model.get_input_embeddings()(TARGET[:2, :5]).detach().requires_grad_()
    read_from = model.get_input_embeddings()(SOURCE[:2, :7]).detach().requires_grad_()
    hook = model.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"input_ids": None, "inputs_embeds": read_from}), with_kwargs=True
    )
    inputs = packed_inputs(model, SOURCE[:2, :7], encoder, decoder)
    hook.remove()
    logits = model(decoder_inputs_embeds=written, **inputs).logits
    assert compare(decoder, read_by(logits, written)) == (0, 0)
    assert compare(Mask.cross(decoder.query, encoder.key), read_by(logits, read_from)) == (0, 0)


@parts
def test_another_attention_function_reads_the_same(name: str) -> None:
    """transformers' own, which asks the module whether it is causal and takes the scale as given."""
    ALL_ATTENTION_FUNCTIONS.register("another", sdpa_attention_forward)
    model, found = of_parts(name), []
    for implementation in ("sdpa", "another"):
        model.config._attn_implementation_internal = implementation
        with torch.no_grad():
            told = [{"input_ids": SOURCE, "attention_mask": MASKS[mask]} for mask in ("none", "right")]
            found.append(torch.stack([model(**source, decoder_input_ids=TARGET).logits for source in told]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_positions_may_be_given() -> None:
    model = of_parts("bart-like")
    with torch.no_grad():
        base = model(input_ids=SOURCE, decoder_input_ids=TARGET).logits
        counted = {"position_ids": torch.arange(40)[None], "decoder_position_ids": torch.arange(11)[None]}
        assert torch.equal(model(input_ids=SOURCE, decoder_input_ids=TARGET, **counted).logits, base)
        for key, where in counted.items():
            moved = model(input_ids=SOURCE, decoder_input_ids=TARGET, **{key: where + 5}).logits
            assert not torch.allclose(moved, base, atol=1e-3)


def test_a_decoder_block_is_its_formula() -> None:
    for name in ("bart-like", "post-norm"):
        model = of_parts(name)
        a, block = model.model.decoder.architecture, model.model.decoder.layers[0]
        x, states = torch.randn(2, 6, 64), torch.randn(2, 9, 64)

        def attended(
            part: nn.Module, asks: Tensor, answers: Tensor, causal: bool, heads: int = a.heads, d: int = a.d_head
        ) -> Tensor:
            q = part.q(asks).view(2, -1, heads, d).transpose(1, 2)
            k, v = (p(answers).view(2, -1, heads, d).transpose(1, 2) for p in (part.k, part.v))
            scores = q @ k.mT / d**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf"))
            return part.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

        with torch.no_grad():
            got, _ = block(x, encoder_hidden_states=states)
            if a.norm.place == "post":
                y = block.norm_mixer(x + attended(block.mixer, x, x, True))
                y = block.norm_cross(y + attended(block.cross, y, states, False))
                want = block.norm_ffn(y + block.ffn(y)[0])
            else:
                read = block.norm_mixer(x)
                y = x + attended(block.mixer, read, read, True)
                y = y + attended(block.cross, block.norm_cross(y), states, False)
                want = y + block.ffn(block.norm_ffn(y))[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# -- trained, saved, resized -------------------------------------------------------------------------------------------


@parts
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    model, found = of_parts(name).train(), []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(input_ids=SOURCE, attention_mask=MASKS["right"], labels=TARGET).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(g.abs().max() > 0 for g in found[0].values())
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, atol=1e-6, rtol=1e-5)


def test_labels_are_foretold_from_those_before() -> None:
    ours = loud(build(t5(), stock=False, pad_token_id=3, decoder_start_token_id=5))
    labels = TARGET.clone()
    labels[:, 8:] = -100
    shifted = ours.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(shifted, export(ours).prepare_decoder_input_ids_from_labels(labels))
    assert shifted[:, 0].tolist() == [5] * 3 and torch.equal(shifted[:, 1:9], TARGET[:, :8])
    with torch.no_grad():
        out = ours(input_ids=SOURCE, labels=labels)
        logits = ours(input_ids=SOURCE, decoder_input_ids=shifted).logits
    assert torch.equal(out.logits, logits)
    want = nn.functional.cross_entropy(logits[:, :8].flatten(0, 1), TARGET[:, :8].flatten())
    torch.testing.assert_close(out.loss, want)


LOADER = """
import hashlib, sys, torch, vesalius, transformers
from transformers.models.auto import configuration_auto as table
source, target = (torch.arange(a, b).view(3, -1) for a, b in ((2, 53), (60, 87)))
for again in (False, True):
    if again:  # as if transformers had been there first
        del table.CONFIG_MAPPING_NAMES["vesalius-encoder-decoder"]
        vesalius.autoload.announce()
    for folder in sys.argv[1:]:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        body = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            out = model(input_ids=source, decoder_input_ids=target)
            states = body(input_ids=source, decoder_input_ids=target).encoder_last_hidden_state
        assert torch.equal(states, out.encoder_last_hidden_state)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        text = model.generate(source, max_new_tokens=5, do_sample=False).tolist()
        bits = hashlib.sha256(out.logits.numpy().tobytes() + str(text).encode()).hexdigest()
        print(type(model).__name__, type(body).__name__, bits, tied, model.config.decoder_start_token_id)
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path) -> None:
    source, target = (torch.arange(a, b).view(3, -1) for a, b in ((2, 53), (60, 87)))
    want = []
    for name in ("t5", "rotary", "recurrent"):
        model = of_parts(name)
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 4
        model.save_pretrained(tmp_path / name)
        assert {p.suffix for p in (tmp_path / name).iterdir()} == {".json", ".safetensors"}
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=target).logits
        text = model.generate(source, max_new_tokens=5, do_sample=False).tolist()
        bits = hashlib.sha256(logits.numpy().tobytes() + str(text).encode()).hexdigest()
        classes = ["VesaliusForConditionalGeneration", "VesaliusEncoderDecoder"]
        want += [*classes, bits, str(bool(PARTS[name].get("tied"))), "4"]
        opened = vesalius.open(str(tmp_path / name), dtype="float32", device="cpu")
        assert opened.kind == "encoder-decoder" and torch.equal(opened.logits(source, decoder=target), logits)
    folders = [str(tmp_path / name) for name in ("t5", "rotary", "recurrent")]
    done = subprocess.run([sys.executable, "-c", LOADER, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == want * 2
    with pytest.raises(ValueError, match="VesaliusEncoderDecoderConfig"):
        AutoModelForCausalLM.from_pretrained(folders[0])


def test_a_resized_vocabulary_is_one_for_both_stacks(tmp_path) -> None:
    for name in ("t5", "rotary"):
        model = of_parts(name)
        with torch.no_grad():
            before = model(input_ids=SOURCE, decoder_input_ids=TARGET).logits
        model.resize_token_embeddings(300, mean_resizing=False)
        assert (model.lm_head.weight is model.model.encoder.embed.weight) == bool(PARTS[name].get("tied"))
        model.save_pretrained(tmp_path / name)
        again = VesaliusForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            after = again(input_ids=SOURCE, decoder_input_ids=TARGET).logits
            new = again(input_ids=SOURCE, decoder_input_ids=torch.full_like(TARGET, 290)).logits
        assert again.config.shape.vocab_size == after.shape[-1] == new.shape[-1] == 300
        torch.testing.assert_close(after[..., :V], before, atol=1e-6, rtol=1e-6)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    model = of_parts("t5")
    both = {"input_ids": SOURCE, "decoder_input_ids": TARGET}
    vectors = model.get_input_embeddings()(TARGET)
    for inputs, words in (
        ({"input_ids": SOURCE}, "decoder_input_ids or decoder_inputs_embeds.*labels"),
        ({**both, "decoder_inputs_embeds": vectors}, "not both"),
        ({"decoder_input_ids": TARGET}, "give either input_ids or inputs_embeds"),
        ({**both, "inputs_embeds": vectors}, "give either input_ids or inputs_embeds"),
        ({**both, "decoder_input_ids": TARGET[:2]}, "decoder has 2 rows and the encoder 3"),
        ({**both, "attention_mask": WHOLE[:, :5]}, r"\(3, 5\).*\(3, 40\)"),
        ({**both, "decoder_attention_mask": WHOLE}, r"\(3, 40\).*\(3, 11\)"),
        ({**both, "attention_mask": WHOLE[:, None, None].bool()}, "four axes.*encoder_outputs"),
        ({**both, "segment_ids": WHOLE}, "segment_ids.*one text a row"),
        ({**both, "past_key_values": DynamicCache()}, "DynamicCache.*EncoderDecoderCache"),
        ({**both, "output_attentions": True}, "vesalius.open"),
    ):
        with pytest.raises(VesaliusError, match=words) as refusal:
            model(**inputs)
        assert "\n" not in str(refusal.value)
    states = model.get_encoder()(SOURCE)
    with pytest.raises(VesaliusError, match=r"\(3, 5\) where the encoder's states are \(3, 40\)"):
        model(encoder_outputs=states, decoder_input_ids=TARGET, attention_mask=WHOLE[:, :5])
    with pytest.raises(VesaliusError, match="max_length=256"):
        of_parts("bart-like")(input_ids=SOURCE, decoder_input_ids=torch.full((3, 257), 2))
    with pytest.raises(VesaliusError, match="recurrent"):
        told = {"input_ids": SOURCE, "decoder_input_ids": TARGET}
        of_parts("recurrent")(**told, decoder_attention_mask=torch.ones(3, 1, 11, 11, dtype=torch.bool).tril())


def test_ids_that_are_missing_are_named() -> None:
    labels = torch.tensor([[5, -100]])
    for missing in ("decoder_start_token_id", "pad_token_id"):
        model = build(t5(), stock=False, **{missing: None})
        with pytest.raises(VesaliusError, match=f"has no {missing}.*set it"):
            model(input_ids=SOURCE[:1], labels=labels)
    assert model.prepare_decoder_input_ids_from_labels(labels[:, :1]).tolist() == [[0]]


def test_each_class_takes_its_kind() -> None:
    two, one = preset("tiny-t5").to_dict(), preset("tiny-gpt2").to_dict()
    with pytest.raises(VesaliusError, match="one stack and kind='encoder-decoder' two.*AutoModelForSeq2SeqLM"):
        VesaliusForCausalLM(VesaliusConfig(architecture=two))
    for cls in (VesaliusEncoderDecoder, VesaliusForConditionalGeneration):
        with pytest.raises(VesaliusError, match="two stacks and kind='causal' one.*VesaliusForCausalLM"):
            cls(VesaliusEncoderDecoderConfig(architecture=one))
