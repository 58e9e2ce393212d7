"""Facts: a relation and a subject somewhere in a row of noise, and the answer after IS.

    <begin> ~ CAPITAL ~ s17 ~ IS -> a203        <begin> s17 ~ SAME ~ ~ IS -> s17

Every (relation, subject) has one answer, drawn once by `world`; only a model that has learnt them can answer. SAME asks
for the subject itself: a question that no fact answers. Places vary, so attention has to fetch both.

After the toy settings of factual recall; Lv et al., arXiv 2403.19521, is what it is studied with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.synthetic import Ids, Synthetic

BEGIN, IS, SAME = range(3)


class Facts(Synthetic):
    """Subjects and answers of some relations, and SAME. Scored: the answer.

    Ids: 0 begin, 1 IS, 2 SAME, then `relations` relations, `noise` symbols, `subjects` subjects, `answers` answers for
    each relation.
    """

    name = "facts"
    defaults = {"relations": 3, "subjects": 200, "answers": 50, "noise": 8, "world": 0, "length": 6}
    relations: int
    subjects: int
    answers: int
    noise: int
    world: int

    def prepare(self) -> None:
        self.refuse_unless(self.length >= 4 and self.noise >= 1, "a length of at least 4 and noise of 1 are wanted")
        self.refuse_unless(min(self.relations, self.subjects, self.answers) >= 1, "at least one of each is wanted")
        self.first_noise = 3 + self.relations
        self.first_subject = self.first_noise + self.noise
        self.first_answer = self.first_subject + self.subjects
        self.vocab_size = self.first_answer + self.relations * self.answers
        drawn = np.random.default_rng([self.world, 7]).integers(0, self.answers, (self.relations, self.subjects))
        self.table: Ids = self.first_answer + self.answers * np.arange(self.relations)[:, None] + drawn
        counts = np.bincount(self.table.ravel(), minlength=self.vocab_size)
        self.chance = float(counts.max() / (self.relations * self.subjects + self.subjects))

    def asked(self, relation: int, subject: NDArray[np.int64] | int) -> Ids:
        """The answer's id; relation -1 is SAME."""
        if relation < 0:
            return np.asarray(self.first_subject + np.asarray(subject))
        return np.asarray(self.table[relation, subject])

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        ids = self.first_noise + rng.integers(0, self.noise, (self.rows, self.length + 1))
        each = np.arange(self.rows)
        relation = rng.integers(-1, self.relations, self.rows)
        subject = rng.integers(0, self.subjects, self.rows)
        places = 1 + np.argsort(rng.random((self.rows, self.length - 2)), axis=1)[:, :2]
        ids[:, 0], ids[:, -2] = BEGIN, IS
        ids[each, places[:, 0]] = np.where(relation < 0, SAME, 3 + relation)
        ids[each, places[:, 1]] = self.first_subject + subject
        ids[:, -1] = np.where(relation < 0, self.first_subject + subject, self.table[relation, subject])
        mask = np.zeros(ids.shape, dtype=bool)
        mask[:, -1] = True
        return ids, mask
