"""Reports: one HTML file that opens offline, drawn from a recorded run alone.

    circuit_report(run), reuse_report(run), compare_report(run)   -> path of the run's report.html
    report(run)                                                   the one for the run's command

What a command stores in its run for the report to find (`run.save_json`, `run.save_table`). A name marked * is needed;
whatever else is missing is left out of the page with a line that says what was not measured. An *estimate* is a
number, or `{"mean", "low", "high"}` with a 95 % interval, or `[mean, low, high]`; null where it is not known. Columns
marked ? may be missing. Scores are positive when the part helps the metric.

**`vesalius circuit`**

- `summary.json` *: `title`?, `model` *, `task` *, `method` *, `level` ("node" or "edge"), `metric`? ("logit-diff"),
  `unit`? ("logit"), `n_find`, `n_prove` (prompts to find and to prove), `accuracy` (share of prompts on which the
  model prefers a right answer), `top1` (share on which a right answer is the likeliest token), `logit_diff`
  (estimate), `corrupted_logit_diff` (estimate), `faithfulness` (estimate, at the chosen size), `ablation`? (of that
  number: "counterfactual", "mean", "resample" or "zero"), `size` {"heads", "mlps", "edges"}, `total`? the same counts
  for the whole model, `fraction_of_heads`, `random` (estimate for random circuits of that size), `random_draws`?,
  `cpr`, `cmd`, `cpr_log`, `cmd_log`, `notes` (list of lines), `command` (as typed), `versions`? (merged over the
  run's own).
- `scores.parquet`: `part` *, `score` *, `kind`, `layer`, `index`, `low`?, `high`?, `sign_stability`?,
  `place_stability`?, `verified`?, `position`? (as `Scores.to_frame()` gives it; more columns are not looked at). Edge
  scores have edges as parts; then each head's cell on the map is the sum over the edges that leave it.
- `curve.parquet`: `ablation` * (the first is drawn first), `size` * (number of heads and MLPs, or of edges),
  `faithfulness` *, `kind` * ("circuit" or "random"), `fraction`?, `low`?, `high`?, `draw`? (one row a draw for random
  circuits).
- `circuit.json`: `{"parts": [{"part" *, "role"?, "score"?}], "edges": [{"sender" *, "receiver" *, "score"?}]}`;
  `edges` missing or empty for a circuit of nodes.
- `examples.json`: list of `{"clean" *, "corrupted", "answer", "wrong" (text or list of texts), "logit_diff"}`.
- `patterns.json`: list of `{"part" *, "tokens" * (texts), "pattern" * (query x key rows), "role"?}`; the first 12 are
  drawn.
- `correlations.parquet`: `method` *, `kind` * ("head", "mlp", ...), `pearson` *, `spearman`?, `top10_overlap`?, `n`?,
  each against exact activation patching.
- `completeness.parquet`: `subset` * (what was knocked out), `circuit` * (metric of the circuit without it), `model` *
  (metric of the model without it), `removed`? (how many parts), `gap`?, `low`?, `high`?.

**`vesalius reuse`** (items are the circuits laid side by side, in order; `i` counts from 0)

- `summary.json` *: `title`?, `method`, `unit`?, `items` * [{"name" *, "model", "task", "accuracy", "logit_diff"
  (estimate), "faithfulness" (estimate), "size" {...}, "total"? {...}}], `transplant`? {"source" (name), "target"
  (name), "heads" [parts], "random_draws"?}, `notes`, `command`, `versions`?.
- `circuit_<i>.json` *: as `circuit.json`. `scores_<i>.parquet`: as `scores.parquet`.
- `overlap.parquet`: `a` *, `b` * (names), `kind` * ("all", "head", "mlp", "edge"), `shared` *, `size_a` *, `size_b` *,
  `jaccard`?, `chance_shared`? (parts expected to be shared by chance), `chance_low`?, `chance_high`?, `p`?.
- `transplant.parquet`: `condition` * ("before", "after", "random"), `metric` * ("accuracy", "logit difference", ...),
  `value` *, `low`?, `high`?, `draw`? (one row a draw for random heads).

**`vesalius compare`**

- `summary.json` *: `title`?, `runs` * [{"name" *, "model", "task", "method", "level"?, "accuracy", "faithfulness"
  (estimate), "size" {...}, "run"? (its folder's name)}], `notes`, `command`, `versions`?.
- `matrix.parquet` *: `a` *, `b` * (names), `kind` * ("all", "head", "mlp", "edge"), `pearson`, `spearman`, `overlap`
  (share of the k largest in common), `k`?, `n`? (parts in both); both orders and the diagonal, NaN where not
  comparable.
- `top.parquet`: `name` * (of the run), `rank` * (from 1), `part` *, `score` *, `low`?, `high`?.

**`vesalius train`** (drawn while it runs)

- `log.parquet`: `step` *, `loss` *, `lr` *, `grad_norm`, `tokens`, `seconds`. `evaluation.parquet`: `step` *, `loss` *,
  `bits_per_byte`?. `summary.json` at the end (see `vesalius.train.running`).

**`vesalius dynamics`**

- `summary.json` *: `run` *, `task` *, `method` *, `lead`, `unit`?, `notes`, `command`.
- `numbers.parquet`: `step` *, `held_out`?, `in_context`?, `repeat_first`?, `repeat_second`?, `accuracy`?, `chance`?,
  `metric`?. `heads.parquet`: `step` *, `part` *, `induction`, `previous-token`, `duplicate-token`.
  `scores_by_step.parquet`: `step` *, `part` *, `score` *.

**`vesalius heads`**

- `summary.json` *: `model` *, `task`?, `detectors` * {name: {"what", "paper", "unit", "null_is", "n", "options"}},
  `roles` * (detectors that give a leading role), `found` {name: [parts]}, `skipped` {name: why}, `lead`, `notes`,
  `command`.
- `heads.parquet`: `detector` *, `part` *, `layer` *, `index` *, `score` *, `low`, `high`, `null` *, `null_high` *,
  `p` *, `q` *, `found` *; the Scores of each detector with all its columns lie beside it as `scores-<detector>`.
  `leading.parquet`: `part` *, `layer` *, `index` *, `role` * ("" for none), `score` *, `excess` *.
- `portraits.json`: list of {"head" *, "examples": [{"source", "tokens", "query", "attention", "write", "raised"}],
  "readings": [{"token", "raised", "own_rank"}]}; `portrait-<head>.json`: one, of a head that has a page of its own.

**`vesalius lens ...`**: see `vesalius.report.lens`.

**`vesalius trace`, `vesalius anchor`, `vesalius direction`, `vesalius probe`, `vesalius bias`, `vesalius channels`,
`vesalius observe`, `vesalius frequency`, `vesalius recursion`, `vesalius icll`, `vesalius tune`, `vesalius codes`,
`vesalius sae`, `vesalius codebook`, `vesalius write`,
`vesalius steer`**: the docstrings of their modules and functions say what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vesalius.errors import UnknownName
from vesalius.report.anchor import anchor_report
from vesalius.report.bias import bias_report
from vesalius.report.change import change_report
from vesalius.report.channels import channels_report, observe_report
from vesalius.report.circuit import circuit_report
from vesalius.report.codebooks import codebook_report
from vesalius.report.compare import compare_report
from vesalius.report.dictionaries import codes_report, sae_report
from vesalius.report.direction import direction_report, probe_report
from vesalius.report.dynamics import dynamics_report
from vesalius.report.frequency import frequency_report
from vesalius.report.heads import heads_report
from vesalius.report.icll import icll_report
from vesalius.report.lens import lens_report
from vesalius.report.memorization import memorization_report
from vesalius.report.race import race_report
from vesalius.report.recursion import recursion_report
from vesalius.report.reuse import reuse_report
from vesalius.report.subnetwork import subnetwork_report
from vesalius.report.trace import trace_report
from vesalius.report.train import train_report
from vesalius.report.tuning import tuning_report
from vesalius.report.writing import writing_report
from vesalius.runs import Run

CHANGES = ("prune", "sparsify", "quantize", "merge", "distil", "repair", "forget")
_REPORTS: dict[str, Callable[[Run], Path]] = {
    "circuit": circuit_report,
    "reuse": reuse_report,
    "compare": compare_report,
    "train": train_report,
    "dynamics": dynamics_report,
    "race": race_report,
    "memorize": memorization_report,
    "heads": heads_report,
    "frequency": frequency_report,
    "recursion": recursion_report,
    "icll": icll_report,
    "tune": tuning_report,
    "direction": direction_report,
    "probe": probe_report,
    "bias": bias_report,
    "channels": channels_report,
    "observe": observe_report,
    "codes": codes_report,
    **{f"codebook-{name}": codebook_report for name in ("train", "show", "steer")},
    **{f"sae-{name}": sae_report for name in ("train", "show", "use")},
    "trace": trace_report,
    "anchor": anchor_report,
    **dict.fromkeys(CHANGES, change_report),
    "subnetwork": subnetwork_report,
    **dict.fromkeys(("write", "steer"), writing_report),
    **{f"lens-{name}": lens_report for name in ("logit", "tuned", "direct", "train", "basis", "anomaly")},
}


def report(run: Run) -> Path:
    """Draws the report that belongs to the run's command.

    Raises:
        UnknownName: if runs of that command have no report.
    """
    command = str(run.request.get("command", ""))
    if command not in _REPORTS:
        raise UnknownName("kind of report", command, _REPORTS)
    return _REPORTS[command](run)


__all__ = [
    "anchor_report", "bias_report", "change_report", "channels_report", "circuit_report", "codebook_report",
    "codes_report", "compare_report", "direction_report", "dynamics_report", "frequency_report", "heads_report",
    "icll_report", "lens_report", "memorization_report", "observe_report", "probe_report", "race_report",
    "recursion_report", "report", "reuse_report", "sae_report", "subnetwork_report", "trace_report", "train_report",
    "tuning_report", "writing_report",
]  # fmt: skip
