"""Prompts and answers as rows: causal, masked and encoder-decoder models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from task_helpers import opened, read

from vesalius.errors import TaskError
from vesalius.tasks import Example, Task, task
from vesalius.tasks.base import UserRows
from vesalius.tasks.encode import Encoder

CAPITALS = (
    Example("The capital of France is", "The capital of Italy is", (" Paris",), (" Rome",), {"country": (15, 21)}),
    Example("Then the government of Peru sits in", "Then the government of Cuba sits in", (" Lima",), (" Havana",)),
)
LONG = (
    Example("The capital of France is", "The capital of Italy is", (" Paris", " New York"), (" Rome", " Buenos Aires")),
    Example("I flew to Peru and found", "I flew to Cuba and found", (" Lima", " Lima station"), (" Havana city",)),
)


def rows(*examples: Example, **changes: Any) -> Task:
    source = UserRows("p.jsonl", examples, tuple(f"p.jsonl line {i + 1}" for i in range(len(examples))))
    return Task("p.jsonl", None, 0, {}, source, on_misaligned=changes.pop("on_misaligned", "error"), **changes)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_causal_rows_are_padded_left_and_read_at_the_last_token(splitting: Any) -> None:
    pairs = rows(*CAPITALS).pairs(opened(splitting))
    for row, e in enumerate(CAPITALS):
        want = ids(splitting, e.clean)
        assert pairs.clean[row, -len(want) :].tolist() == want
        assert pairs.mask[row].tolist() == [0] * (pairs.length - len(want)) + [1] * len(want)
        assert pairs.answers[row] == ids(splitting, e.answer[0]) and pairs.wrong[row] == ids(splitting, e.wrong[0])
    assert pairs.reads.tolist() == [[pairs.length - 1]] * 2 and pairs.targets is None and pairs.decoder is None
    assert splitting.decode(pairs.clean[0, pairs.positions["country"][0]]) == " France"
    assert pairs.positions["country"][1] == -1  # the second example has no such position


def test_the_beginning_token_is_kept_and_the_end_token_is_not(beginning: Any) -> None:
    pairs = rows(CAPITALS[0]).pairs(opened(beginning))
    assert pairs.clean[0].tolist() == [beginning.bos_token_id, *ids(beginning, CAPITALS[0].clean)]
    assert beginning.decode(pairs.clean[0, pairs.positions["country"][0]]) == " France"


def test_masked_rows_are_padded_right_and_read_at_the_mask(wordpiece: Any) -> None:
    pairs = rows(*CAPITALS).pairs(opened(wordpiece, "masked"))
    for row, e in enumerate(CAPITALS):
        want = wordpiece(f"{e.clean} [MASK].")["input_ids"]
        assert pairs.clean[row, : len(want)].tolist() == want and int(pairs.mask[row].sum()) == len(want)
        assert pairs.clean[row, pairs.reads[row, 0]] == wordpiece.mask_token_id
        assert pairs.positions["END"][row] == pairs.reads[row, 0]
    assert wordpiece.decode([pairs.answers[0][0]]) == "paris"


def test_encoder_decoder_rows_read_in_decoder_positions_after_the_sentinel(sentinels: Any, t5: Any) -> None:
    pairs = rows(*CAPITALS).pairs(t5)
    for row, e in enumerate(CAPITALS):
        want = sentinels(e.clean + " <extra_id_0>")["input_ids"]
        blank = sentinels.convert_tokens_to_ids("<extra_id_0>")
        assert [i for i in pairs.clean[row].tolist() if i != sentinels.pad_token_id] == want
        assert pairs.decoder is not None and pairs.decoder[row].tolist() == [0, blank]
        assert pairs.reads[row].tolist() == [1] and pairs.clean[row, pairs.positions["END"][row]] == blank
    assert sentinels.convert_ids_to_tokens(int(pairs.clean[0, pairs.positions["country"][0]])) == "▁France"


def test_an_encoder_decoder_without_sentinels_reads_after_the_start_token(splitting: Any) -> None:
    hf = type("HF", (), {"config": type("C", (), {"decoder_start_token_id": 7})()})()
    pairs = rows(CAPITALS[0]).pairs(opened(splitting, "encoder-decoder", hf))
    assert pairs.decoder is not None and pairs.decoder.tolist() == [[7]] and pairs.reads.tolist() == [[0]]
    assert pairs.clean[0].tolist() == ids(splitting, CAPITALS[0].clean)


def test_continuations_of_several_tokens_are_teacher_forced(gpt2: Any) -> None:
    tokenizer = gpt2.tokenizer
    pairs = rows(*LONG).pairs(gpt2)
    texts = [(e, a, right) for e in LONG for group, right in ((e.answer, True), (e.wrong, False)) for a in group]
    assert pairs.n_rows == len(texts) == 7 and pairs.targets is not None
    assert pairs.row_right.tolist() == [right for _, _, right in texts]
    for row, (e, a, _) in enumerate(texts):
        prompt, c = ids(tokenizer, e.clean), ids(tokenizer, a)
        assert pairs.clean[row][pairs.mask[row].bool()].tolist() == prompt + c[:-1]
        assert pairs.corrupted[row][pairs.mask[row].bool()].tolist() == ids(tokenizer, e.corrupted) + c[:-1]
        assert pairs.targets[row][pairs.read_mask[row]].tolist() == c
        assert pairs.positions["END"][row] == pairs.reads[row, 0]
        inputs = pairs.clean[row, pairs.reads[row][pairs.read_mask[row]]].tolist()
        assert inputs == [prompt[-1], *c[:-1]]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_pairs_give_the_log_probabilities_of_scoring_one_at_a_time(request: pytest.FixtureRequest, kind: str) -> None:
    model = request.getfixturevalue(kind)
    tokenizer = model.tokenizer
    pairs = rows(*LONG).pairs(model)
    values = pairs.value(read(model, pairs))
    for e, value in zip(LONG, values, strict=True):
        total = {}
        for right, texts in ((True, e.answer), (False, e.wrong)):
            scores = []
            for text in texts:
                encoder = Encoder(tokenizer)
                c = torch.tensor(encoder.continuation(e.clean, text, ""))
                if kind == "gpt2":
                    whole = torch.tensor([ids(tokenizer, e.clean + text)])
                    logits = model.hf(whole).logits[0, -len(c) - 1 : -1]
                elif kind == "bert":
                    whole = torch.tensor([tokenizer(e.clean + " [MASK]" * len(c) + ".")["input_ids"]])
                    logits = model.hf(whole).logits[0][whole[0] == tokenizer.mask_token_id]
                else:
                    blank = tokenizer.convert_tokens_to_ids("<extra_id_0>")
                    decoder = torch.tensor([[0, blank, *c[:-1].tolist()]])
                    whole = torch.tensor([tokenizer(e.clean + " <extra_id_0>")["input_ids"]])
                    logits = model.hf(whole, decoder_input_ids=decoder).logits[0, 1:]
                scores.append(logits.log_softmax(-1)[torch.arange(len(c)), c].sum())
            total[right] = torch.stack(scores).logsumexp(0)
        assert value.item() == pytest.approx((total[True] - total[False]).item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("examples", [CAPITALS * 2, LONG * 2], ids=["single", "sequence"])
def test_parts_of_pairs_keep_their_values(request: pytest.FixtureRequest, kind: str, examples: Any) -> None:
    model = request.getfixturevalue(kind)
    varied = [
        Example(f"{'Today ' * i}{e.clean}", f"{'Today ' * i}{e.corrupted}", e.answer, e.wrong)
        for i, e in enumerate(examples)
    ]
    pairs = rows(*varied).pairs(model)
    whole = pairs.value(read(model, pairs))
    assert whole.std() > 1e-3
    parts = torch.cat([p.value(read(model, p)) for p in pairs.batches(3)])
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    order = [2, 0]
    taken = pairs.take(order)
    torch.testing.assert_close(taken.value(read(model, taken)), whole[order], atol=1e-4, rtol=1e-4)
    back = taken.swap().swap()
    assert torch.equal(back.clean, taken.clean)


def test_taking_part_of_a_task_with_options_keeps_them(splitting: Any) -> None:
    pairs = task("colored-objects", n=6).pairs(opened(splitting))
    assert pairs.options is not None and pairs.take([4, 1]).options == [pairs.options[4], pairs.options[1]]


def test_a_mixture_is_scored_as_continuations_throughout(splitting: Any) -> None:
    mixed = rows(CAPITALS[0], LONG[0]).pairs(opened(splitting))
    assert mixed.targets is not None and mixed.metric.unit == "nat"
    assert rows(*CAPITALS, scoring="sequence").pairs(opened(splitting)).targets is not None


@pytest.mark.parametrize(
    ("example", "kind", "changes", "message"),
    [
        (
            Example("The city of Peru is", "The city of Vincent is", (" a",), (" b",)),
            "causal",
            {},
            "p.jsonl line 1: clean has 5 tokens and corrupted",
        ),
        (Example("a  b", "a  b", (" a",), (" b",)), "causal", {}, "have the same tokens"),
        (
            Example("The city of Peru is ", "The city of Cuba is ", ("Lima",), ("Rome",)),
            "causal",
            {},
            "move the space: end the prompt at 'y of Peru is' and write the answer ' Lima'",
        ),
        (Example("to the gard", "to the gold", ("en",), ("ket",)), "causal", {}, "write the answer ' en' if a space"),
        (LONG[0], "causal", {"scoring": "single"}, "the answer ' New York' is 2 tokens, ['ĠNew', 'ĠYork']"),
        (
            Example("the book is", "the ball is", (" red",), ()),
            "causal",
            {},
            "no wrong answer, which 'logit-diff' needs",
        ),
        (CAPITALS[0], "encoder", {}, "open it with its language-model head"),
        (CAPITALS[0], "masked", {}, "set tokenizer.mask_token"),
    ],
)
def test_examples_that_cannot_be_encoded_say_what_to_do(
    splitting: Any, example: Example, kind: str, changes: dict[str, Any], message: str
) -> None:
    if message.endswith("2 tokens, ['ĠNew', 'ĠYork']"):
        pieces = splitting.tokenize(" New York")
        message = f"the answer ' New York' is {len(pieces)} tokens, {pieces}"
    with pytest.raises(TaskError) as caught:
        rows(example, **changes).pairs(opened(splitting, kind))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_right_and_wrong_that_are_the_same_token_are_refused(wordpiece: Any) -> None:
    e = Example("The book is", "The ball is", (" red",), (" Red",))  # the same, lower-cased
    with pytest.raises(TaskError, match="' Red' is both a right and a wrong answer"):
        rows(e).pairs(opened(wordpiece, "masked"))


def test_a_prompt_with_its_own_mask_is_refused(wordpiece: Any) -> None:
    e = Example("The [MASK] is", "The [MASK] of", (" red",), (" blue",))
    with pytest.raises(TaskError, match="write it up to the blank only"):
        rows(e).pairs(opened(wordpiece, "masked"))


def test_a_prompt_longer_than_the_model_reads_is_refused(gpt2: Any) -> None:
    e = Example("the " * 200 + "book is", "the " * 200 + "ball is", (" red",), (" blue",))
    with pytest.raises(TaskError, match="this model reads at most 128"):
        rows(e).pairs(gpt2)


def test_skipping_what_does_not_align_counts_it(splitting: Any) -> None:
    bad = Example("The city of Peru is", "The city of Vincent is", (" a",), (" b",))
    t = rows(CAPITALS[0], bad, CAPITALS[1], on_misaligned="skip")
    assert t.examples(splitting) == list(CAPITALS)
    assert t.describe()["skipped"] == {"misaligned": 1} and "line 2" in t.describe()["first_skipped"]


def test_log_prob_needs_no_wrong_answer(gpt2: Any) -> None:
    e = Example("the book is", "the ball is", (" red",), ())
    pairs = rows(e, metric="log-prob").pairs(gpt2)
    logits = gpt2.hf(torch.tensor([ids(gpt2.tokenizer, e.clean)])).logits[0, -1].log_softmax(-1)
    assert pairs.value(read(gpt2, pairs)).item() == pytest.approx(logits[pairs.answers[0][0]].item(), abs=1e-5)
