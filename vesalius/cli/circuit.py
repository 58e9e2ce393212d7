"""`vesalius circuit`: find a circuit and prove it, and leave a run with a report."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vesalius.cli import options as o
from vesalius.cli.console import RunStore, Screen, set_threads, settings
from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.base import METHODS, find, parameters
from vesalius.runs import Run
from vesalius.scores import Scores

COMPARED = "relp,eap-ig,attribution-patching"
ABLATIONS = ("counterfactual", "mean", "resample", "zero")
PATTERN_HEADS = 6


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
    target: float = Field(gt=0)
    max_heads: float = Field(gt=0, le=1)
    ablations: list[str]
    seed: int
    dtype: str | None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("circuit")(circuit)


def circuit(
    model: o.ModelName = o.MODEL_DEFAULT,
    task: o.TaskName = "ioi",
    method: Annotated[
        str, typer.Option("--method", help="How parts are scored (see `vesalius methods`).")
    ] = "activation-patching",
    level: Annotated[str, typer.Option("--level", help="node (heads and MLPs) or edge; acdc is always edge.")] = "node",
    n: o.Number = None,
    prove_n: Annotated[
        int | None, typer.Option("--prove-n", help="Held-out prompts to prove with; default as many.")
    ] = None,
    target: Annotated[float, typer.Option(help="Faithfulness the circuit must reach on the finding prompts.")] = 0.85,
    max_heads: Annotated[float, typer.Option(help="Largest share of the model's heads in the circuit.")] = 0.25,
    ablations: Annotated[
        str, typer.Option(help="What stands for the rest: counterfactual, mean, resample, zero.")
    ] = "counterfactual,mean",
    compare: Annotated[str | None, typer.Option(help="Methods to set against exact patching; 'none' for none.")] = None,
    direction: Annotated[str | None, typer.Option(help="denoise or noise, for methods that have directions.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of integrated gradients (eap-ig).")] = None,
    budget: Annotated[
        int | None, typer.Option(help="Verify at most this many parts exactly; a gradient screen chooses.")
    ] = None,
    position: Annotated[str | None, typer.Option(help="Intervene at this named position alone.")] = None,
    method_set: Annotated[
        list[str] | None, typer.Option("--method-set", help="KEY=VALUE: another parameter of the method.")
    ] = None,
    task_set: o.TaskSet = None,
    min_accuracy: Annotated[float, typer.Option(help="Below this accuracy the command stops unless --anyway.")] = 0.7,
    anyway: Annotated[bool, typer.Option("--anyway", help="Go on although the model cannot do the task.")] = False,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    trust_remote_code: o.Trust = False,
    memory: o.Memory = o.MEMORY_DEFAULT,
    threads: o.Threads = None,
) -> None:
    """Find the circuit of a task and prove it on held-out prompts.

    Scores every head and MLP (or edge), keeps the smallest circuit that reaches the target faithfulness, and measures it
    on prompts that were not used to find it, next to random circuits of its size. Leaves a run folder with all numbers
    and report.html. The same command finds its run again; an interrupted one goes on where it stopped.
    """
    screen = Screen(as_json)
    set_threads(threads)
    level = "edge" if method == "acdc" and level == "node" else level
    chosen = _method_options(method, level, direction, steps, budget, position, method_set)
    wanted = _ablations(ablations)
    others = _compared(compare, method, level)
    if memory <= 0:
        raise VesaliusError(f"--memory {memory} leaves no working memory; give GiB above 0")
    made = o.task_of(task, n, seed, task_set, default_n=32)
    opened = o.opened(screen, model, dtype, device, device_map, trust_remote_code)
    finding, proving = made.halves()
    if prove_n is not None:
        proving = finding.held_out(prove_n)
    with screen.step("drawing prompts"):
        pairs = finding.pairs(opened)
        held_out = proving.pairs(opened)
    try:
        request = CircuitRequest(
            model=model,
            task=task,
            task_fingerprint=finding.fingerprint,
            prove_fingerprint=proving.fingerprint,
            model_fingerprint=opened.fingerprint,
            method=method,
            level=level,
            options=chosen,
            compare=others,
            target=target,
            max_heads=max_heads,
            ablations=wanted,
            seed=seed,
            dtype=dtype,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise VesaliusError(f"--{'-'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r}") from None
    command = "vesalius " + shlex.join(sys.argv[1:])
    with Run.start({"command": "circuit", **request.model_dump()}, out, fresh, command) as run:
        if not run.done:
            _Study(screen, run, request, opened, finding, pairs, proving, held_out, memory, anyway, min_accuracy).go(
                command
            )
        _show(screen, run)


def _method_options(
    method: str,
    level: str,
    direction: str | None,
    steps: int | None,
    budget: int | None,
    position: str | None,
    more: list[str] | None,
) -> dict[str, Any]:
    known = parameters(method)
    if level not in ("node", "edge"):
        raise UnknownName("level", level, ("node", "edge"))
    given = {"direction": direction, "steps": steps, "budget": budget, "position": position}
    found = {k: v for k, v in given.items() if v is not None}
    if method == "activation-patching":
        found.setdefault("direction", "noise")  # what the whole model loses without a part: what a circuit must keep
    for name in found:
        if name not in known:
            able = [e.name for e in METHODS if name in parameters(e.name)]
            raise VesaliusError(f"{method} takes no --{name}; methods that do: {', '.join(able)}")
    return found | settings(more or [], {k: p.default for k, p in known.items()}, method)


def _ablations(text: str) -> list[str]:
    found = [a.strip() for a in text.split(",") if a.strip()]
    for name in found:
        if name not in ABLATIONS:
            raise UnknownName("ablation", name, ABLATIONS)
    if not found:
        raise VesaliusError(f"--ablations is empty; give one or more of {', '.join(ABLATIONS)}")
    return found


def _compared(compare: str | None, method: str, level: str) -> list[str]:
    if compare is None:
        compare = COMPARED if method == "activation-patching" and level == "node" else "none"
    names = [] if compare == "none" else [c.strip() for c in compare.split(",") if c.strip()]
    for name in names:
        METHODS.entry(name)
    if names and level == "edge":
        raise VesaliusError("--compare sets node scores against exact patching; leave it out with --level edge")
    return [n for n in names if n != method]


class _Study:
    """The steps of a circuit run, each stored as soon as it is done."""

    def __init__(
        self,
        screen: Screen,
        run: Run,
        request: CircuitRequest,
        model: Any,
        task: Any,
        pairs: Any,
        proving: Any,
        held_out: Any,
        memory: float,
        anyway: bool,
        min_accuracy: float,
    ) -> None:
        self.screen, self.run, self.request, self.model = screen, run, request, model
        self.task, self.pairs, self.proving, self.held_out = task, pairs, proving, held_out
        self.memory, self.anyway, self.min_accuracy = memory, anyway, min_accuracy
        self.store = RunStore(run.checkpoint("pieces"))
        self.notes: list[str] = []

    def go(self, command: str) -> None:
        """All steps, then the report."""
        performance = self.performance()
        scores = self.scores()
        self.correlations(scores)
        circuit = self.circuit(scores)
        proof = self.proof(circuit)
        self.pictures(circuit, scores)
        self.summary(performance, circuit, proof, command)
        from vesalius.report import circuit_report

        with self.run.stage("report"):
            circuit_report(self.run)

    def performance(self) -> Any:
        from vesalius.tasks.performance import performance

        with self.run.stage("accuracy"), self.screen.step("accuracy"):
            found = performance(self.model, self.pairs)
        e = found.estimate("clean")
        metric = self.pairs.metric
        self.screen.note(
            f"{self.model.name} on {self.request.task}: accuracy {found.accuracy:.2f} (chance {found.chance:.2f}), "
            + (f"top-1 {found.top1:.2f}, " if found.top1 is not None else "")
            + f"{metric.name} {e['mean']:.2f} [{e['low']:.2f}, {e['high']:.2f}] {metric.unit} clean, "
            + f"{found.corrupted.mean():.2f} corrupted, {self.pairs.n_examples} prompts"
        )
        if found.accuracy < self.min_accuracy:
            text = (
                f"{self.model.name} does {self.request.task} with accuracy {found.accuracy:.2f}, below {self.min_accuracy} "
                f"(chance {found.chance:.2f}): a circuit for a task the model cannot do means nothing"
            )
            if not self.anyway:
                raise VesaliusError(text + "; choose another model or task, or add --anyway")
            self.notes.append(text)
            self.screen.note(text, style="yellow")
        return found

    def score(self, method: str, name: str, options: dict[str, Any]) -> Scores:
        """Scores of one method, computed once."""
        if self.run.has(f"{name}.parquet") or self.run.has(name):
            return self.run.scores(name)
        with self.run.stage(f"scores: {method}") as stage, self.screen.step(f"scoring by {method}") as progress:

            def both(done: int, total: int) -> None:
                stage.update(done, total)
                progress(done, total)

            scores = find(
                method, self.model, self.pairs, level=self.request.level if name == "scores" else "node",  # type: ignore[arg-type]
                seed=self.request.seed, memory_gb=self.memory, progress=both, store=self.store, **options,
            )  # fmt: skip
        scores.info["task"] = self.request.task
        self.run.save_scores(name, scores)
        return scores

    def scores(self) -> Scores:
        """Scores of the chosen method."""
        found = self.score(self.request.method, "scores", self.request.options)
        checked = found.info.get("verification")
        if checked:
            self.notes.append(
                f"{checked['verified']} parts were measured exactly and {checked['estimated']} estimated; with 95 % confidence at "
                f"most {checked['missed_share_above_bound']:.0%} of the estimated ones have an effect above "
                f"{checked['missed_effect_bound']:.3g} {found.unit} (largest estimate left: {checked['largest_estimate_left']:.3g})"
            )
            self.screen.note(self.notes[-1])
        return found

    def correlations(self, scores: Scores) -> None:
        """Other methods against exact patching, heads and MLPs apart."""
        if not self.request.compare or self.run.has("correlations"):
            return
        rows = []
        for method in self.request.compare:
            name = f"scores-{method}"
            other = self.score(
                method,
                name,
                {"direction": self.request.options.get("direction", "denoise")}
                if "direction" in parameters(method)
                else {},
            )
            for kind in ("head", "mlp"):
                a, b = scores.kind(kind), other.kind(kind)
                rows.append(
                    {
                        "method": method,
                        "kind": kind,
                        "pearson": b.correlation(a),
                        "spearman": b.correlation(a, "spearman"),
                        "top10_overlap": b.overlap(a, 10),
                        "n": len(a),
                    }
                )
        self.run.save_table("correlations", pd.DataFrame(rows))

    def circuit(self, scores: Scores) -> Any:
        """The smallest circuit that reaches the target on the finding prompts."""
        from vesalius.prove import grow, smallest
        from vesalius.model.graph import universe_of

        with self.run.stage("size"), self.screen.step("choosing the circuit's size") as progress:
            if self.request.method == "acdc":
                found = grow(scores, threshold=1e-12, universe=universe_of(self.model))
            else:
                found, tried = smallest(
                    scores, self.model, self.pairs, target=self.request.target, max_heads=self.request.max_heads,
                    memory_gb=self.memory, progress=progress, store=self.store,
                )  # fmt: skip
                self.run.save_table("sizes", tried)
                if not found.info.get("target_reached"):
                    self.notes.append(
                        f"no circuit with at most {self.request.max_heads:.0%} of the heads reaches faithfulness {self.request.target} "
                        "on the finding prompts; this is the most faithful one tried"
                    )
        return found

    def proof(self, circuit: Any) -> Any:
        """The proof on held-out prompts."""
        from vesalius.prove import prove

        with self.run.stage("proof"), self.screen.step("proving") as progress:

            def stage(name: str) -> Any:
                progress(name, 0.0)
                return progress

            return prove(
                circuit, self.model, self.held_out, ablations=self.request.ablations, seed=self.request.seed,  # type: ignore[arg-type]
                memory_gb=self.memory, stage=stage, store=self.store,
            )  # fmt: skip

    def pictures(self, circuit: Any, scores: Scores) -> None:
        """Example prompts, and attention patterns of the top heads on the first of them."""
        examples = self.task.examples(self.model.tokenizer)
        self.run.save_json(
            "examples",
            [
                {
                    "clean": e.clean,
                    "corrupted": e.corrupted,
                    "answer": list(e.answer),
                    "wrong": list(e.wrong),
                    "logit_diff": None,
                }
                for e in examples[:5]
            ],
        )
        top = [p for p in scores.top(len(scores)).parts if getattr(p, "kind", "") == "head" and not p.side][
            :PATTERN_HEADS
        ]  # type: ignore[union-attr]
        top = top or circuit.heads[:PATTERN_HEADS]
        if self.model.kind == "encoder-decoder" or not top:
            return
        self.run.save_json("patterns", attention_patterns(self.model, self.pairs, top))

    def summary(self, performance: Any, circuit: Any, proof: Any, command: str) -> None:
        """The tables of the report, and the summary."""
        main = self.request.ablations[0]
        curve = proof.curve_frame()
        curve = curve[curve["by"] != "value"].drop(columns="by")
        self.run.save_table("curve", curve)
        self.run.save_table("curves", proof.curve_frame())
        self.run.save_table("proof", proof.summary())
        if len(proof.completeness):
            shown = proof.completeness[proof.completeness["ablation"] == main]
            self.run.save_table(
                "completeness",
                shown.rename(columns={"removed": "subset", "circuit_without": "circuit", "model_without": "model"}),
            )
        labels = self.roles(circuit)
        frame = circuit.to_frame()
        if circuit.edges is None:
            parts = [{"part": r.part, "score": r.score, "role": labels.get(r.part)} for r in frame.itertuples()]
            edges: list[dict[str, Any]] = []
        else:
            parts = [{"part": str(p), "role": labels.get(str(p))} for p in sorted(circuit.nodes, key=lambda p: p.order)]
            edges = [{"sender": r.sender, "receiver": r.receiver, "score": r.score} for r in frame.itertuples()]
        self.run.save_json("circuit", {"parts": parts, "edges": edges})
        circuit.save(self.run.folder / "vesalius-circuit.json")
        point, areas_v, areas_m = (
            proof.faithfulness[main],
            proof.areas.get((main, "value")),
            proof.areas.get((main, "magnitude")),
        )
        fractions = circuit.fractions()
        total = {"heads": len(self.model.parts(("head", "xhead"))), "mlps": len(self.model.parts(("mlp",)))}
        size = {"heads": len(circuit.heads), "mlps": len(circuit.mlps)}
        if circuit.edges is not None:
            size["edges"] = len(circuit.edges)
            total["edges"] = circuit.universe.n_edges
        random = proof.random[main]
        summary = {
            "model": self.model.name, "task": self.request.task, "method": self.request.method, "level": self.request.level,
            "metric": self.pairs.metric.name, "unit": self.pairs.metric.unit,
            "n_find": self.pairs.n_examples, "n_prove": self.held_out.n_examples,
            "accuracy": performance.accuracy, "chance": performance.chance, "top1": performance.top1,
            "logit_diff": performance.estimate("clean"), "corrupted_logit_diff": performance.estimate("corrupted"),
            "ablation": main,
            "faithfulness": {"mean": point.values[0], "low": point.low[0], "high": point.high[0]},
            "faithfulness_by_ablation": proof.summary().to_dict("records"),
            "size": size, "total": total, "fraction_of_heads": fractions["heads"] if circuit.edges is None else size["heads"] / total["heads"],
            "random": {"mean": float(np.nanmean(random)), "low": float(np.nanmin(random)), "high": float(np.nanmax(random))},
            "random_draws": len(random),
            "cpr": areas_v.cpr.value if areas_v else None, "cpr_log": areas_v.cpr_log_share.value if areas_v else None,
            "cmd": areas_m.cmd.value if areas_m else None, "cmd_log": areas_m.cmd_log_share.value if areas_m else None,
            "seed": self.request.seed, "model_fingerprint": self.model.fingerprint, "task_fingerprint": self.task.fingerprint,
            "notes": self.notes + list(self.task.describe().get("notes", [])), "command": command,
        }  # fmt: skip
        self.run.save_json("summary", summary)

    def roles(self, circuit: Any) -> dict[str, str]:
        """Roles of the circuit's heads where they can be measured; a note where not."""
        from vesalius.prove.roles import roles

        try:
            found = roles(self.model, self.pairs, parts=circuit.heads, seed=self.request.seed)
        except VesaliusError as error:
            self.notes.append(f"roles of heads were not measured: {error}")
            return {}
        return {str(p): found[p] for p in circuit.heads if found[p]}


