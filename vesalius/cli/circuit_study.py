"""The steps of `vesalius circuit`, each stored in its run as soon as it is done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from vesalius.cli.console import RunStore, Screen, estimate
from vesalius.errors import VesaliusError
from vesalius.find.base import find, parameters
from vesalius.find.detectors.roles import roles
from vesalius.model import Model, Pairs, Site
from vesalius.model.graph import universe_of
from vesalius.parts import Edge, Part
from vesalius.prove import grow, prove, smallest
from vesalius.prove.circuit import Circuit
from vesalius.prove.proof import Proof
from vesalius.runs import Run
from vesalius.scores import Scores
from vesalius.tasks import TASKS
from vesalius.tasks.performance import Performance, performance

PATTERN_HEADS = 6
EXAMPLES = 5
TOP = 10
FEWEST = 3  # parts that can be correlated
SURPLUS = 0.1  # faithfulness off by more than this is worth a word


class CircuitRequest(BaseModel):
    """What decides the numbers of a circuit run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    task: str
    task_fingerprint: str
    prove_fingerprint: str
    model_fingerprint: str
    method: str
    level: str
    options: dict[str, Any]
    compare: list[str]
    target: float = Field(gt=0, le=1)
    max_heads: float = Field(gt=0, le=1)
    ablations: list[str]
    seed: int
    dtype: str | None
    pairs_fingerprints: list[str]  # the tokens: the same text is another request under a changed tokenizer


