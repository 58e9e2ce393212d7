"""Linear maps put out for others: the first model stays, and what can be folded back says the same."""

from __future__ import annotations

import pytest
import torch
from families import some_ids, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from vesalius.change.linears import REPLACEMENTS, ShiftedLinear, linear_names, merged, replaced
from vesalius.errors import ModelError, UnknownName, VesaliusError
from vesalius.model.int8 import Int8Linear, RoundedLinear, Scheme, int_product

SCHEMES = [
    Scheme(),
    Scheme(threshold=0.7),
    Scheme(weight_zero=True, input_zero=True, threshold=0.7),
    Scheme(6, "tensor", "tensor"),
    Scheme(4, input_zero=True, inputs="tensor"),
    Scheme(8, inputs="fixed", input_zero=True),
    Scheme(5, "tensor", "none", weight_zero=True),
]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shifted(_: str, module: nn.Module) -> nn.Module:
    n_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
    return ShiftedLinear.of(module, numbers(n_in), numbers(n_in, seed=1).exp())


def weight_only(_: str, module: nn.Module) -> nn.Module:
    return Int8Linear.of(module, Scheme(inputs="none"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "t5", "bert"])
@pytest.mark.parametrize("make", [shifted, weight_only])
def test_what_stands_in_folds_back_to_the_same_output(family: str, make: object) -> None:
    model, ids = tiny(family), some_ids()
    decoder = ids if family == "t5" else None
    before = model.logits(ids, decoder=decoder)
    changed = replaced(model, make)
    assert torch.equal(model.logits(ids, decoder=decoder), before)  # the first model stays as it is
    there = changed.logits(ids, decoder=decoder)
    back = merged(changed)
    assert torch.allclose(back.logits(ids, decoder=decoder), there, atol=1e-5)
    kinds = [type(m) for m in back.hf.modules()]
    assert kinds == [type(m) for m in model.hf.modules()]  # Conv1D where there was one
    if make is shifted:
        assert torch.allclose(there, before, atol=1e-4)
    else:
        assert 0 < float((there - before).abs().max()) < 0.1 * float(before.std())
    embedding = model.hf.get_input_embeddings().weight
    assert changed.hf.get_input_embeddings().weight is embedding  # shared, not copied


def test_a_map_that_rounds_its_inputs_has_no_plain_one() -> None:
    changed = replaced(tiny("llama"), lambda _, m: Int8Linear.of(m, Scheme()))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj: this map rounds its inputs"):
        merged(changed)
    with pytest.raises(UnknownName, match="lm_haed"):
        replaced(tiny("llama"), weight_only, ["lm_haed"])
    with pytest.raises(VesaliusError, match="1 bits do not go into int8"):
        Scheme(1)
    assert {e.name for e in REPLACEMENTS} >= {"int8", "rounded", "shifted"}
    assert all(callable(REPLACEMENTS.get(e.name).of) for e in REPLACEMENTS)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_whole_numbers_say_what_rounded_ones_do(scheme: Scheme) -> None:
    """Against the same map computed in doubles; and that map is near the one it was made of."""
    module = nn.Linear(40, 24).requires_grad_(False)
    module.weight.copy_(numbers(24, 40))
    x = numbers(3, 7, 40, seed=2) * 0.5
    fixed = torch.stack(x.aminmax()) if scheme.inputs == "fixed" else None
    whole, slow = (kind.of(module, scheme, fixed)(x) for kind in (Int8Linear, RoundedLinear))
    assert whole.shape == (3, 7, 24)
    assert torch.allclose(whole, slow, atol=1e-5)
    error = float((whole - module(x)).norm() / module(x).norm())
    assert 0 < error < 3 / 2 ** (scheme.bits - 1)


def test_products_of_whole_numbers_are_exact() -> None:
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((1, 1537), (5, 1537)))
    for rows in (1, 2, 33):
        x = a.expand(rows, -1).contiguous()
        assert torch.equal(int_product(x, b).long(), x.long() @ b.long().T)


def test_embeddings_and_the_unembedding_are_left() -> None:
    for family in ("llama", "gpt2", "bert", "t5"):
        model = tiny(family)
        names = linear_names(model)
        assert not any("head" in n or "cls" in n or "shared" in n for n in names)
        in_blocks = sum(isinstance(m, nn.Linear | Conv1D) for s in model.anatomy.stacks.values() for b in s.blocks for m in b.module.modules())  # fmt: skip  # noqa: E501
        assert len(names) == in_blocks
