"""Rules that cannot be broken: filters, the rule language, word mode's look-ahead, token mode."""

from __future__ import annotations

import json
import re
import socket

import pytest
import torch
from families import tiny_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vesalius.apply.writing import FILTERS, TRANSFORMS, drawing, known_rules, parse, writer, written
from vesalius.apply.writing.language import KNOWN, LineRule
from vesalius.apply.writing.lexicon import Kind, Lines, Trie
from vesalius.apply.writing.pieces import pieces
from vesalius.apply.writing.sounds import dictionary, guessed_syllables, rhymes, syllables
from vesalius.apply.writing.studio import application, free, offer
from vesalius.apply.writing.transforms import transformed
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.decode import Reader

TEXT = """The old sailor looked at the sea and began to sing about the water, the window and the garden. Every morning
the children ran over the meadow; they were happy, and nobody told them to go home. "It isn't far," said the writer,
"but a table and seven chairs are waiting." Café tables, élan and the river's bend: under a yellow moon the dancers
turned and turned again, singing, asking, never stopping. Numbers such as 12 and 7 stand here too."""


@pytest.fixture(scope="module")
def model() -> Model:
    """A random Llama with a byte-level tokenizer: letters, pieces, words, and half characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<end>", "<other>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", additional_special_tokens=["<other>"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=0, **sizes))
    with torch.no_grad():
        hf.lm_head.weight.mul_(20)
    return Model.wrap(hf.eval(), tokenizer, name="tiny")


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)*", transformed(["lower", "unaccent"])(text))


# -- filters


CASES = {
    "any-banned": (("no letter e", "stop", "here"), ("no string th, ing", "tin", "thin")),
    "all-banned": (("not all of a, b", "cat", "cab"),),
    "all-required": (("all of a, n", "nap", "map"),),
    "any-required": (("any of a, o", "pot", "pit"),),
    "string-at": (("letter 2 is a", "cat", "act"),),
    "starts-with": (("starts with un", "undo", "sun"),),
    "ends-with": (("ends with ing", "sing", "ingot"),),
    "edit-distance": (("within 2 edits of house", "mouse", "garden"),),
    "length": (("4 letters", "four", "five5"),),
    "longer": (("more than 3 letters", "four", "one"),),
    "shorter": (("fewer than 6 letters", "seven", "twelve"),),
    "sounds-like": (("sounds like night", "knight", "day"),),
    "syllables": (("2 syllables a word", "water", "fire"),),  # fire has one or two
    "meter": (("stress 10 a word", "water", "again"),),
    "rhyme": (("rhymes with day", "weigh", "dog"),),
    "palindrome": (("palindromes", "level", "lever"),),
    "anagram": (("anagrams of listen", "silent", "listens"),),
    "partial-anagram": (("letters of notebook", "book", "books"),),
    "isogram": (("isograms", "stop", "book"),),
    "reverse-isogram": (("no isograms", "book", "stop"),),
}


def test_every_filter_accepts_and_refuses_with_a_reason_and_every_rule_is_read():
    vectors = {"ocean": torch.tensor([1.0, 0]).numpy(), "sea": torch.tensor([0.9, 0.1]).numpy()}
    for cases in CASES.values():
        for sentence, good, bad in cases:
            (_, made) = parse([sentence]).words[0]
            assert made.why(good) is None and made.why(bad), (sentence, made.why(good), made.why(bad))
    near = parse(["similar to ocean by 0.5"], vectors.get).words[0][1]
    assert near.why("sea") is None and "no vector" in near.why("dog")
    assert len(FILTERS.names()) == 21 and set(CASES) | {"similar"} == set(FILTERS.names())
    assert len(TRANSFORMS.names()) == 12
    for form in KNOWN:
        assert len(parse([form.example], vectors.get).names) == 1
    assert len(known_rules()) == len(KNOWN)


@pytest.mark.parametrize("sentence", [c[0][0] for c in CASES.values()])
def test_closed_filters_read_letter_by_letter_as_they_read_words(sentence):
    made = parse([sentence]).words[0][1]
    if not made.closed:
        return
    for word in list(dictionary())[::977]:
        state = made.first()
        for i, letter in enumerate(word):
            state = made.step(state, letter)
            assert (state is None) == (made.why(word[: i + 1]) is not None), (word, i)
            if state is None:
                break


def test_what_is_no_rule_is_refused_with_the_nearest():
    with pytest.raises(VesaliusError, match="did you mean something like '8 syllables'"):
        parse(["8 sylables"])
    with pytest.raises(VesaliusError, match="more than single letters; write 'no string ing'"):
        parse(["no letter ing"])
    with pytest.raises(VesaliusError, match="two rules give a line's syllables"):
        parse(["8 syllables", "6 syllables"])
    with pytest.raises(VesaliusError, match="'xqzzy' is not in the pronouncing dictionary"):
        parse(["line rhymes with xqzzy"])
    with pytest.raises(VesaliusError, match="leaves no word"):
        parse(["0 letters"])


def test_sounds():
    assert syllables("water") == (2,) and syllables("fire") == (1, 2)
    assert rhymes("day") & rhymes("weigh") and not rhymes("day") & rhymes("dog")
    known = [w for w in dictionary() if len(syllables(w)) == 1 and "'" not in w][::199]
    right = sum(guessed_syllables(w) == syllables(w)[0] for w in known)
    assert right / len(known) > 0.75  # the fallback, on words whose count is known


# -- lines


def test_a_line_takes_a_word_only_if_a_finished_line_can_follow():
    kinds = [Kind(2), Kind(3)]
    lines = Lines([LineRule("syllables", 7)], kinds)
    assert lines.allowed[(0, 0, False)] == 0b11 and lines.allowed[(5, 0, False)] == 0b01
    assert (6, 0, False) not in {s for s, bits in lines.allowed.items() if bits}
    assert lines.move((3, 0, False), 1) is None  # six would leave one, and no word has one
    with pytest.raises(VesaliusError, match="no line of the words that are left keeps"):
        Lines([LineRule("syllables", 1)], kinds)
    trie = Trie([("ab", Kind(2)), ("abc", Kind(3)), ("b", Kind(3))])
    assert trie.count == 3 and trie.below[trie.children[0]["a"]] == 0b11 and trie.below[trie.children[0]["b"]] == 0b10


# -- word mode


SETS = [
    ["no letter e"],
    ["no letters e, o", "fewer than 7 letters"],
    ["isograms", "more than 2 letters"],
    ["any of a, o", "not all of a, t", "ends with n"],
    ["2 syllables a word", "no letter s"],
    ["letters of watermelons", "stress 10 a word"],
]


@pytest.mark.parametrize("rules", SETS, ids=lambda r: "+".join(r))
def test_composed_rules_are_never_broken_and_never_end_dead(model, rules):
    made = writer(model, rules)
    texts = written(made, ["The old sailor", "Every"] * 3, 40, drawing(1.0, 0, 1.0, 1), tries=0)
    filters = [f for _, f in made.rules.words]
    count = 0
    for text in texts:
        assert text.line.stop != "dead end"
        for word in words_of(text.text):
            count += 1
            assert not any(f.why(word) for f in filters), (word, text.text)
    assert count > 20


def test_every_word_has_two_syllables_in_word_mode_and_not_in_token_mode(model):
    wrong = {}
    for mode in ("word", "token"):
        made = writer(model, ["2 syllables a word"], mode=mode)
        texts = written(made, ["The old sailor"] * 16, 40, drawing(1.0, 0, 1.0, 2))
        words = [w for t in texts for w in words_of(t.text) if not w.isdigit()]
        wrong[mode] = sum(syllables(w) != (2,) for w in words)
        split = [t for t in texts if len(t.line.tokens) > 2 * len(words_of(t.text))]
        assert len(words) > 20 and (mode == "token" or split)  # words of several tokens are among them
    assert wrong["word"] == 0 and wrong["token"] > 0


@pytest.mark.parametrize(
    "rules", [["8 syllables"], ["5 words", "no letter e"], ["iambic tetrameter", "line rhymes with day"]]
)
def test_lines_come_out_whole(model, rules):
    made = writer(model, rules, lines=2)
    texts = written(made, ["The old sailor"] * 3, 150, drawing(1.0, 0, 1.0, 3), tries=0)
    whole = [t for t in texts if t.line.stop == "whole"]
    assert len(whole) >= 2
    for text in whole:
        lines = [words_of(line) for line in text.text.strip("\n").split("\n")]
        assert len(lines) == 2
        for line in lines:
            if "5 words" in rules:
                assert len(line) == 5 and not any("e" in w for w in line)
            else:
                assert sum(syllables(w)[0] for w in line) == 8
            if len(rules) == 2 and "5 words" not in rules:
                assert rhymes(line[-1]) & rhymes("day")


def test_the_mask_is_what_a_slow_search_over_all_tokens_finds_and_every_ban_has_a_reason(model):
    for rules in (["no letter e"], ["2 syllables a word"], ["6 syllables", "no letter o"]):
        made = writer(model, rules)
        stack, row = made.stack, made.encode("The old sailor")
        stack.begin([list(row)])
        for token in written(made, ["The old sailor"], 10, drawing(1.0, 0, 1.0, 4))[0].line.tokens:
            state = stack.states(row)[0][0]
            spelling = made.rule.spelling
            for t, text in enumerate(made.vocabulary.texts):
                barred = bool(made.rule.barred(stack.states(row)[0])[t])
                if text is not None:
                    assert barred == (spelling.read(state, text) is None), (text, row)
            table = stack.explain(row)
            assert len(table) == int(made.rule.barred(stack.states(row)[0]).sum())
            assert table["reason"].str.len().min() > 3 and not (table["reason"] == "barred").any()
            row = [*row, token]


def test_inside_the_mask_the_model_is_renormalised_and_half_characters_are_barred(model):
    made = writer(model, ["no letter e"])
    stack, row = made.stack, made.encode("The old sailor")
    stack.begin([row])
    reader = Reader(model)
    logits = reader.read(torch.tensor([row]))
    scores = stack.apply([row], reader.ids, logits)
    kept = torch.isfinite(scores)
    base = logits.softmax(-1) * kept
    assert torch.allclose(scores.softmax(-1), base / base.sum(), atol=1e-6)
    half = made.vocabulary.texts.index(None, 2)
    assert stack.why(row, half)[0].reason == "not valid text on its own"
    assert stack.why(row, 1)[0].reason == "a special token" and not stack.why(row, 0)
    accented = model.tokenizer(" é", add_special_tokens=False)["input_ids"]
    if len(accented) == 1:
        assert stack.why(row, accented[0])


def test_an_accent_is_its_letter_unless_told(model):
    vocabulary = pieces(model)
    strict, loose = (writer(model, ["no letter e"], accents=a).rule.spelling for a in (False, True))
    start = strict.start("")
    assert strict.read(start, "élan") is None and strict.read(start, "e\u0301") is None
    assert loose.read(loose.start(""), "élan") is not None
    assert vocabulary.texts[0] is None and vocabulary.ends == (0,)


def test_a_prompt_that_ends_in_a_word_is_not_judged_and_its_word_is_ended_first(model):
    made = writer(model, ["no letter e"])
    spelling = made.rule.spelling
    state = spelling.start("The sea")
    assert spelling.read(state, "son") is None and spelling.read(state, " son") is not None
    assert "last word of what was given" in spelling.why(state, "son", "")


def test_what_leaves_nothing_or_cannot_be_is_refused(model):
    with pytest.raises(VesaliusError, match="no word of the lexicon keeps"):
        writer(model, ["30 letters", "palindromes"])
    with pytest.raises(VesaliusError, match="is about lines, and token mode judges one token"):
        writer(model, ["8 syllables"], mode="token")
    with pytest.raises(VesaliusError, match="opened without a tokenizer"):
        writer(Model.wrap(tiny_hf("llama")), ["no letter e"])


def test_a_lexicon_of_ones_own(model):
    made = writer(model, [], words=["water", "garden", "moon"])
    texts = written(made, ["The"] * 2, 20, drawing(1.0, 0, 1.0, 0), tries=0)
    assert {w for t in texts for w in words_of(t.text)} <= {"water", "garden", "moon"}


# -- the studio


def test_the_studio_offers_whole_words_tells_bars_and_where_typing_breaks_a_rule(model):
    made = writer(model, ["2 syllables a word", "no letter s"])
    found = offer(made, "The old", " water", 8)
    assert found.choices and found.broken is None and 0 < found.share < 1
    for choice in found.choices:
        for word in words_of(choice.text):
            assert syllables(word) == (2,) and "s" not in word
    assert found.barred and all(b.reason for b in found.barred)
    assert found.choices[0].share >= found.choices[-1].share
    broken = offer(made, "The old", " water is", 8).broken
    assert broken is not None and "1 syllable" in broken[1]
    lines = writer(model, ["2 syllables"])
    assert offer(lines, "The old", " water.").ended


def test_the_page_needs_nothing_from_outside_and_its_answers_are_json(model):
    pytest.importorskip("fastapi")
    app = application(writer(model, ["no letter e"]), "The old", ["no letter e"])
    routes = {r.path: r.endpoint for r in app.routes if hasattr(r, "endpoint")}
    page = routes["/"]()
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", page)
    assert routes["/start"]()["rules"] == ["no letter e"]
    answer = routes["/next"]({"rules": ["no letter a"], "text": " big", "prompt": "The old"})
    assert answer["choices"] and all("a" not in c["text"].lower() for c in answer["choices"])
    refused = routes["/next"]({"rules": ["no such thing"]})
    assert refused.status_code == 400 and b"is no rule" in refused.body


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"rules": "no letter e"}, "rules are a list"),
        ({"rules": None}, "rules are a list"),
        ({"rules": [1]}, "rules are a list"),
        ({"text": ["a"]}, "mode, prompt and text are texts"),
        ({"mode": "letters"}, "neither 'word' nor 'token'"),
        ({"text": "the " * 300}, "tiny reads 256: go on in a new text"),
        ({"text": "sea " * 40_000}, "100,000 letters"),
        ({"text": "a\ud800"}, "half a character"),
        ({"prompt": "a\ud800"}, "half a character"),
    ],
)
def test_nonsense_that_a_page_sends_is_told_in_a_line(model, sent, said):
    pytest.importorskip("fastapi")
    app = application(writer(model, []), "The old", [])
    following = {r.path: r.endpoint for r in app.routes if hasattr(r, "endpoint")}["/next"]
    answer = following({"rules": [], "prompt": "The old", "text": "", **sent})
    assert answer.status_code == 400 and said in json.loads(answer.body)["error"]
    assert following({"rules": [], "prompt": "", "text": ""})["choices"]


def test_rules_changed_on_the_page_keep_the_options_of_the_command(model):
    pytest.importorskip("fastapi")

    def make(rules, mode):
        made.append(tuple(rules))
        return writer(model, rules, mode=mode, words=["water", "garden", "moon"])

    made = []
    first = make(["no letter z"], "word")
    following = {r.path: r.endpoint for r in application(first, "", ["no letter z"], make).routes}["/next"]
    for letter in "qxqxjkvbcqyzx":  # eight sets of rules are kept ready, and that with z is the ninth
        answer = following({"rules": [f"no letter {letter}"], "prompt": "The old", "text": ""})
        told = {w for c in answer["choices"] for w in words_of(c["text"])}
        assert told and told <= {"water", "garden", "moon"}
    assert [rules[0][-1] for rules in made] == list("zqxjkvbcyx")


def test_a_port_that_is_taken_is_refused_at_once():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(VesaliusError, match=f"port {port} cannot be used .*--port"):
            free(port)
    free(port)