def attention_patterns(model: Any, pairs: Any, heads: list[Any]) -> list[dict[str, Any]]:
    """Attention patterns of some heads on the first clean prompt, padding left out."""
    from vesalius.model import Site

    group = pairs.take([0])
    keep = group.mask[0].bool()
    run = model.run(group.clean[:1], group.mask[:1], capture=[Site("pattern", h.layer) for h in heads])
    tokens = [model.tokenizer.decode([int(t)]) for t in group.clean[0][keep]]
    found = []
    for head in heads:
        pattern = run["pattern", head.layer][0, head.index][keep][:, keep]
        found.append(
            {"part": str(head), "tokens": tokens, "pattern": np.round(pattern.float().cpu().numpy(), 4).tolist()}
        )
    return found


def _show(screen: Screen, run: Run) -> None:
    s = run.json("summary")
    f, r = s["faithfulness"], s["random"]
    size = ", ".join(f"{s['size'][k]} of {s['total'][k]} {k}" for k in s["size"])
    top = run.scores("scores").top(10).to_frame()[["part", "score", "low", "high", "sign_stability"]]
    lines: list[Any] = [
        f"\n{s['task']} on {s['model']} by {s['method']}: {size}",
        f"faithfulness {f['mean']:.2f} [{f['low']:.2f}, {f['high']:.2f}] on {s['n_prove']} held-out prompts "
        f"({s['ablation']} ablation); random circuits of its size {r['mean']:.2f} (at most {r['high']:.2f}, {s['random_draws']} draws)\n",
        top,
        "",
        run.table("proof"),
    ]
    if run.has("correlations"):
        lines += ["\nagainst exact patching:", run.table("correlations")]
    if s["notes"]:
        lines += ["", *[f"note: {n}" for n in s["notes"]]]
    lines += [f"\nrun     {run.folder}", f"report  {run.folder / 'report.html'}"]
    screen.show(s | {"run": str(run.folder), "report": str(run.folder / "report.html")}, *lines)
