"""Parts models against transformers' own classes, saved and loaded in another process, and on the bench."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from vesalius.build import INITS, adopt, build, export, preset, stock_config, stock_name, why_not
from vesalius.build.hf import VesaliusForCausalLM
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.hooks import Site
from vesalius.model.intervene import Intervention, taps
from vesalius.parts import parse

CLASSES = {
    "tiny-gpt2": "GPT2LMHeadModel",
    "tiny-pythia": "GPTNeoXForCausalLM",
    "tiny-llama": "LlamaForCausalLM",
    "tiny-bloom": "BloomForCausalLM",
    "tiny-bert": "BertForMaskedLM",
    "tiny-t5": "T5ForConditionalGeneration",
}
MAPPED = [name for name in CLASSES if name != "tiny-t5"]


def loud(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.08 if p.dim() > 1 else 0.2))
    return model.eval()


def some_ids(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, 259, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("change", [{}, {"layers": 3, "heads": 8, "kv_heads": None}, {"tied": None}])
def test_export_gives_equal_logits(name: str, change: dict) -> None:
    if "tied" in change:
        change = {"tied": not preset(name).tied}
        if name == "tiny-bert":
            assert "tied" in why_not(preset(name, **change))["Bert"][0]
            return
    a = preset(name, dropout=0.0, **change)
    ours = loud(build(a, seed=1, stock=False))
    stock = export(ours)
    assert type(stock).__name__ == CLASSES[name] and isinstance(stock.config, type(stock_config(a)))
    with torch.no_grad():
        want, got = ours(some_ids()).logits, stock(some_ids()).logits
        again = adopt(stock, a)(some_ids()).logits
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, want)


@pytest.mark.parametrize("name", MAPPED)
def test_export_with_left_padding(name: str) -> None:
    ours = loud(build(preset(name, dropout=0.0), stock=False))
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, :5] = mask[1, :2] = 0
    extra = {} if name == "tiny-bloom" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        want, got = (m(some_ids(), attention_mask=mask, **extra).logits[mask.bool()] for m in (ours, export(ours)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_bloom_with_heads_that_are_no_power_of_two() -> None:
    ours = loud(build(preset("tiny-bloom", d_model=48, heads=6), stock=False))
    with torch.no_grad():
        torch.testing.assert_close(export(ours)(some_ids()).logits, ours(some_ids()).logits, atol=1e-5, rtol=1e-5)


def test_gpt_neox_with_its_own_weights_is_adopted() -> None:
    """Not our numbers: transformers' class as it makes itself."""
    for parallel in ("parallel", "sequential"):
        a = preset("tiny-pythia", block=parallel, positions={"fraction": 0.5})
        config = stock_config(a)
        import transformers

        torch.manual_seed(5)
        theirs = loud(transformers.GPTNeoXForCausalLM(config))
        with torch.no_grad():
            torch.testing.assert_close(
                adopt(theirs, a)(some_ids()).logits, theirs(some_ids()).logits, atol=1e-5, rtol=1e-5
            )
    with pytest.raises(VesaliusError, match="GPT2LMHeadModel"):
        adopt(theirs, preset("tiny-gpt2"))


def test_each_class_says_why_it_does_not_fit() -> None:
    assert {name: type(build(preset(name))).__name__ for name in CLASSES} == CLASSES
    reasons = why_not(preset("tiny-palm"))
    assert all(reasons.values()) and "block is 'parallel-shared'" in " ".join(reasons["Llama"])
    assert "mixers are qlstm" in " ".join(why_not(preset("tiny-qlstm"))["GPT2"])
    assert stock_name(preset("languini-gpt-mini")) is None  # its heads do not add up to d_model
    with pytest.raises(VesaliusError, match=r"nearest is GPT2: .*heads \* d_head"):
        export(build(preset("tiny-gpt2", d_head=8)))


# -- initial weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_seed_is_a_model(name: str) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, same, other = (build(preset(name), seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    ours = export(build(preset(name), 3, stock=False)).state_dict()
    assert all(torch.equal(first[k], ours[k]) for k in first)


def test_initial_deviations_are_the_schemes() -> None:
    size = {"d_model": 256, "layers": 4, "d_ff": 1024, "vocab_size": 1000}
    want = {
        "gpt2": (0.02, 0.02, 0.02 / 8**0.5),
        "neox": ((2 / (5 * 256)) ** 0.5, (2 / (5 * 256)) ** 0.5, 2 / (4 * 256**0.5)),
        "palm": (1.0, 1 / 16, 1 / 32),
        "t5": (1.0, 1 / 16, 1 / 32),
        "bert": (0.02, 0.02, 0.02),
    }
    assert sorted(want) == INITS.names()
    for scheme, deviations in want.items():
        model = build(preset("tiny-gpt2", init=scheme, **size), stock=False)
        block = model.model.layers[1]
        got = [w.std().item() for w in (model.model.embed.weight, block.mixer.k.weight, block.ffn.down.weight)]
        assert got == pytest.approx(list(deviations), rel=0.02)
        assert not block.ffn.up.bias.any() and (block.norm_ffn.weight == 1).all()


def test_t5_queries_make_up_for_unscaled_scores() -> None:
    attention = build(preset("tiny-t5", d_model=256, d_head=16)).decoder.block[0].layer[0].SelfAttention
    assert attention.q.weight.std().item() == pytest.approx((256 * 16) ** -0.5, rel=0.05)
    assert attention.k.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


