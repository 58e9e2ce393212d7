"""Every registered mixer: causal, steps, padding, gradients; and the quasi-LSTM against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vesalius.build import MIXERS, Architecture, build, preset
from vesalius.build.mixers.base import Context, Store
from vesalius.build.mixers.qlstm import in_blocks
from vesalius.build.positions import alibi_slopes
from vesalius.errors import VesaliusError

NAMES = [entry.name for entry in MIXERS]
CAUSAL = [name for name in NAMES if MIXERS.get(name).causal]
SCHEMES = ["none", "learned", "rotary", "alibi", "t5"]


def shape(mixer: str, positions: str = "none", **changes) -> Architecture:
    keys = {"layers": 2, "d_model": 24, "heads": 4, "kv_heads": 2, "vocab_size": 40, "max_length": 48}
    return Architecture(**{**keys, "mixers": mixer, "positions": {"kind": positions}, **changes})


def loud(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model.eval()


def some_ids(rows: int = 2, length: int = 13) -> Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(1))


CASES = [(m, p) for m in CAUSAL for p in (SCHEMES if MIXERS.get(m).needs_positions else ["none"])]
CASES += [("[qlstm,attn]", "rotary")]


@pytest.mark.parametrize(("mixer", "positions"), CASES)
def test_the_past_does_not_see_the_future(mixer: str, positions: str) -> None:
    model, ids = loud(build(shape(mixer, positions), stock=False)), some_ids()
    with torch.no_grad():
        base = model(ids).logits
        for t in range(ids.shape[1]):
            other = ids.clone()
            other[:, t] = (other[:, t] + 7) % 40
            new = model(other).logits
            assert torch.equal(new[:, :t], base[:, :t])
            assert not torch.equal(new[:, t:], base[:, t:])


@pytest.mark.parametrize(("mixer", "positions"), CASES)
def test_one_token_at_a_time_is_the_forward_pass(mixer: str, positions: str) -> None:
    model, ids = loud(build(shape(mixer, positions), stock=False)), some_ids()
    with torch.no_grad():
        base = model(ids, use_cache=False).logits
        out = model(ids[:, :3])
        found = [out.logits]
        for t in range(3, ids.shape[1] - 2):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
            found.append(out.logits)
        found.append(model(ids[:, -2:], past_key_values=out.past_key_values).logits)  # and two at once
    torch.testing.assert_close(torch.cat(found, 1), base, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixer", CAUSAL)
def test_step_is_forward(mixer: str) -> None:
    part = loud(MIXERS.get(mixer)(shape(mixer)))
    x, ids = torch.randn(2, 9, 24), some_ids(2, 9) % 3
    cache, found = part.init_cache(2), []
    with torch.no_grad():
        want, losses = part(x, Context(input_ids=ids))
        for t in range(9):
            y, cache = part.step(x[:, t], cache, Context(input_ids=ids[:, t : t + 1]))
            found.append(y)
    assert losses == {}
    torch.testing.assert_close(torch.stack(found, 1), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("mixer", "positions"), CASES)
def test_padding_changes_nothing(mixer: str, positions: str, left: bool) -> None:
    model, ids = loud(build(shape(mixer, positions), stock=False)), some_ids(1, 9)
    pad, ones = torch.full((1, 4), 3), torch.ones(1, 9, dtype=torch.long)
    both = [pad, ids] if left else [ids, pad]
    mask = [torch.zeros_like(pad), ones] if left else [ones, torch.zeros_like(pad)]
    with torch.no_grad():
        want = model(ids).logits
        got = model(torch.cat(both, 1), attention_mask=torch.cat(mask, 1)).logits
    got = got[:, 4:] if left else got[:, :9]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("mixer", "positions"), CASES)
def test_packed_segments_are_alone(mixer: str, positions: str) -> None:
    model, ids = loud(build(shape(mixer, positions), stock=False)), some_ids(2, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7, [4] * 8 + [2] * 4])
    with torch.no_grad():
        packed = model(ids, segment_ids=segments).logits
        for row, cut in ((0, 5), (1, 8)):
            for piece in (slice(0, cut), slice(cut, 12)):
                alone = model(ids[row : row + 1, piece]).logits[0]
                torch.testing.assert_close(packed[row, piece], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixer", NAMES)
def test_gradients_in_double(mixer: str) -> None:
    part = loud(MIXERS.get(mixer)(shape(mixer, d_model=8, heads=2, kv_heads=1))).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    weights = list(part.parameters())
    context = Context(input_ids=some_ids(2, 7) % 3)
    assert torch.autograd.gradcheck(lambda y, *_: part(y, context)[0], (x, *weights), fast_mode=True)


def test_four_axis_masks_stand_for_everything() -> None:
    model, ids = loud(build(shape("attn", "rotary"), stock=False)), some_ids(2, 8)
    prefix = torch.ones(8, 8, dtype=torch.bool).tril()
    prefix[:, :3] = True  # the first three see each other
    for mask in (prefix, torch.zeros(8, 8).masked_fill(~prefix, float("-inf"))):
        leaves = model.model.embed(ids).detach().requires_grad_()
        out = model(inputs_embeds=leaves, attention_mask=mask[None, None].expand(2, 1, 8, 8)).logits
        for t in range(8):
            (seen,) = torch.autograd.grad(out[0, t].pow(2).sum(), leaves, retain_graph=True)
            allowed = torch.arange(8) <= t if t > 2 else torch.arange(8) < 3
            assert torch.equal(seen[0].abs().sum(-1) > 0, allowed)
    with pytest.raises(VesaliusError, match="recurrent"):
        build(shape("qlstm"), stock=False)(ids, attention_mask=prefix[None, None].expand(2, 1, 8, 8))


def test_positions_past_the_last_are_refused() -> None:
    with pytest.raises(VesaliusError, match="max_length=48"):
        build(shape("attn", "learned"), stock=False)(some_ids(1, 49))


def test_alibi_slopes() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    extra = [2.0 ** (-8 * h / 16) for h in (1, 3, 5, 7)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor([2.0**-h for h in range(1, 9)] + extra))


# -- quasi-LSTM --------------------------------------------------------------------------------------------------------


def loop(forget: Tensor, write: Tensor, before: Tensor | None) -> Tensor:
    """The formula, a step at a time."""
    c, cells = torch.zeros_like(write[:, :, 0]) if before is None else before, []
    for t in range(write.shape[2]):
        c = forget[:, :, t] * c + write[:, :, t]
        cells.append(c)
    return torch.stack(cells, 2)


@pytest.mark.parametrize("length", [1, 7, 48])
@pytest.mark.parametrize("block", [1, 8, 16, 48])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_blocks_are_the_loop(block: int, length: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    f, write = (torch.randn(2, 3, length, 5, dtype=dtype, generator=generator) for _ in range(2))
    f = f * 6  # gates from nearly shut to nearly open
    before = torch.randn(2, 3, 5, dtype=dtype, generator=generator)
    inputs = [x.requires_grad_() for x in (f, write, before)]
    weigh = torch.randn(2, 3, length, 5, dtype=dtype, generator=generator)
    results = []
    for run in (lambda *a: in_blocks(*a, block), loop):
        out = run(torch.sigmoid(f), write, before)
        results.append((out, *torch.autograd.grad((out * weigh).sum(), inputs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("mixer", ["qlstm", "lstm"])
def test_state_carried_over_a_cut_is_one_pass(mixer: str) -> None:
    part = loud(MIXERS.get(mixer)(shape(mixer))).double()
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    with torch.no_grad():
        want, _ = part(x, Context())
        cache = Store()
        pieces = [part(piece, Context(past=cache))[0] for piece in x.split([5, 9, 7], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-12, rtol=1e-12)


def test_one_cell_by_hand() -> None:
    part = loud(MIXERS.get("qlstm")(shape("qlstm"))).double()
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    f, i, z, o = (p(x) for p in (part.forget, part.input, part.value, part.output))
    c, found = torch.zeros(1, 24, dtype=torch.float64), []
    for t in range(4):
        c = torch.sigmoid(f[:, t] + 1) * c + torch.sigmoid(i[:, t]) * torch.tanh(z[:, t])
        found.append(torch.sigmoid(o[:, t]) * torch.tanh(c))
    torch.testing.assert_close(part(x, Context())[0], part.o(torch.stack(found, 1)), atol=1e-12, rtol=1e-12)


def test_state_has_one_size() -> None:
    a = preset("tiny-qlstm")
    model, ids = loud(build(a)), torch.zeros(1, 30, dtype=torch.long)
    with torch.no_grad():
        states = [model(ids[:, :n]).past_key_values.layers[0].recurrent_states[0] for n in (5, 30)]
    assert states[0].shape == states[1].shape
    assert sum(s.numel() * 4 for s in states[:1]) * a.layers == MIXERS.get("qlstm").state_bytes(a, 30) * a.layers


# -- PaLM's block ------------------------------------------------------------------------------------------------------


def test_parallel_block_is_its_formula() -> None:
    model = loud(build(preset("tiny-palm")))
    block, x = model.model.layers[0], torch.randn(2, 6, 64)
    rotary = model.model.positions.rotary(torch.arange(6)[None], torch.float32)
    with torch.no_grad():
        got, _ = block(x, position_embeddings=rotary)
        n = block.norm_mixer(x)
        mixed, _ = block.mixer(n, Context(position_embeddings=rotary))
        f = block.ffn
        fed = f.down(nn.functional.silu(f.gate(n)) * f.up(n))
        torch.testing.assert_close(got, x + mixed + fed, atol=1e-6, rtol=1e-6)
        after = x + mixed
        n = block.norm_mixer(after)
        sequential = after + f.down(nn.functional.silu(f.gate(n)) * f.up(n))
    assert (got - sequential).abs().max() > 0.01


def test_palm_decodes_as_it_reads() -> None:
    model = loud(build(preset("tiny-palm")))
    ids = torch.randint(0, 259, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, past, found = model(ids, use_cache=False).logits, None, []
        for t in range(64):
            out = model(ids[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-5, rtol=1e-5)