class CircuitStudy:
    """Finds a circuit and proves it, into a run.

    Args:
        screen: where progress and notes go. run: the run. request: what was asked.
        model: the opened model. task: the finding half of the task. pairs, held_out: prompts to find and to prove with.
        memory_gb: working memory. min_accuracy: below it the study stops, unless `anyway`.
    """

    def __init__(
        self,
        screen: Screen,
        run: Run,
        request: CircuitRequest,
        model: Model,
        task: Any,
        pairs: Pairs,
        held_out: Pairs,
        *,
        memory_gb: float,
        min_accuracy: float,
        anyway: bool,
    ) -> None:
        self.screen, self.run, self.request, self.model = screen, run, request, model
        self.task, self.pairs, self.held_out = task, pairs, held_out
        self.memory_gb, self.min_accuracy, self.anyway = memory_gb, min_accuracy, anyway
        self.store = RunStore(run.checkpoint("pieces"))
        self.notes: list[str] = []

    def go(self, command: str) -> None:
        """All steps."""
        done = self.accuracy()
        scores = self.scores()
        self.correlations(scores)
        circuit = self.circuit(scores)
        proof = self.proof(circuit)
        self.pictures(scores)
        self.tables(circuit, proof)
        self.summary(done, circuit, proof, command)

    def accuracy(self) -> Performance:
        """How well the model does the task; stops where a circuit would mean nothing."""
        with self.run.stage("accuracy"), self.screen.step("accuracy"):
            found = performance(self.model, self.pairs)
        broken = int((~np.isfinite(found.clean) | ~np.isfinite(found.corrupted)).sum())
        if broken:
            raise VesaliusError(
                f"{self.model.name} answers {broken} of {len(found.clean)} prompts with NaN or infinity: its weights "
                "are damaged, or overflow; try --dtype float32"
            )
        clean, metric = found.estimate("clean"), self.pairs.metric
        top1 = f"top-1 {found.top1:.2f}, " if found.top1 is not None else ""
        self.screen.note(
            f"{self.model.name} on {self.request.task}: accuracy {found.accuracy:.2f} (chance {found.chance:.2f}), "
            f"{top1}{metric.name} {estimate(clean)} {metric.unit} clean, "
            f"{found.corrupted.mean():.2f} corrupted, {self.pairs.n_examples} prompts"
        )
        if found.accuracy < self.min_accuracy:
            text = (
                f"{self.model.name} does {self.request.task} with accuracy {found.accuracy:.2f}, below "
                f"{self.min_accuracy} (chance {found.chance:.2f}): a circuit for a task the model cannot do "
                "means nothing"
            )
            if not self.anyway:
                raise VesaliusError(text + "; choose another model or task, or add --anyway")
            self.notes.append(text)
            self.screen.note(text, style="yellow")
        return found

    def score(self, method: str, name: str, level: str, options: dict[str, Any]) -> Scores:
        """Scores of one method, computed once."""
        if self.run.has(name):
            return self.run.scores(name)
        with self.run.stage(f"scores: {method}") as stage, self.screen.step(f"scoring by {method}") as progress:

            def both(done: int, total: int) -> None:
                stage.update(done, total)
                progress(done, total)

            scores = find(
                method,
                self.model,
                self.pairs,
                level=level,  # type: ignore[arg-type]
                seed=self.request.seed,
                memory_gb=self.memory_gb,
                progress=both,
                store=self.store,
                **options,
            )
        scores.info["task"] = self.request.task
        if scores.positions is not None:  # one named position: the label says nothing that the request does not
            scores = replace(scores, positions=None)
        self.run.save_scores(name, scores)
        return scores

    def scores(self) -> Scores:
        """Scores of the chosen method."""
        found = self.score(self.request.method, "scores", self.request.level, self.request.options)
        if checked := found.info.get("verification"):
            self.notes.append(
                f"{checked['verified']} parts were measured exactly and {checked['estimated']} estimated; with 95 % "
                f"confidence at most {checked['missed_share_above_bound']:.0%} of the estimated ones have an effect "
                f"above {checked['missed_effect_bound']:.3g} {found.unit} "
                f"(largest estimate left: {checked['largest_estimate_left']:.3g})"
            )
            self.screen.note(self.notes[-1])
        return found

    def correlations(self, exact: Scores) -> None:
        """Other methods against exact patching, heads and MLPs apart; with a budget, on what was measured exactly."""
        if not self.request.compare or self.run.has("correlations"):
            return
        if exact.verified is not None:
            exact = exact.select([i for i, checked in enumerate(exact.verified) if checked])
        given = {"direction": "denoise"} | self.request.options
        rows = []
        for method in self.request.compare:
            shared = set(parameters(method)) & {"direction", "position"}
            options = {name: value for name, value in given.items() if name in shared}
            other = self.score(method, f"scores-{method}", "node", options)
            for kind in ("head", "mlp"):
                a, b = exact.kind(kind), other.kind(kind)
                b = b.select([i for i, part in enumerate(b.parts) if part in set(a.parts)])
                if len(a) < FEWEST:
                    continue
                pearson, spearman = b.correlation(a), b.correlation(a, "spearman")
                top = b.overlap(a, TOP) if len(a) >= 2 * TOP else None  # of fewer, ten in common mean little
                agree = {"pearson": pearson, "spearman": spearman, "top10_overlap": top, "n": len(a)}
                rows.append({"method": method, "kind": kind} | agree)
        self.run.save_table("correlations", pd.DataFrame(rows))

    def circuit(self, scores: Scores) -> Circuit:
        """The smallest circuit that reaches the target on the finding prompts."""
        request = self.request
        with self.run.stage("size"), self.screen.step("choosing the circuit's size") as progress:
            if request.method == "acdc":  # its own threshold chose the edges
                return grow(scores, threshold=1e-12, universe=universe_of(self.model))
            found, tried = smallest(
                scores,
                self.model,
                self.pairs,
                target=request.target,
                max_heads=request.max_heads,
                memory_gb=self.memory_gb,
                progress=progress,
                store=self.store,
            )
        self.run.save_table("sizes", tried)
        if not found.info.get("target_reached"):
            self.notes.append(
                f"no circuit with at most {request.max_heads:.0%} of the heads reaches faithfulness {request.target} "
                "on the finding prompts; this is the most faithful one tried "
                f"({found.info['faithfulness_on_finding_prompts']:.2f} there)"
            )
        return found

    def proof(self, circuit: Circuit) -> Proof:
        """The proof on held-out prompts."""
        with self.run.stage("proof"), self.screen.step("proving") as progress:

            def stage(name: str) -> Any:
                progress(name, 0.0)
                return progress

            return prove(
                circuit,
                self.model,
                self.held_out,
                ablations=self.request.ablations,  # type: ignore[arg-type]
                seed=self.request.seed,
                memory_gb=self.memory_gb,
                stage=stage,
                store=self.store,
            )

    def pictures(self, scores: Scores) -> None:
        """Example prompts, and attention patterns of the top heads on the first of them."""
        shown = self.task.examples(self.model.tokenizer)[:EXAMPLES]
        examples = [
            {"clean": e.clean, "corrupted": e.corrupted, "answer": list(e.answer), "wrong": list(e.wrong)}
            for e in shown
        ]
        self.run.save_json("examples", [e | {"logit_diff": None} for e in examples])
        heads = _heads_by_size(scores)
        if heads and self.model.kind != "encoder-decoder":
            self.run.save_json("patterns", attention_patterns(self.model, self.pairs, heads[:PATTERN_HEADS]))

    def tables(self, circuit: Circuit, proof: Proof) -> None:
        """The curves, the proof, the circuit with its heads' roles."""
        main = self.request.ablations[0]
        curve = proof.curve_frame()
        self.run.save_table("curves", curve)
        self.run.save_table("curve", curve[curve["by"] != "value"].drop(columns="by"))
        self.run.save_table("proof", proof.summary())
        if len(proof.completeness):
            shown = proof.completeness[proof.completeness["ablation"] == main]
            names = {"removed": "subset", "circuit_without": "circuit", "model_without": "model"}
            self.run.save_table("completeness", shown.rename(columns=names))
        labels = self.roles(circuit)
        frame = circuit.to_frame()
        parts: list[dict[str, Any]]
        edges: list[dict[str, Any]] = []
        if circuit.edges is None:
            parts = [{"part": r.part, "score": r.score, "role": labels.get(str(r.part))} for r in frame.itertuples()]
        else:
            nodes = sorted(circuit.nodes, key=lambda p: p.order)
            parts = [{"part": str(p), "role": labels.get(str(p))} for p in nodes]
            edges = [{"sender": r.sender, "receiver": r.receiver, "score": r.score} for r in frame.itertuples()]
        self.run.save_json("circuit", {"parts": parts, "edges": edges})
        if circuit.edges is not None and circuit.scores is not None:  # the run has the scores of all edges already
            kept = [i for i, edge in enumerate(circuit.scores.parts) if edge in circuit.edges]
            circuit = replace(circuit, scores=circuit.scores.select(kept))
        self.run.save_file("vesalius-circuit.json", circuit.save)

    def roles(self, circuit: Circuit) -> dict[str, str]:
        """Roles of the circuit's heads where they can be measured; a note where not."""
        try:
            with self.screen.step("roles of the heads"):
                found = roles(self.model, self.pairs, parts=circuit.heads, seed=self.request.seed)
        except VesaliusError as error:
            self.notes.append(f"roles of heads were not measured: {error}")
            return {}
        return {str(p): found[p] for p in circuit.heads if found[p]}

    def _of_task(self) -> list[str]:
        """What the task notes of itself, and how many rows of a user's file it passed over."""
        told = self.task.describe()
        passed = sum(v for k, v in told.get("skipped", {}).items() if k != "in the other split")
        notes = list(told.get("notes", []))
        if passed and self.request.task not in TASKS:  # of a registered task others were drawn in their place
            notes.append(f"rows passed over: {passed}; the first: {told.get('first_skipped', 'a repeated prompt')}")
        return notes

    def summary(self, done: Performance, circuit: Circuit, proof: Proof, command: str) -> None:
        """The run's summary."""
        request = self.request
        main = request.ablations[0]
        size = {"heads": len(circuit.heads), "mlps": len(circuit.mlps)}
        total = {"heads": len(self.model.parts(("head", "xhead"))), "mlps": len(self.model.parts(("mlp",)))}
        if circuit.edges is not None:
            size["edges"], total["edges"] = len(circuit.edges), universe_of(self.model).n_edges
        point, random = proof.faithfulness[main], proof.random[main]
        drawn = random[~np.isnan(random)]
        spread = {"mean": drawn.mean(), "low": drawn.min(), "high": drawn.max()} if len(drawn) else {}
        value, magnitude = proof.areas.get((main, "value")), proof.areas.get((main, "magnitude"))
        summary = {
            "model": self.model.name,
            "task": request.task,
            "method": request.method,
            "level": request.level,
            "metric": self.pairs.metric.name,
            "unit": self.pairs.metric.unit,
            "n_find": self.pairs.n_examples,
            "n_prove": self.held_out.n_examples,
            "accuracy": done.accuracy,
            "chance": done.chance,
            "top1": done.top1,
            "logit_diff": done.estimate("clean"),
            "corrupted_logit_diff": done.estimate("corrupted"),
            "ablation": main,
            "faithfulness": {"mean": point.values[0], "low": point.low[0], "high": point.high[0]},
            "faithfulness_by_ablation": proof.summary().to_dict("records"),
            "size": size,
            "total": total,
            "fraction_of_heads": size["heads"] / max(1, total["heads"]),
            "random": {k: float(v) for k, v in spread.items()},
            "random_draws": len(drawn),
            "cpr": value.cpr.value if value else None,
            "cpr_log": value.cpr_log_share.value if value else None,
            "cmd": magnitude.cmd.value if magnitude else None,
            "cmd_log": magnitude.cmd_log_share.value if magnitude else None,
            "seed": request.seed,
            "model_fingerprint": self.model.fingerprint,
            "task_fingerprint": self.task.fingerprint,
            "notes": [*self.notes, *self._of_task(), *_of_proof(point.values[0], circuit)],
            "command": command,
        }
        self.run.save_json("summary", summary)