# -- saved and loaded --------------------------------------------------------------------------------------------------

LOADER = """
import hashlib, sys, torch
import vesalius
import transformers
from transformers.models.auto import configuration_auto as table
ids = torch.randint(0, 259, (3, 17), generator=torch.Generator().manual_seed(1))
for again in (False, True):
    if again:  # as if transformers had been there first
        del table.CONFIG_MAPPING_NAMES["vesalius"]
        vesalius.autoload.announce()
    for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
        model = getattr(transformers, auto).from_pretrained(folder).eval()
        with torch.no_grad():
            logits = model(ids).logits
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        print(type(model).__name__, hashlib.sha256(logits.numpy().tobytes()).hexdigest(), tied)
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path) -> None:
    arguments, want = [], []
    for name, tied in (("tiny-palm", True), ("tiny-qlstm", True), ("tiny-llama", False), ("tiny-bert", True)):
        model = loud(build(preset(name, tied=tied), stock=False))
        model.save_pretrained(tmp_path / name)
        assert {p.suffix for p in (tmp_path / name).iterdir()} == {".json", ".safetensors"}
        auto = "AutoModelForMaskedLM" if name == "tiny-bert" else "AutoModelForCausalLM"
        arguments += [str(tmp_path / name), auto]
        with torch.no_grad():
            bits = hashlib.sha256(model(some_ids()).logits.numpy().tobytes()).hexdigest()
        want += [type(model).__name__, bits, str(tied)]
    done = subprocess.run([sys.executable, "-c", LOADER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == want * 2


def test_import_vesalius_loads_nothing_heavy() -> None:
    code = "import sys, vesalius; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("tied", [True, False])
def test_t5_stays_tied_or_not(tied: bool, tmp_path) -> None:
    a = preset("tiny-t5", tied=tied, logit_scale="inverse-sqrt" if tied else "none")
    model = build(a).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert (again.lm_head.weight is again.shared.weight) == tied
    inputs = {"input_ids": some_ids(), "decoder_input_ids": some_ids()}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("name", ["tiny-palm", "tiny-qlstm", "tiny-lstm", "tiny-bloom"])
def test_generate_is_greedy_decoding(name: str) -> None:
    model, ids = loud(build(preset(name), stock=False)), some_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    want = ids
    with torch.no_grad():
        for _ in range(5):
            grown = torch.cat([mask, mask.new_ones(2, want.shape[1] - 6)], 1)
            want = torch.cat([want, model(want, attention_mask=grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)


def test_training_steps_and_resized_vocabulary(tmp_path) -> None:
    model = build(preset("tiny-palm"))
    loss = model(some_ids(), labels=some_ids()).loss
    want = nn.functional.cross_entropy(model(some_ids()).logits[:, :-1].flatten(0, 1), some_ids()[:, 1:].flatten())
    torch.testing.assert_close(loss, want)
    model.activation_checkpointing_enable()
    model(some_ids(), labels=some_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    assert VesaliusForCausalLM.from_pretrained(tmp_path).model.architecture.vocab_size == 300


# -- on the bench ------------------------------------------------------------------------------------------------------

PARTS = ["tiny-gpt2", "tiny-pythia", "tiny-llama", "tiny-bloom", "tiny-bert", "tiny-palm", "tiny-qlstm", "tiny-lstm"]


@pytest.mark.parametrize("name", [*PARTS, "mixed"])
def test_the_bench_opens_every_parts_model(name: str) -> None:
    a = preset("tiny-qlstm", mixers="[qlstm,attn]") if name == "mixed" else preset(name)
    hf = loud(build(a, stock=False))
    model, ids = Model.wrap(hf, name=name), some_ids(2, 9)
    assert (model.n_layers, model.n_heads, model.d_head) == (2, a.heads, a.d_head)
    assert [str(p) for p in model.parts()][:5] == ["L0.H0", "L0.H1", "L0.H2", "L0.H3", "L0.MLP"]
    with torch.no_grad():
        base = hf(ids).logits
    assert torch.equal(model.logits(ids), base)
    sites = [Site(s, layer) for s in ("z", "q", "v", "neurons", "resid_post") for layer in range(2)]
    assert torch.equal(model.run(ids, capture=sites).logits, base)

    # one head's output from other prompts: the bench against a plain hook
    part, other = parse("L0.H2"), model.run(some_ids(5, 9)[3:], capture=[Site("z", 0)])
    got = model.run(ids, taps=taps([[Intervention(part, value=other.part(part))]], rows=2)).logits

    def patch(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        columns = slice(2 * a.d_head, 3 * a.d_head)
        z[..., columns] = other[Site("z", 0)].flatten(-2)[..., columns]
        return (z,)

    handle = hf.model.layers[0].mixer.o.register_forward_pre_hook(patch)
    with torch.no_grad():
        want = hf(ids).logits
    handle.remove()
    assert not torch.equal(want, base)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_patterns_exist_where_attention_does() -> None:
    model = Model.wrap(loud(build(preset("tiny-qlstm", mixers="[qlstm,attn]"))))
    found = model.run(some_ids(2, 9), capture=[Site("pattern", 0), Site("pattern", 1)]).sites
    assert list(found) == [Site("pattern", 1)]
    assert torch.allclose(found[Site("pattern", 1)].sum(-1), torch.ones(()))
