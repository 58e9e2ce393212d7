"""Architectures: JSON and back, refusals that name the key and the remedy, short forms, counts of record."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vesalius.build import Architecture, build, cache_bytes, flops, parameters, preset, presets
from vesalius.build.architecture import expand
from vesalius.build.counting import cross_flops
from vesalius.errors import UnknownName, VesaliusError

SMALL = {"layers": 2, "d_model": 32, "heads": 4, "vocab_size": 50, "max_length": 32}
TABLE = presets().set_index("name")
TINY = [name for name in TABLE.index if name.startswith("tiny-")]


def test_every_preset_survives_json_exactly() -> None:
    for name in TABLE.index:
        a = preset(name)
        again = Architecture.from_json(a.to_json())
        assert again == a and again.hash == a.hash and again.to_json() == a.to_json()


def test_hash_tells_architectures_apart_and_not_their_spelling() -> None:
    a = Architecture(**SMALL)
    assert a.hash == Architecture(**SMALL, mixers="attn*2").hash == Architecture(**SMALL, mixers=["attn", "attn"]).hash
    assert (
        len({Architecture(**{**SMALL, **c}).hash for c in ({}, {"layers": 3}, {"bias": False}, {"tied": False})}) == 4
    )
    two = {**SMALL, "kind": "encoder-decoder", "encoder_layers": 3}
    same = ({}, {"encoder_mixers": "attn"}, {"encoder_mixers": ["attn"] * 3})
    assert len({Architecture(**two, **c).hash for c in same}) == 1
    other = Architecture(**two, mixers="[qlstm,attn]", encoder_mixers="attn")
    assert other.hash not in {a.hash, Architecture(**two).hash} and other.stack == ("qlstm", "attn")


def test_it_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Architecture(**SMALL).layers = 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hedas": 4}, ["hedas", "did you mean 'heads'"]),
        ({"norm": {"knd": "rms"}}, ["norm key", "knd", "did you mean 'kind'"]),
        ({"heads": 5}, ["heads=5", "d_model=32", "change one"]),
        ({"kv_heads": 3}, ["kv_heads=3", "heads=4", "divisor"]),
        ({"layers": 0}, ["'layers'", "0", "change"]),
        ({"d_model": "wide"}, ["'d_model'", "wide"]),
        ({"feed_forward": "swigul"}, ["swigul", "did you mean 'swiglu'"]),
        ({"mixers": "atn"}, ["atn", "did you mean 'attn'"]),
        ({"mixers": "attn*3"}, ["3 layers", "layers=2", "agree"]),
        ({"mixers": "[attn"}, ["cannot be read", "[attn"]),
        ({"mixer_options": {"qlstm": {"blok": 4}}}, ["blok", "did you mean 'block'"]),
        ({"init": "gpt3"}, ["gpt3", "did you mean 'gpt2'"]),
        ({"kind": "masked", "mixers": "qlstm"}, ["qlstm", "masked", "use 'attn'"]),
        ({"positions": {"kind": "rotary", "fraction": 0.4}}, ["fraction=0.4", "even", "change"]),
        ({"norm": {"kind": "rms", "bias": True}}, ["bias", "rms", "drop it"]),
        ({"norm": {"place": "post"}, "block": "parallel"}, ["post", "sequential"]),
        ({"kind": "encoder-decoder", "mixers": "qlstm"}, ["qlstm", "encoder cannot", "encoder_mixers='attn'"]),
        ({"kind": "encoder-decoder", "encoder_mixers": "[qlstm,attn]"}, ["qlstm", "encoder cannot"]),
        (
            {"kind": "encoder-decoder", "mixers": "attn*2", "encoder_layers": 3},
            ["mixers='attn*2'", "2 layers", "has 3"],
        ),
        ({"kind": "encoder-decoder", "encoder_mixers": ["attn"]}, ["encoder_mixers=", "1 layers", "has 2"]),
        ({"kind": "encoder-decoder", "encoder_mixers": "atn"}, ["atn", "did you mean 'attn'"]),
        ({"kind": "encoder-decoder", "block": "parallel"}, ["parallel", "cross-attention", "sequential"]),
        ({"kind": "encoder-decoder", "token_types": 2}, ["token_types=2", "token_types=0"]),
        ({"kind": "encoder-decoder", "head": "transform"}, ["transform", "encoder-decoder", "head='linear'"]),
        ({"encoder_layers": 2}, ["encoder_layers=2", "encoder-decoder", "drop it"]),
        ({"encoder_mixers": "attn"}, ["encoder_mixers='attn'", "encoder-decoder", "drop it"]),
        ({"mixer_options": {"attn": {"scaled": "perhaps"}}}, ["scaled", "perhaps"]),
        ({"head": "transform"}, ["transform", "masked"]),
    ],
)
def test_a_bad_architecture_is_refused_with_key_and_remedy(change: dict, words: list[str]) -> None:
    with pytest.raises(VesaliusError) as refusal:
        Architecture(**{**SMALL, **change})
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_bad_json_and_bad_preset_names_are_refused() -> None:
    with pytest.raises(VesaliusError, match="not an architecture"):
        Architecture.from_json("[1]")
    with pytest.raises(UnknownName, match="pythia-70m"):
        preset("pythia-70")


def test_short_forms() -> None:
    assert expand("attn*2,[qlstm,attn]*2,lstm", 7) == ("attn", "attn", "qlstm", "attn", "qlstm", "attn", "lstm")
    assert expand("[qlstm,attn*2]*2", 6) == ("qlstm", "attn", "attn") * 2


def test_replace_keeps_what_was_chosen_and_follows_what_was_not() -> None:
    a = Architecture(**SMALL)
    assert (a.replace(d_model=64).d_head, a.replace(d_model=64).d_ff, a.replace(heads=8).kv_heads) == (16, 256, 8)
    palm = preset("palm-540b").replace(heads=32)
    assert (palm.d_head, palm.kv_heads) == (256, 1)
    assert preset("palm-8b").replace(heads=32, d_head=256).d_head == 256
    rms = a.replace(norm={"kind": "rms"})
    assert rms.norm.kind == "rms" and not rms.norm.bias and rms.norm.eps == a.norm.eps


# -- counts ------------------------------------------------------------------------------------------------------------

# totals of the published checkpoints
PUBLISHED = {
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-1.4b": 1_414_647_808,
    "pythia-12b": 11_846_072_320,
    "bloom-560m": 559_214_592,
    "bloom-176b": 176_247_271_424,
    "gpt2": 124_439_808,
    "t5.1.1-small": 76_961_152,
    "t5.1.1-xxl": 11_135_332_352,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    assert TABLE.parameters[name] == PUBLISHED[name]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("stock", [True, False])
def test_closed_form_counts_what_is_there(name: str, stock: bool) -> None:
    for change in ({}, {"tied": False, "norm": {"embedding": True}, "mixers": "[qlstm,attn]", "bias": True}):
        if change and (stock or preset(name).kind != "causal"):
            continue
        a = preset(name, **change)
        assert parameters(a) == sum(p.numel() for p in build(a, stock=stock).parameters())


def test_palm_closed_form_and_no_bias_and_small_cache() -> None:
    for name in ("palm-8b", "palm-62b", "palm-540b", "tiny-palm"):
        a = preset(name)
        layers, d, h, k, f, v = a.layers, a.d_model, a.heads, a.d_head, a.d_ff, a.vocab_size
        assert parameters(a) == layers * (2 * d * h * k + 2 * d * k + 3 * d * f + d) + v * d + d
        assert cache_bytes(a, 77) * h == cache_bytes(a.replace(kv_heads=h), 77)
    model = build(preset("tiny-palm"))
    assert not [n for n, _ in model.named_parameters() if "bias" in n]


def test_kv_cache_holds_what_is_counted() -> None:
    for name in ("tiny-palm", "tiny-llama"):
        a = preset(name)
        with torch.no_grad():
            cache = build(a, stock=False).eval()(torch.zeros(1, 21, dtype=torch.long)).past_key_values
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        assert held == cache_bytes(a, 21)


def test_bioformer_counts() -> None:
    base = parameters(preset("bert-base"))
    eight = parameters(preset("bioformer-8l"))
    assert 108e6 <= base <= 110e6
    assert 42e6 <= eight <= 43.5e6 and eight / base <= 0.40
    assert parameters(preset("bioformer-16l")) / base <= 0.40
    with torch.device("meta"):
        model = build_on_meta("bioformer-8l")
    assert sum(p.numel() for p in model.parameters()) == eight


def build_on_meta(name: str) -> torch.nn.Module:
    from vesalius.build.stock import _empty_parts, _empty_stock, stock_name

    a = preset(name)
    return _empty_stock(a) if stock_name(a) else _empty_parts(a)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama", "tiny-palm", "tiny-bert", "tiny-qlstm", "tiny-lstm"])
def test_flops_are_those_counted(name: str) -> None:
    a = preset(name)
    model = build(a, stock=False).eval()
    # the counter knows no name for the fused attention of CPUs, but counts the products it stands for
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 24, dtype=torch.long), attention_mask=None)
    assert counter.get_total_flops() == flops(a, 24)


@pytest.mark.parametrize("change", [{}, {"encoder_layers": 3, "mixers": "[qlstm,attn]", "encoder_mixers": "attn"}])
def test_flops_of_two_stacks_are_those_counted(change: dict) -> None:
    a = preset("tiny-t5", kv_heads=2, **change)
    model, ids = build(a).eval(), torch.zeros(1, 24, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, decoder_input_ids=ids[:, :17])
    assert counter.get_total_flops() == flops(a, 17, 24)
    assert parameters(a) == sum(p.numel() for p in model.parameters())


def test_encoder_decoder_against_decoder() -> None:
    """Twice the parameters at about the same FLOPs; the excess is the cross-attention (Wang et al. 2022)."""
    ed, cd = preset("t5.1.1-xxl"), preset("t5-decoder-xxl")
    ratio = parameters(ed, embeddings=False) / parameters(cd, embeddings=False)
    assert 2.2 <= ratio <= 2.4
    source, target = 512, 114
    head = 2 * ed.d_model * ed.vocab_size  # the decoder alone writes logits for its targets only, too
    blocks_ed = flops(ed, target, source) - target * head
    blocks_cd = flops(cd, source + target) - (source + target) * head
    assert 1.05 <= blocks_ed / blocks_cd <= 1.25
    # attention maps: the decoder alone has one square, the encoder-decoder two squares and a rectangle
    saved = 4 * ed.heads * ed.d_head * ((source + target) ** 2 - source**2 - target**2)
    assert blocks_ed - blocks_cd == ed.layers * (cross_flops(ed, target, source) - saved)
    with torch.device("meta"):
        model = build_on_meta("t5.1.1-xxl")
        ids = {"input_ids": torch.zeros(1, source, dtype=torch.long)}
        ids["decoder_input_ids"] = torch.zeros(1, target, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(**ids)
    assert abs(counter.get_total_flops() / flops(ed, target, source) - 1) < 1e-6


def test_config_of_a_saved_model_is_its_architecture(tmp_path) -> None:
    a = preset("tiny-palm")
    build(a).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in data and Architecture(**data["architecture"]) == a