def _heads_by_size(scores: Scores) -> list[Part]:
    """Heads by |score|; of edges' scores, by the sum over the edges that leave a head."""
    size: dict[Part, float] = {}
    for part, value in zip(scores.parts, scores.values, strict=True):
        head = part.sender if isinstance(part, Edge) else part
        if head.kind == "head":
            size[head] = size.get(head, 0.0) + abs(float(value))
    return sorted(size, key=lambda head: -size[head])


def _of_proof(faithfulness: float, circuit: Circuit) -> list[str]:
    target = float(circuit.info.get("target", 0))
    if circuit.info.get("target_reached") and faithfulness < target - SURPLUS:
        return [
            f"the target of {target} was reached on the finding prompts "
            f"({circuit.info['faithfulness_on_finding_prompts']:.2f}) and missed on the held-out ones: find with more "
            "prompts, or raise the target"
        ]
    if not faithfulness > 1 + SURPLUS:
        return []
    return [
        "the circuit does more than the whole model: parts that work against the answer were left out, so it is not "
        "what the model does, but what it could do"
    ]


def attention_patterns(model: Model, pairs: Pairs, heads: list[Part]) -> list[dict[str, Any]]:
    """Attention patterns of some heads on the first clean prompt, padding left out."""
    first = pairs.take([0])
    keep = first.mask[0].bool()
    sites = [Site("pattern", h.layer or 0) for h in heads]
    run = model.run(first.clean[:1], first.mask[:1], capture=sites)
    assert model.tokenizer is not None  # the task needed it
    tokens = [model.tokenizer.decode([int(t)]) for t in first.clean[0][keep]]
    found = []
    for head, site in zip(heads, sites, strict=True):
        pattern = run[site][0, head.index][keep][:, keep].float().cpu().numpy()
        found.append({"part": str(head), "tokens": tokens, "pattern": np.round(pattern, 4).tolist()})
    return found
