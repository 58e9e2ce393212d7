"""A planted model of factual recall: who brings the topic, who writes the answer and what holds it back are known.

Four layers, two relations, 24 lands:

    L0 head   brings the topic to the end                "the capital of land3 is": land3
    L1 head   brings the relation's word to the end       capital
    L1.MLP    turns it into the relation's own vector, whatever the topic: a function vector
    L2.MLP    a neuron for each pair of topic and relation writes the answer                            city3
    L3.MLP    takes `damping` of the answer away: a last layer against over-confidence

Of two lands something is missing: the MLP knows no answer for `forgotten`, and the L0 head does not see `unseen`.
Without the relation's word ("We talked about land3") nothing is answered, and adding what L1.MLP writes brings it.

After the account of Lv et al., arXiv 2403.19521.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vesalius.build.blueprint import Base, Blueprint
from vesalius.build.planted import REST, TARGET
from vesalius.parts import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LANDS = 24
LOGIT = 6.0  # of a word whose answer feature is 1
NAMED = 1.5  # of a topic whose feature was brought to the end
RELATIONS = ("capital", "language")
FRAME = ("of", "is", "talked", "about", "land", *RELATIONS)


@dataclass(frozen=True)
class PlantedRecall:
    """A model whose recall is known.

    Attributes:
        hf: the model. tokenizer: one token a word.
        topic_head, relation_head: what moves topic and relation. task_mlp: writes the relation's vector.
        answer_mlp: writes the answer. damper: takes part of it away.
        answers: by relation and topic. forgotten, unseen: topics that fail at the answer, and at the topic.
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    topic_head: Part
    relation_head: Part
    task_mlp: Part
    answer_mlp: Part
    damper: Part
    answers: dict[str, dict[str, str]]
    forgotten: str
    unseen: str

    def facts(self, relation: str = "capital") -> Any:
        """One relation as `vesalius.tasks.facts` has them."""
        from vesalius.tasks.facts import Relation

        return Relation(relation, self.answers[relation], (f"the {relation} of {{topic}} is",))


def planted_recall(base: Base = "gpt2", damping: float = 0.4, idle_heads: int = 3, seed: int = 0) -> PlantedRecall:
    """Makes the model.

    Args:
        base: `gpt2` or `llama`. damping: share of the answer that the last MLP takes away; 0 for none.
        idle_heads: other heads in each layer. seed: of all that is random.

    Example:
        >>> planted_recall().answers["capital"]["land3"]
        'city3'
    """
    lands = [f"land{i}" for i in range(LANDS)]
    words = {r: [f"{w}{i}" for i in range(LANDS)] for r, w in zip(RELATIONS, ("city", "tongue"), strict=True)}
    every = [w for r in RELATIONS for w in words[r]]
    forgotten, unseen = lands[-2], lands[-1]
    spaces = {"moved": LANDS, "asked": len(RELATIONS), "task": len(RELATIONS), "answer": len(every)}
    openings = ["the", "We"]
    plan = Blueprint(base, 4, idle_heads + 1, [*openings, *FRAME, *lands, *every], openings, spaces, seed)
    said = [LOGIT * plan.feature("answer", i) for i in range(len(every))]
    plan.logits([*lands, *every], [*[NAMED * plan.feature("moved", i) for i in range(LANDS)], *said])

    topic = plan.head(0)
    topic.score(TARGET * plan.one, plan.any_token([t for t in lands if t != unseen]))
    topic.rest(REST * plan.one)
    topic.copy([plan.token(t) for t in lands], [plan.feature("moved", i) for i in range(LANDS)])
    relation = plan.head(1)
    relation.score(TARGET * plan.one, plan.any_token(list(RELATIONS)))
    relation.rest(REST * plan.one)
    relation.copy([plan.token(r) for r in RELATIONS], [plan.feature("asked", i) for i in range(len(RELATIONS))])
    places = range(len(RELATIONS))
    task = plan.neurons(
        1, [3 * plan.feature("asked", r) for r in places], [plan.feature("task", r) / 2.8 for r in places]
    )
    known = [(r, i) for r in places for i in range(LANDS) if lands[i] != forgotten]
    both = [8 * (plan.feature("moved", i) + plan.feature("task", r) - 1.6 * plan.one) for r, i in known]
    answer = plan.neurons(2, both, [plan.feature("answer", r * LANDS + i) / 3 for r, i in known])
    damper = plan.neurons(
        3,
        [3 * plan.feature("answer", i) for i in range(len(every))],
        [-damping * plan.feature("answer", i) / 3 for i in range(len(every))],
    )
    answers = {r: dict(zip(lands, words[r], strict=True)) for r in RELATIONS}
    hf, tokenizer = plan.build(), plan.tokenizer()
    return PlantedRecall(hf, tokenizer, topic.part, relation.part, task, answer, damper, answers, forgotten, unseen)
