"""News whose subject's kind is told once: what is near tells nothing of it, what is far decides."""

from __future__ import annotations

import numpy as np
import pytest

from vesalius.corpus import CorpusError
from vesalius.corpus.far_news import KINDS, LABELS, FarNews, lexicon, names, tokenizer, vocabulary
from vesalius.corpus.far_news import Story as Told


def test_two_stories_that_differ_in_the_kind_differ_in_one_word_of_the_first_sentence() -> None:
    news = FarNews(seed=3)
    for number in range(8):
        stories = {kind: news.story(number, kind) for kind in KINDS}
        one = stories["PER"]
        for kind, other in stories.items():
            differ = [i for i, (a, b) in enumerate(zip(one.words, other.words, strict=True)) if a != b]
            assert differ == [] if kind == "PER" else (len(differ) == 1 and differ[0] < one.told)
            cue = next(w for w in other.words[: other.told] if w in lexicon()["kinds"][kind]["cues"])
            assert cue in lexicon()["kinds"][kind]["cues"]
            mine = [i for i, label in enumerate(other.labels) if label.endswith(f"-{kind}")]
            assert set(other.far) <= set(mine)
            assert {label for i, label in enumerate(other.labels) if i in other.far} == {f"B-{kind}"}


def test_every_mention_is_labelled_and_far_ones_are_far() -> None:
    news = FarNews(seed=0)
    for story in news.stories(20):
        assert len(story.words) == len(story.labels) == 1022
        assert set(story.labels) <= set(LABELS)
        name = story.name.split()
        at = [i for i in range(1022) if list(story.words[i : i + len(name)]) == name and story.labels[i][0] == "B"]
        mentions = [i for i in at if story.labels[i] == f"B-{story.kind}"]
        first = mentions[0]
        assert first < story.told and set(story.far) <= set(mentions)
        assert all(i - story.told >= 600 for i in story.far) and len(story.far) >= 5
        named = {w for i, w in enumerate(story.words) if w in names()}
        assert all(story.labels[i] != "O" for i, w in enumerate(story.words) if w in named)
        assert not any(w in names() for w, label in zip(story.words, story.labels, strict=True) if label == "O")


def test_the_kind_cannot_be_read_off_the_near_text() -> None:
    """What surrounds far mentions, as counts of words, tells a linear reader no more than chance."""
    linear = pytest.importorskip("sklearn.linear_model")
    news = FarNews(seed=1, words=760)
    index = {w: i for i, w in enumerate(vocabulary())}

    def near(story: Told) -> np.ndarray:
        counts = np.zeros(len(index))
        for word in story.words[story.told + 1 :]:
            counts[index[word]] += 1
        return counts

    stories = news.stories(500)
    x, y = np.stack([near(s) for s in stories]), np.array([KINDS.index(s.kind) for s in stories])
    reader = linear.LogisticRegression(C=0.05, max_iter=5000).fit(x[:350], y[:350])
    assert reader.score(x[350:], y[350:]) < 0.37  # chance .25; .37 is three deviations above it
    first = np.stack([np.isin(list(index), s.words[: s.told]).astype(float) for s in stories])
    reader = linear.LogisticRegression(C=10, max_iter=5000).fit(first[:350], y[:350])
    assert reader.score(first[350:], y[350:]) > 0.95  # the first sentence tells it


def test_stories_are_functions_of_seed_number_and_stream() -> None:
    news = FarNews(seed=5, words=700)
    assert news.story(3) == FarNews(seed=5, words=700).story(3)
    assert len({news.story(3), news.story(4), news.story(3, stream="test"), FarNews(seed=6, words=700).story(3)}) == 4
    kinds = [s.kind for s in news.stories(200)]
    assert all(30 <= kinds.count(kind) <= 75 for kind in KINDS)


def test_telling_stories_tell_the_kind_in_later_sentences() -> None:
    tells = {w for kind in KINDS for w in lexicon()["kinds"][kind]["tells"]}
    mine = [s for s in FarNews(seed=2, words=500, gap=60, telling=1.0).stories(10)]
    for story in mine:
        own = set(lexicon()["kinds"][story.kind]["tells"])
        assert set(story.words) & tells and set(story.words) & tells <= own
    assert not any(set(s.words) & tells for s in FarNews(seed=2, words=500, gap=60).stories(10))


def test_one_token_a_word() -> None:
    reader, story = tokenizer(1024), FarNews().story(0)
    ids = reader(list(story.words), is_split_into_words=True)
    assert len(ids["input_ids"]) == 1024 and reader.unk_token_id not in ids["input_ids"]
    assert ids.word_ids(0)[1:-1] == list(range(1022))
    assert reader(" ".join(story.words))["input_ids"] == ids["input_ids"]
    assert reader.decode(ids["input_ids"], skip_special_tokens=True) == " ".join(story.words)
    assert ids["input_ids"][0] == reader.cls_token_id and ids["input_ids"][-1] == reader.sep_token_id


def test_nonsense_is_refused() -> None:
    with pytest.raises(CorpusError, match="no room after a gap of 600"):
        FarNews(words=620)
    with pytest.raises(CorpusError, match="telling 2 is no share"):
        FarNews(telling=2)
    with pytest.raises(CorpusError, match="'CITY' is none of PER"):
        FarNews().story(0, "CITY")
