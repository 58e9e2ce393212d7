"""`check` passes every family, and every one of its rows goes red when what it speaks of is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from families import ALL, MASKED, SEQ2SEQ, tiny, tiny_hf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vesalius.errors import VesaliusError
from vesalius.model import Intervention, Model, checkbench, gradients, hooks, identities, model, relevance, replay
from vesalius.model.anatomy import Anatomy
from vesalius.model.check import TOLERANCE, Check, CheckReport, check
from vesalius.model.checkbench import Worst
from vesalius.model.identities import IDENTITIES, PARTS, USES
from vesalius.model.norms import NormView


def n_hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def with_anatomy(model: Model, **changes: Any) -> Model:
    return replace(model, anatomy=replace(model.anatomy, **changes))


def with_blocks(model: Model, change: Callable[[Any], Any]) -> Model:
    stacks = {p: replace(s, blocks=[change(b) for b in s.blocks]) for p, s in model.anatomy.stacks.items()}
    return with_anatomy(model, stacks=stacks)


@pytest.mark.parametrize("family", ALL)
def test_every_family_passes_and_is_left_as_it_was(family: str) -> None:
    model = tiny(family)
    attention = model.hf.config._attn_implementation
    weights = {n: p.clone() for n, p in model.hf.state_dict().items()}
    report = check(model)
    assert report.ok, report
    assert n_hooks(model) == 0
    assert model.hf.config._attn_implementation == attention
    assert all(torch.equal(weights[n], p) for n, p in model.hf.state_dict().items())
    usable = report.usable()
    assert set(usable) == {*PARTS, *USES}
    assert usable["xhead"].ok == (family in SEQ2SEQ)
    assert usable["edge"].ok == (family not in [*MASKED, *SEQ2SEQ, "opt-350m"])
    assert all(usable[k].ok for k in (*PARTS, *USES) if k not in ("xhead", "edge"))


def test_an_encoder_without_a_head_is_checked_on_its_last_hidden_state() -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    report = check(Model.wrap(tf.BertModel(config), name="encoder"))
    assert report.ok, report
    usable = report.usable()
    assert usable["head"].ok and usable["replay"].ok and usable["padding"].ok
    for kind in ("gradient", "edge"):
        assert not usable[kind].ok and "no logits" in usable[kind].reason


# -- a wrong anatomy is caught, by the check that speaks of it ---------------------------------------------------------


def _swap_q_and_k(block: Any) -> Any:
    p = block.projections
    return replace(block, projections={"q": p["k"], "k": p["q"], "v": p["v"]})


def _swap_k_and_v(block: Any) -> Any:
    p = block.projections
    return replace(block, projections={"q": p["q"], "k": p["v"], "v": p["k"]})


def _norms_as(kind: str) -> Callable[[Any], Any]:
    return lambda block: replace(
        block, norm_in=NormView(block.norm_in.module, kind), norm_mid=NormView(block.norm_mid.module, kind)
    )


WRONG: dict[str, tuple[str, Callable[[Model], Model], set[str]]] = {
    # family, how its anatomy is broken, checks that must name it
    "layout interleaved for concat": (
        "gpt2",
        lambda m: with_anatomy(m, spec=m.anatomy.spec.model_copy(update={"qkv_layout": "interleaved"})),
        {"patterns", "sides"},
    ),
    "layout concat for interleaved": (
        "gpt-neox",
        lambda m: with_anatomy(m, spec=m.anatomy.spec.model_copy(update={"qkv_layout": "concat"})),
        {"patterns", "sides"},
    ),
    "layout interleaved for grouped concat": (
        "phi3",
        lambda m: with_anatomy(m, spec=m.anatomy.spec.model_copy(update={"qkv_layout": "interleaved"})),
        {"reads"},
    ),
    "q and k swapped": ("opt", lambda m: with_blocks(m, _swap_q_and_k), {"sides"}),
    "k and v swapped": ("opt", lambda m: with_blocks(m, _swap_k_and_v), {"patterns", "sides"}),
    "gain read as weight": ("gemma", lambda m: with_blocks(m, _norms_as("rms")), {"norms"}),
    "gain read as weight + 1": ("llama", lambda m: with_blocks(m, _norms_as("rms+1")), {"norms"}),
    "layer norm for RMSNorm": ("llama", lambda m: with_blocks(m, _norms_as("layer")), {"norms"}),
    "parallel for serial": ("llama", lambda m: with_anatomy(m, parallel=True), {"reads"}),
    "serial for parallel": ("gpt-neox", lambda m: with_anatomy(m, parallel=False), {"reads"}),
    "pre-norm for post-norm": ("bert", lambda m: with_anatomy(m, post_norm=False), {"residual"}),
    "too many kv heads": ("llama", lambda m: with_anatomy(m, n_kv_heads=4), {"reads", "patterns"}),
    "too few kv heads": ("llama", lambda m: with_anatomy(m, n_kv_heads=1), {"reads"}),
    "heads of the wrong width": ("llama", lambda m: with_anatomy(m, n_heads=2, n_kv_heads=1, d_head=16), {"patterns"}),
    "causal for bidirectional": (
        "bert",
        lambda m: with_anatomy(m, stacks={"": replace(m.anatomy.main, causal=True)}),
        {"patterns"},
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_anatomy_fails_and_is_named(wrong: str, dtype: torch.dtype) -> None:
    family, breaks, named = WRONG[wrong]
    right = Model.wrap(tiny_hf(family).to(dtype), name=family)
    assert check(right).ok
    report = check(breaks(right))
    assert not report.ok
    assert named <= set(report.failed), report
    assert report["logits"].status == "ok"  # transformers' own answer needs no anatomy
    assert n_hooks(right) == 0
    for name in named:
        assert report[name].reason
        for kind in report[name].covers:
            assert not report.usable()[kind].ok and name in report.usable()[kind].reason


# -- a bench that is wrong by one part in a hundred is caught too: its two sides stand apart -------------


def _attention_off(monkeypatch: pytest.MonkeyPatch) -> None:
    own = hooks._attention

    def off(*args: Any, **kwargs: Any) -> Any:
        out, pattern = own(*args, **kwargs)
        return out * 1.01, pattern

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, hooks.ATTENTION, off)


def _tilted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, axis: int = -1) -> None:
    """Changes a result by a few parts in a hundred, unevenly: a norm would hide a common factor."""
    old = getattr(owner, name)

    def off(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = old(*args, **kwargs).movedim(axis, -1)
        return (x * torch.linspace(0.95, 1.05, x.shape[-1])).movedim(-1, axis)

    monkeypatch.setattr(owner, name, off)


def _patch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Intervention.changed
    monkeypatch.setattr(Intervention, "changed", lambda *a, **k: old(*a, **k) * 1.01)


def _gradient_off(monkeypatch: pytest.MonkeyPatch) -> None:
    old = gradients.Differences.gradients

    def off(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = old(self, *args, **kwargs)
        return replace(run, grads={s: g * 1.05 for s, g in run.grads.items()})

    monkeypatch.setattr(gradients.Differences, "gradients", off)


def _rules_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance._Ratio, "forward", staticmethod(lambda ctx, v, y: y * 1.0000005 + 1e-7))


def _contributions_off(monkeypatch: pytest.MonkeyPatch) -> None:
    old = identities.contributions

    def off(*args: Any, **kwargs: Any) -> Any:
        found = old(*args, **kwargs)
        keep = torch.ones(found.values.shape[1])
        keep[3] = 0  # one head forgotten
        return replace(found, values=found.values * keep.view(1, -1, 1, 1))

    monkeypatch.setattr(identities, "contributions", off)


def _padding_off(monkeypatch: pytest.MonkeyPatch) -> None:
    old = model.Model.inputs

    def off(self: Model, *args: Any, **kwargs: Any) -> Any:
        return {k: v for k, v in old(self, *args, **kwargs).items() if k != "attention_mask"}

    monkeypatch.setattr(model.Model, "inputs", off)


def _hook_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks.Hooks, "__exit__", lambda self, *a: self._exit.close())


BENCH: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "attention": (_attention_off, {"replay", "suffix", "gradients", "patch k", "patch v"}),
    "patches": (
        _patch_off,
        {f"patch {k}" for k in ("head", "q", "k", "v", "attn", "mlp", "neuron", "resid", "embed")} | {"replay"},
    ),
    "gradients": (_gradient_off, {"gradients", "slopes"}),
    "rules": (_rules_off, {"relevance"}),
    "contributions": (_contributions_off, {"contributions"}),
    "replay": (lambda m: _tilted(m, replay.Tape, "replay"), {"replay", "suffix"}),
    "padding": (_padding_off, {"left padding"}),
    "edges": (lambda m: _tilted(m, checkbench, "writes", axis=1), {"edge ends", "patch edge"}),
    "hooks": (_hook_left, {"left behind"}),
}


@pytest.mark.parametrize("what", BENCH)
def test_a_bench_off_by_a_little_fails_the_check_that_speaks_of_it(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, named = BENCH[what]
    one = tiny("llama")
    breaks(monkeypatch)
    report = check(one)
    assert named <= set(report.failed), report


def test_every_identity_was_seen_to_fail_here() -> None:
    """Each row that can fail is named by a broken model or bench above, or stands with one that is."""
    shown = {n for _, _, names in WRONG.values() for n in names} | {n for _, names in BENCH.values() for n in names}
    elsewhere = {"logits", "capture", "own attention", "writes", "patch xhead", "right padding"}
    assert shown | elsewhere == {i.name for i in IDENTITIES}
    assert not shown & elsewhere


def test_the_rest_of_the_identities_can_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:  # recording that moves what it records
        run = hooks._first
        m.setattr(hooks, "_first", lambda out: run(out).mul_(1.01))
        assert "capture" in check(tiny("llama")).failed
    with monkeypatch.context() as m:
        own = hooks._attention
        m.setitem(
            ALL_ATTENTION_FUNCTIONS._global_mapping,
            hooks.ATTENTION,
            lambda *a, **k: (own(*a, **k)[0] * 1.01, own(*a, **k)[1]),
        )
        assert "own attention" in check(tiny("llama")).failed
    with monkeypatch.context() as m:
        old = Anatomy.head_out
        m.setattr(Anatomy, "head_out", lambda self, block: old(self, block).flip(0))
        assert "writes" in check(tiny("llama")).failed
    with monkeypatch.context() as m:
        _patch_off(m)
        assert "patch xhead" in check(tiny("t5")).failed
    with monkeypatch.context() as m:
        _padding_off(m)
        assert "right padding" in check(tiny("bert")).failed
    with monkeypatch.context() as m:  # a forward pass that never answers the same way twice
        one = tiny("llama")
        count = iter(range(10**6))
        forward = one.hf.lm_head.forward
        m.setattr(one.hf.lm_head, "forward", lambda x: forward(x) + next(count))
        assert {"logits", "left behind"} <= set(check(one).failed)


# -- the yardstick, the report, the inputs -----------------------------------------------------------------------------


def test_the_yardstick_sees_what_it_should() -> None:
    want = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    want[0, 0] = 1e4  # a massive activation excuses nothing elsewhere
    for factor, seen in ((1 + 1e-3, True), (1 + 1e-8, False)):
        worst = Worst()
        worst.see(want * factor, want)
        assert (worst.value > 1e-4) == seen
    worst = Worst()
    wrong = want.clone()
    wrong[1, 1] += 1e4
    worst.see(wrong, want, "here")
    assert worst.value > 1 and worst.at == "here"
    worst = Worst()
    worst.see(want, want, "first")
    worst.see(want * float("nan"), want, "second")
    worst.see(want, want, "third")
    assert worst.value != worst.value and worst.at == "second"
    with pytest.raises(VesaliusError, match="shape"):
        Worst().see(want, want[:2])
    worst = Worst()
    worst.same(want, want.nextafter(torch.tensor(1e9)))
    assert worst.value > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "phi", "bert", "t5"])
def test_other_precisions_pass_with_their_stated_tolerance(family: str, dtype: torch.dtype) -> None:
    report = check(Model.wrap(tiny_hf(family).to(dtype), name=family))
    assert report.ok, report
    stated = {r.tolerance for r in report.rows if r.name not in ("slopes",)}
    assert stated == {0.0, TOLERANCE[dtype]}
    if dtype != torch.float64:
        assert report["slopes"].status == "not applicable"
        assert report.usable()["gradient"].ok and "slopes not checked" in report.usable()["gradient"].reason


def test_a_check_that_raises_is_a_failed_row_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero\nsecond line")

    monkeypatch.setattr(identities, "contributions", boom)
    report = check(tiny("llama"))
    assert report.failed == ["contributions"]
    assert report["contributions"].reason == "ZeroDivisionError: by zero"
    assert not report.usable()["direct"].ok and report.usable()["head"].ok


def test_usable_follows_from_the_rows() -> None:
    row = Check("patch head", "", "ok", 0.0, 1e-4, ("head",))
    bad = replace(row, name="patch mlp", status="failed", covers=("mlp",), reason="L1.MLP: off by 1")
    none = replace(row, name="patch xhead", status="not applicable", covers=("xhead",), reason="none here")
    shared = replace(row, name="logits", covers=("head", "mlp", "xhead"))
    report = CheckReport("m", (shared, row, bad, none))
    usable = report.usable()
    assert not report.ok and report.failed == ["patch mlp"]
    assert usable["head"] == (True, "")
    assert usable["mlp"] == (False, "patch mlp failed (L1.MLP: off by 1)")
    assert usable["xhead"] == (False, "none here")
    assert not usable["neuron"].ok  # nothing checked it
    assert not bool(usable["mlp"]) and bool(usable["head"])


def test_the_report_shows_itself() -> None:
    report = check(tiny("bert"))
    frame = report.to_frame()
    assert list(frame["check"]) == [i.name for i in IDENTITIES]
    assert set(frame["status"]) == {"ok", "not applicable"}
    assert frame["worst"].isna().equals(frame["status"] == "not applicable")
    assert "bit for bit" in repr(report) and "cannot use edge" in repr(report)
    page = replace(report, model="<script>")._repr_html_()
    assert "<script>" not in page and "patch neuron" in page


def test_texts_and_seeds_and_progress() -> None:
    class Tokenizer:
        all_special_ids = (0, 1, 2)

        def __len__(self) -> int:
            return 97

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [5 + ord(c) % 90 for c in text]}

    one = replace(tiny("llama"), tokenizer=Tokenizer())
    seen: list[tuple[int, int]] = []
    texts = ["a short text", "one that is longer"]
    assert check(one, texts=texts, progress=lambda *x: seen.append(x)).ok
    assert seen == [(i + 1, len(IDENTITIES)) for i in range(len(IDENTITIES))]
    bench = checkbench.draw(one, 4, 12, 0, texts)
    assert bench.ids.tolist() == [[5 + ord(c) % 90 for c in t[:12]] for t in texts]
    a, b, c = (checkbench.draw(one, 4, 12, s, None) for s in (0, 0, 1))
    assert torch.equal(a.ids, b.ids) and not torch.equal(a.ids, c.ids)
    assert int(a.ids.min()) > 2
    assert a.pairs.first_difference >= 6 and torch.equal(a.ids[:, :6], a.pairs.corrupted[:, :6])
    for bad in ({"n": 0}, {"length": 3}, {"texts": ["abc"]}):
        with pytest.raises(VesaliusError, match="too little"):
            check(one, **bad)
    with pytest.raises(VesaliusError, match="without a tokenizer"):
        check(tiny("llama"), texts=["hello there"])


@pytest.mark.real
def test_the_default_model_passes(smollm2: Model) -> None:
    report = check(smollm2, n=2, length=8)
    assert report.ok, report
    assert all(one.ok for kind, one in report.usable().items() if kind != "xhead")
