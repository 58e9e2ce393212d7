"""Where a fact is recalled, step by step: topic heads, mixing MLPs, function vectors, the last block."""

from vesalius.find.recall.heads import TaskHeads, swapped, task_heads, topic_ranks, writes
from vesalius.find.recall.last import LastBlock, Mitigation, last_block, mitigate
from vesalius.find.recall.questions import Asked, OverOthers, Question, ask, facts_file, take_apart
from vesalius.find.recall.regression import NEEDED, TRUSTED, Mixing, mix
from vesalius.find.recall.trace import Machinery, Trace, machinery, trace
from vesalius.find.recall.vectors import effects, neutral

__all__ = [
    "NEEDED", "TRUSTED", "Asked", "LastBlock", "Machinery", "Mitigation", "Mixing", "OverOthers", "Question",
    "TaskHeads", "Trace", "ask", "effects", "facts_file", "last_block", "machinery", "mitigate", "mix", "neutral",
    "swapped", "take_apart", "task_heads", "topic_ranks", "trace", "writes",
]  # fmt: skip
