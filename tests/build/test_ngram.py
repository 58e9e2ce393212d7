"""Hard-wired n-gram heads against a slow reading of their formula, and on the bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import VOCAB
from pairs import random_pairs
from torch import Tensor
from transformers import AutoModelForCausalLM

import vesalius
from vesalius.build import MIXERS, Architecture, build
from vesalius.build.mixers.base import Context
from vesalius.errors import PartError, VesaliusError
from vesalius.find.detectors.stimuli import after_ngram
from vesalius.model import Intervention, Model, Site
from vesalius.model.head_weights import head_weights
from vesalius.model.intervene import taps
from vesalius.parts import parse_part

SIZES = {"layers": 3, "d_model": 24, "heads": 4, "kv_heads": 2, "vocab_size": 12, "max_length": 64}


def shape(mixers: str = "[lstm,ngram,attn]", **changes: object) -> Architecture:
    return Architecture(**{**SIZES, "mixers": mixers, "positions": {"kind": "rotary"}, **changes})  # type: ignore[arg-type]


def loud(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model.eval()


def strings(rows: int = 3, length: int = 30, symbols: int = 3) -> Tensor:
    return torch.randint(0, symbols, (rows, length), generator=torch.Generator().manual_seed(2))


def slow(part: torch.nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """The formula of the layer, a position and a head at a time."""
    a = part.architecture
    v, own = part.v(x), part.q(x)  # type: ignore[operator]
    out = torch.zeros(*x.shape[:2], a.heads * a.d_head)
    for b, row in enumerate(ids.tolist()):
        for t in range(len(row)):
            for h, n in enumerate(part.orders):  # type: ignore[arg-type]
                kv = h // (a.heads // a.kv_heads)
                read = [j for j in range(n, t + 1) if row[j - n : j] == row[t - n + 1 : t + 1] and t + 1 >= n]
                mine = slice(h * a.d_head, (h + 1) * a.d_head)
                z = own[b, t, mine].clone()
                if read:
                    z += v[b, read][:, kv * a.d_head : (kv + 1) * a.d_head].mean(0)
                out[b, t, mine] = z
    return part.o(out)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("orders", [(1, 2, 3), (2,), (1, 4)])
def test_the_layer_is_its_formula(orders: tuple[int, ...]) -> None:
    part = loud(MIXERS.get("ngram")(shape(mixer_options={"ngram": {"orders": orders}})))
    ids, x = strings(), torch.randn(3, 30, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, _ = part(x, Context(input_ids=ids))
        torch.testing.assert_close(found, slow(part, x, ids), atol=1e-6, rtol=1e-6)
        other = part(x, Context(input_ids=ids.flip(1)))[0]
    assert (other - found).abs().max() > 0.01


def test_generation_is_the_full_pass() -> None:
    model, ids = loud(build(shape(), stock=False)), strings(2, 12)
    with torch.no_grad():
        base = model(ids, use_cache=False).logits
        out, found = None, []
        for piece in ids.split([4, 1, 1, 3, 1, 2], dim=1):
            out = model(piece, past_key_values=None if out is None else out.past_key_values, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), base, atol=1e-5, rtol=1e-5)
    want = ids
    with torch.no_grad():
        for _ in range(8):
            want = torch.cat([want, model(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **given), want)


def test_the_bench_reads_and_changes_its_pattern(tmp_path: Path) -> None:
    hf, ids = loud(build(shape())), strings(4, 20)
    hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model = vesalius.open(str(tmp_path))
    with torch.no_grad():
        base = hf(ids).logits
    assert torch.equal(again(ids).logits, base) and torch.equal(model.logits(ids), base)
    pattern = model.run(ids, capture=[Site("pattern", 1)])[Site("pattern", 1)]  # (row, head, query, key)
    for head, n in enumerate((1, 2, 3, 1)):
        wanted = after_ngram(ids, n).float()
        torch.testing.assert_close(pattern[:, head], wanted / wanted.sum(-1, keepdim=True).clamp(min=1))
    part = parse_part("L1.H1")
    zeroed = [[Intervention(part, "zero", pattern=True)]]
    changed = model.run(ids, taps=taps(zeroed, rows=4)).logits
    assert changed is not None and not torch.equal(changed, base)
    with pytest.raises(PartError, match="mixes positions with Ngram, not with attention"):
        head_weights(model, 1)


def test_sweeps_replay_blocks_that_read_ids() -> None:
    """Patching from a recorded pass gives what a whole pass gives."""
    model = Model.wrap(loud(build(shape(vocab_size=VOCAB))), name="ngrams")
    drawn = random_pairs(model, length=12, shared=3)
    pairs = replace(drawn, clean=drawn.clean % 3, corrupted=drawn.corrupted % 3)
    found = vesalius.find("activation-patching", model, pairs)
    for name in ("L1.H0", "L1.H2", "L2.H1"):
        part = parse_part(name)
        source = model.run(pairs.clean, pairs.mask, capture=[Site("z", part.layer or 0)]).part(part)
        values = []
        for interventions in ([], [Intervention(part, value=source)]):
            ran = model.run(pairs.corrupted, pairs.mask, taps=taps([interventions], rows=pairs.n_rows)).logits
            assert ran is not None
            reads = ran.gather(1, pairs.reads[..., None].expand(-1, -1, ran.shape[-1]))
            tokens = pairs.metric.tokens(pairs)
            values.append(pairs.metric(reads if tokens is None else reads[..., tokens], pairs))
        assert found[name] == pytest.approx(float((values[1] - values[0]).mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"orders": [0]}, "orders of 1 or more"), ({"orders": [1, 2, 3, 4, 5]}, "a head at least for each")],
)
def test_orders_that_cannot_be_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(VesaliusError, match=said):
        build(shape(mixer_options={"ngram": options}))


def test_embeddings_without_ids_are_refused() -> None:
    model = build(shape())
    with pytest.raises(VesaliusError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 24))
