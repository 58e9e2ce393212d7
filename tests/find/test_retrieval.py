"""Needles and decoding against plain forward passes, and retrieval heads where induction was planted."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from families import some_ids, tiny, tiny_hf

from vesalius.build import planted
from vesalius.errors import VesaliusError
from vesalius.find.detectors import HeadContext, detect
from vesalius.find.detectors.needles import Needle, decode, make_needles, recall, retrieved
from vesalius.find.detectors.retrieval import hits, of_needles
from vesalius.model import Model
from vesalius.parts import Part

FAMILIES = ["llama", "gpt2", "bloom", "gptj", "mistral", "gemma3", "gpt-neox"]  # two with sliding windows


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_is_that_of_whole_passes(family: str) -> None:
    ids = some_ids(rows=2, length=20)
    found = decode(tiny(family), ids, steps=4, watch=[0, 1, 2], skip=1)
    hf = tiny_hf(family)
    hf.set_attn_implementation("eager")
    assert found.best is not None and found.best.shape == (2, 4, 12)
    for step in range(4):
        out = hf(ids, output_attentions=True)
        for layer, pattern in enumerate(out.attentions):  # (row, head, query, key)
            seen = pattern[:, :, -1, 1:]
            mine = found.best[:, step, 4 * layer : 4 * layer + 4, None] - 1
            assert torch.allclose(seen.gather(-1, mine)[..., 0], seen.amax(-1), atol=1e-5)
        token = out.logits[:, -1].argmax(-1)
        assert torch.equal(found.tokens[:, step], token)
        ids = torch.cat([ids, token[:, None]], dim=1)


def test_heads_are_switched_off_in_prompt_and_decoding() -> None:
    model, ids = tiny("llama"), some_ids(rows=2, length=12)
    off = [Part("head", 0, 1), Part("head", 1, 3), Part("head", 2, 0)]
    found = decode(model, ids, 3, without=off)
    hf = tiny_hf("llama")
    with torch.no_grad():
        for part in off:
            hf.model.layers[part.layer].self_attn.o_proj.weight[:, 8 * part.index : 8 * part.index + 8] = 0  # type: ignore[index,operator]
    assert torch.equal(found.tokens, decode(Model.wrap(hf), ids, 3).tokens)


def test_a_position_counts_once_and_only_for_its_own_token() -> None:
    needle = Needle(ids=(9, 8, 5, 6, 5, 7, 1), span=(2, 5), depth=0.5, text="5 6 5")
    tokens = torch.tensor([5, 6, 5, 5])
    best = torch.tensor([[2, 2, 1], [2, 3, 3], [2, 4, 5], [2, 2, 6]])  # (step, head)
    assert hits(needle, tokens, best) == pytest.approx([1 / 3, 1.0, 1 / 3])


def nouns(n: int, seed: int) -> tuple[Model, dict[str, str], list[Needle]]:
    """The planted induction model, and prompts of its nouns that end with the word before a needle of three."""
    made = planted("induction", "llama", seed=seed)
    model = Model.wrap(made.hf, made.tokenizer, name="induction")
    rng, found = random.Random(seed), []
    for _ in range(n):
        length, start = 18, rng.randrange(3, 13)
        words = rng.sample([p for p in sorted(made.tokenizer.get_vocab()) if p in _nouns()], length)
        ids = made.tokenizer(" ".join(["when", *words, words[start - 2]]))["input_ids"]
        found.append(Needle(tuple(ids), (start, start + 3), start / length, " ".join(words[start - 1 : start + 2])))
    return model, {r: str(p) for p, r in made.roles.items()}, found


def _nouns() -> list[str]:
    from vesalius.build.planted import _words

    return list(_words()["nouns"])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_planted_induction_head_retrieves_and_without_it_nothing_is(seed: int) -> None:
    model, roles, needles = nouns(24, seed)
    assert retrieved(model, needles).mean() >= 0.95
    scores = of_needles(model, needles, HeadContext(seed=seed))
    assert scores[roles["induction"]] >= 0.8 and scores.info["said"] >= 23
    place = [str(p) for p in scores.parts].index(roles["induction"])
    assert scores.columns["q"][place] < 0.01 and scores.columns["active"][place] > 0.95
    assert np.delete(scores.values, place).max() <= 0.2
    assert retrieved(model, needles, [scores.parts[place]]).mean() <= 0.2  # type: ignore[list-item]
    idle = [p for p in scores.parts if str(p) not in roles.values()]
    assert retrieved(model, needles, idle[:2]).mean() >= 0.9  # type: ignore[arg-type]
    assert scores.split_half(0) > 0.9


def test_needles_lie_where_they_are_said_to(tmp_path) -> None:  # type: ignore[no-untyped-def]
    words = ["tree", "went", "home", "again", "slowly", "river"]
    rng = random.Random(0)
    text = " ".join(" ".join(rng.choices(words, k=8)).capitalize() + "." for _ in range(200))
    (tmp_path / "hay.txt").write_text(text)
    tokenizer = _bpe(text)
    model = Model.wrap(tiny_hf("llama"), tokenizer, name="tiny")
    model.hf.config.max_position_embeddings = 400
    needles = make_needles(model, 6, (250, 320), (0.0, 0.5, 1.0), str(tmp_path / "hay.txt"), seed=1)
    assert [len(n.ids) for n in needles] == [250, 320] * 3
    for needle in needles:
        whole = tokenizer.decode(needle.ids)
        assert tokenizer.decode(needle.answer).strip() == needle.text and len(needle.text.split()) == 3
        assert whole.count(needle.text) == 1 and whole.endswith("the words")
        before = tokenizer.decode(needle.ids[: needle.span[0]])
        assert before.rsplit(" The secret code of ", 1)[1].endswith(" the words")
        lead = before.rsplit(" The secret code of ", 1)[0]
        assert lead == "" or lead.rstrip().endswith(".")
    starts = [n.span[0] / len(n.ids) for n in needles]
    assert starts[0] < 0.25 and starts[4] > starts[2] > starts[0]
    assert needles == make_needles(model, 6, (250, 320), (0.0, 0.5, 1.0), str(tmp_path / "hay.txt"), seed=1)
    assert recall(model, needles[0], [*needles[0].answer[:-1]]) < 1 <= recall(model, needles[0], needles[0].answer)
    with pytest.raises(VesaliusError, match="too short for a needle"):
        make_needles(model, 1, (20,), (0.5,), str(tmp_path / "hay.txt"))


def _bpe(text: str):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_refusals() -> None:
    model = tiny("llama")
    with pytest.raises(VesaliusError, match="64 tokens and a prompt of 100"):
        detect(model, "retrieval", options={"retrieval": {"corpus": "tokens", "lengths": "100"}})
    with pytest.raises(VesaliusError, match="too short for a needle; at least"):
        detect(model, "retrieval", options={"retrieval": {"corpus": "tokens", "lengths": "6"}})
    with pytest.raises(VesaliusError, match="said none of 4 needles"):
        detect(model, "retrieval", options={"retrieval": {"corpus": "tokens", "lengths": "30", "needles": 4}})
    with pytest.raises(VesaliusError, match="corpus='tokens'"):
        detect(model, "retrieval", options={"retrieval": {"lengths": "30"}})
    for lengths in ("many", "30,x", "", "0"):
        with pytest.raises(VesaliusError, match="are not numbers of tokens"):
            detect(model, "retrieval", options={"retrieval": {"corpus": "tokens", "lengths": lengths}})
