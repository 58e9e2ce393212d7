"""What the papers report, on real models: MiniLM's moral axis and associations, SmolLM2's by layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import vesalius
from vesalius.errors import DownloadError
from vesalius.features import direction
from vesalius.features.bias import audit, pronoun_preference
from vesalius.model import Model

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def minilm() -> Iterator[Model]:
    try:
        model = vesalius.open("minilm")
    except DownloadError as error:
        pytest.skip(f"the encoder cannot be fetched here: {error}")
    yield model


def test_the_first_component_of_dos_and_donts_is_the_moral_axis(minilm: Model) -> None:
    """Schramowski et al. 2022: PC1 separates them, and tells contexts of one verb apart."""
    axis = direction(minilm, "moral", "pca", permutations=19, draws=0)
    q = axis.quality
    assert q["sign_accuracy"] >= 0.85 and q["p"] == 0.05
    assert q["component_correlations"][0] > 0.8 > 0.4 > max(q["component_correlations"][1:])
    assert q["pairs_right"] >= 14
    # The rank correlation with rated deeds misses the .5 that was hoped for; see docs/results/look-inside.md.
    assert q["graded_p"] < 0.01
    told = axis.score(minilm, ["help a friend", "kill people", "kill time"])
    assert told[0] > told[2] > told[1]


def test_flowers_are_pleasant_in_words_and_sentences(minilm: Model) -> None:
    """Caliskan et al. 2017, test 1."""
    for form in ("words", "sentences"):
        found = audit(minilm, ["1"], form=form).iloc[0]  # type: ignore[arg-type]
        assert found["d"] >= 1 and found["p"] < 0.001, form


def test_smollm2_associates_in_its_layers_and_not_in_its_table(smollm2: Model) -> None:
    table = audit(smollm2, ["1", "6"], reading="table").set_index("test")
    assert (table["p"] > 0.05).all()
    layer = audit(smollm2, ["6"], reading="mean@13", form="sentences").iloc[0]
    assert layer["d"] > 1 and layer["p"] < 0.01


def test_smollm2_expects_she_of_nurses_and_he_of_soldiers(smollm2: Model) -> None:
    found = pronoun_preference(smollm2, ["nurse", "secretary", "soldier", "carpenter"])
    preference = found.set_index("occupation")["preference"]
    assert min(preference["nurse"], preference["secretary"]) > 0.5
    assert max(preference["soldier"], preference["carpenter"]) < -0.5
