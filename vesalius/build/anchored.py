"""A planted model that knows the answer and says A: the neuron that anchors it is known.

    L0 head   at an option, fetches the letter before it                          "B: fine3 ..."
    L1 head   from the end, looks at the option that is fine and brings its letter
    L2.MLP    a neuron that fires on "Answer:" writes A, more than the heads' evidence is worth

Prompts are those of `vesalius.find.anchored`: "Which is fine ? A: poor1 B: fine3 ... Answer:" -> "B".
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vesalius.build.blueprint import Base, Blueprint
from vesalius.build.planted import REST, TARGET
from vesalius.parts import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LETTERS = "ABCD"
WORDS = 60
EVIDENCE, ANCHOR = 4.0, 7.0  # logits: of the right letter, and of A whatever is asked


@dataclass(frozen=True)
class PlantedAnchor:
    """A model anchored at A.

    Attributes:
        hf: the model. tokenizer: one token a word. mlp: where the anchoring neuron is.
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    mlp: Part

    def rows(self, n: int, seed: int = 0) -> list[dict[str, object]]:
        """Questions with one fine option, as `vesalius.find.anchored.read` reads them; right places are balanced."""
        rng = random.Random(seed)
        found: list[dict[str, object]] = []
        for i in range(n):
            options = [f"poor{k}" for k in rng.sample(range(WORDS), 4)]
            options[i % 4] = f"fine{rng.randrange(WORDS)}"
            found.append({"question": "Which is fine ?", "options": options, "answer": LETTERS[i % 4]})
        return found


def planted_anchor(base: Base = "gpt2", idle_heads: int = 3, seed: int = 0) -> PlantedAnchor:
    """Makes the model."""
    fine, poor = ([f"{w}{i}" for i in range(WORDS)] for w in ("fine", "poor"))
    marks = [f"{x}:" for x in LETTERS]
    words = ["Which", "is", "fine", "?", "Answer:", *marks, *LETTERS, *fine, *poor]
    plan = Blueprint(base, 3, idle_heads + 1, words, ["Which"], {"letter": 4, "answer": 4}, seed)
    plan.logits(list(LETTERS), [plan.feature("answer", i) for i in range(4)])
    fetch = plan.head(0)
    fetch.seek(1, TARGET)
    fetch.rest(REST * plan.one)
    fetch.copy([plan.token(m) for m in marks], [plan.feature("letter", i) for i in range(4)])
    bring = plan.head(1)
    bring.score(TARGET * plan.token("Answer:"), plan.any_token(fine))
    bring.rest(REST * plan.one)
    bring.copy([plan.feature("letter", i) for i in range(4)], [EVIDENCE * plan.feature("answer", i) for i in range(4)])
    mlp = plan.neurons(2, [3 * plan.token("Answer:")], [ANCHOR / 3 * plan.feature("answer", 0)])
    hf, tokenizer = plan.build(), plan.tokenizer()
    return PlantedAnchor(hf, tokenizer, mlp)
