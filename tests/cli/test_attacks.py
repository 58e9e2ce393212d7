"""What a hostile but plausible user brings: nothing wrong in silence, nothing run, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from cli_helpers import ROOT, SMALL, Outcome, only_run, vesalius
from families import tiny_hf
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import vesalius as v
from vesalius.errors import ModelError, PartError, TaskError, VesaliusError
from vesalius.model.model import weights_fingerprint
from vesalius.prove import mib
from vesalius.prove.circuit import Circuit
from vesalius.runs import Run
from vesalius.scores import Scores

RELP = ("--method", "relp", "--n", "6", "--prove-n", "6", "--compare", "none")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, 97)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def prompts(path: Path, n: int = 12, answer: str = " w5", uneven: bool = False) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        clean = [f"w{k}" for k in rng.integers(1, 97, 4 + i % 3 * uneven)]
        corrupted = [clean[0], "w1" if clean[1] != "w1" else "w2", *clean[2:]]
        rows.append({"clean": " ".join(clean), "corrupted": " ".join(corrupted), "answer": answer, "wrong": " w6"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Any:
    return v.task(str(prompts(tmp_path / "mine.jsonl")), n=6)


def opened(tokenizer: Any, family: str = "llama") -> Any:
    torch.manual_seed(0)
    return v.open(tiny_hf(family), tokenizer=tokenizer)


def values(scores: Scores) -> NDArray[np.floating[Any]]:
    return np.asarray(scores.values)


# ---- wrong numbers


def test_a_head_taken_out_of_a_wide_model_changes_the_fingerprint() -> None:
    config = tf.GPTNeoXConfig(
        vocab_size=97, hidden_size=1024, intermediate_size=8, num_hidden_layers=1, num_attention_heads=16
    )
    hf = tf.GPTNeoXForCausalLM(config)
    before = weights_fingerprint(hf)
    with torch.no_grad():
        hf.gpt_neox.layers[0].attention.dense.weight[:, 64:256] = 0  # heads 1 to 3
    assert weights_fingerprint(hf) != before


def test_another_tokenizer_in_the_same_folder_is_another_request(mover: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mover, tmp_path / "copy"))
    command = ("circuit", "--model", copy, "--task", mover / "ioi.jsonl", "--out", tmp_path / "runs", "--json", *RELP)
    first = vesalius(*command, "--anyway").json
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["sarah"], vocabulary["the"] = vocabulary["the"], vocabulary["sarah"]
    file.write_text(json.dumps(content))
    second = vesalius(*command, "--anyway").json
    assert second["run"] != first["run"] and second["logit_diff"] != first["logit_diff"]


class Memory:
    """A store as a user writes one."""

    def __init__(self) -> None:
        self.pieces: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.pieces.get(key)

    def put(self, key: str, values: Any) -> None:
        self.pieces[key] = np.array(values)


def test_one_store_serves_several_questions(tokenizer: Any, task: Any) -> None:
    model, store = opened(tokenizer), Memory()
    for options in ({"parts": "mlp"}, {"parts": "head"}, {"parts": "mlp", "direction": "noise"}):
        kept = v.find("activation-patching", model, task, store=store, **options)
        plain = v.find("activation-patching", model, task, **options)
        assert np.array_equal(values(kept), values(plain))
    scores = v.find("relp", model, task)
    for circuit in (v.grow(scores, 4), v.grow(scores, 4, by="value")):
        kept = circuit.prove(model, task.held_out(), store=store, curve=False).summary()
        assert kept.equals(circuit.prove(model, task.held_out(), curve=False).summary())


def test_training_mode_is_refused(tokenizer: Any, task: Any) -> None:
    model = opened(tokenizer, "gpt2")
    model.hf.train()
    with pytest.raises(ModelError, match=r"training mode.*model\.hf\.eval\(\)"):
        v.find("activation-patching", model, task)


def test_a_hook_on_the_head_counts(tokenizer: Any, task: Any) -> None:
    model = opened(tokenizer)
    plain = values(v.find("activation-patching", model, task, parts="mlp"))
    model.hf.lm_head.register_forward_hook(lambda _, __, out: 2 * out)
    assert np.allclose(values(v.find("activation-patching", model, task, parts="mlp")), 2 * plain, atol=1e-6)


def test_threads_take_turns(tokenizer: Any, task: Any) -> None:
    model = opened(tokenizer)
    methods = ("relp", "eap", "activation-patching")
    alone = {m: values(v.find(m, model, task)) for m in methods}
    found: dict[str, list[Any]] = {m: [] for m in methods}

    def work(method: str) -> None:
        for _ in range(3):
            found[method].append(values(v.find(method, model, task)))

    threads = [threading.Thread(target=work, args=(m,)) for m in methods]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(len(found[m]) == 3 and all(np.array_equal(x, alone[m]) for x in found[m]) for m in methods)


def test_a_circuit_of_another_model_or_prompts_it_was_found_on(tokenizer: Any, task: Any) -> None:
    model = opened(tokenizer)
    circuit = v.grow(v.find("relp", model, task), 4)
    assert "6 held-out prompts)" in repr(circuit.prove(model, task.held_out(), curve=False))
    assert "6 of which it was found on" in repr(circuit.prove(model, task, curve=False))
    other = opened(tokenizer, "gpt2")
    assert "in another model" in repr(circuit.prove(other, task.held_out(), curve=False))
    with pytest.raises(PartError, match=r"no L5\.H9, L7\.MLP"):
        Circuit(frozenset(map(v.parse, ("L0.H0", "L5.H9", "L7.MLP")))).prove(model, task.held_out())  # type: ignore[arg-type]


def test_an_answer_that_the_tokenizer_does_not_know(tokenizer: Any, tmp_path: Path) -> None:
    task = v.task(str(prompts(tmp_path / "mine.jsonl", answer=" Paris")), n=4, on_misaligned="error")
    with pytest.raises(TaskError, match="' Paris' is unknown to this tokenizer"):
        task.pairs(opened(tokenizer))


def test_a_key_that_stands_twice(mover: Path, tmp_path: Path) -> None:
    lines = (mover / "ioi.jsonl").read_text().splitlines()
    lines[1] = lines[1][:-1] + ', "answer": " kate"}'
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    error = vesalius("circuit", "--model", mover, "--task", tmp_path / "mine.jsonl", "--out", tmp_path).error
    assert "line 2" in error and "'answer' stands there twice" in error


# ---- code


def test_names_are_text_in_a_notebook(tokenizer: Any, task: Any) -> None:
    scores = v.find("relp", opened(tokenizer), task)
    scores.info["task"] = "<img src=x onerror=alert(1)>"
    for shown in (scores, v.grow(scores, 3)):
        assert "<img" not in shown._repr_html_()


# ---- files that hold what they should not


def test_files_for_others_are_strict_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    parts = [v.parse(p) for p in ("L0.H0", "L0.H1", "L0.MLP")]
    scores = Scores(parts, np.array([np.nan, 1.0, 2.0]), info={"threshold": float("inf")})
    scores.save(tmp_path)
    circuit = v.grow(scores, 2)
    circuit.save(tmp_path / "circuit.json")
    for name in ("scores.json", "circuit.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    kept = Circuit.load(tmp_path / "circuit.json")
    assert kept == circuit and kept.scores is not None and np.isnan(kept.scores.values[0])


@pytest.mark.parametrize("line", ["[" * 100_000, '{"clean": ' + "9" * 5000 + "}"])
def test_json_that_json_chokes_on(mover: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    command = ("circuit", "--model", mover, "--task", tmp_path / "mine.jsonl", "--out", tmp_path)
    assert "mine.jsonl line 1" in vesalius(*command).error
    (tmp_path / "e.json").write_text(line)
    with pytest.raises(VesaliusError):
        mib.read(tmp_path / "e.json")


def test_half_a_character(mover: Path, tmp_path: Path) -> None:
    row = json.loads((mover / "ioi.jsonl").read_text().splitlines()[0])
    row = {k: t.replace("coin", "\ud800") for k, t in row.items()}
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    command = ("circuit", "--model", mover, "--task", tmp_path / "mine.jsonl", "--out", tmp_path)
    assert "half a character" in vesalius(*command).error


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", lambda j: j["files"].update({"summary.json": {}})),
        ("status.json", lambda j: j.update(touched="yesterday")),
        ("status.json", lambda j: j.update(stages="none")),
        ("status.json", lambda j: j.update(files=3)),
        ("status.json", lambda j: j.update(attempts="many", state="failed")),
        ("status.json", lambda j: j.update(stages=[{"started": "x", "ended": "y"}])),
    ],
)
def test_a_run_edited_by_hand(
    first: Outcome, mover: Path, tmp_path: Path, name: str, content: Callable[[Any], None]
) -> None:
    folder = Path(shutil.copytree(first.json["run"], tmp_path / Path(first.json["run"]).name))
    found = json.loads((folder / name).read_text())
    content(found)
    (folder / name).write_text(json.dumps(found))
    assert len(vesalius("runs", "--out", tmp_path, "--json").json) == 1
    assert vesalius("report", "last", "--out", tmp_path).code in (0, 2)
    command = ("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", tmp_path, *SMALL)
    assert vesalius(*command).code == 0 and Run.open(folder).done


def test_the_circuit_file_is_vouched_for(first: Outcome) -> None:
    assert "vesalius-circuit.json" in Run.open(first.json["run"]).files


# ---- models that do not fit, or answer nothing


def test_more_tokens_than_the_model_knows(tokenizer: Any, tmp_path: Path) -> None:
    uneven = v.task(str(prompts(tmp_path / "mine.jsonl", uneven=True)), n=6)
    plain = values(v.find("activation-patching", opened(tokenizer), uneven))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # and the model is not resized
    assert np.array_equal(values(v.find("activation-patching", opened(tokenizer), uneven)), plain)
    tokenizer.add_tokens(["zed"])
    task = v.task(str(prompts(tmp_path / "zed.jsonl", answer=" zed")), n=4)
    with pytest.raises(TaskError, match=r"'zed'.* is number 98, and the model knows 97"):
        task.pairs(opened(tokenizer))


@pytest.mark.parametrize(("words", "fits"), [(62, True), (63, False)])
def test_positions_that_begin_after_the_paddings(tokenizer: Any, tmp_path: Path, words: int, fits: bool) -> None:
    tokenizer.add_special_tokens({"mask_token": "w3", "pad_token": "w2"})
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.RobertaConfig(vocab_size=97, max_position_embeddings=67, pad_token_id=2, **sizes)
    model = v.open(tf.RobertaForMaskedLM(config), tokenizer=tokenizer)
    rest = " w7" * (words - 1)
    row = {"clean": f"w8{rest}", "corrupted": f"w9{rest}", "answer": " w5", "wrong": " w6"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    task = v.task(str(tmp_path / "mine.jsonl"))
    if fits:
        assert np.isfinite(values(v.find("relp", model, task))).all()
    else:
        with pytest.raises(TaskError, match="reads at most 64"):
            v.find("relp", model, task)


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_a_model_that_answers_nothing(mover: Path, tmp_path: Path, factor: float) -> None:
    copy = Path(shutil.copytree(mover, tmp_path / "copy"))
    weights = {k: w * factor for k, w in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    command = ("circuit", "--model", copy, "--task", mover / "ioi.jsonl", "--anyway", "--out", tmp_path / "runs", *RELP)
    error = vesalius(*command).error
    if np.isnan(factor):
        assert "holds NaN or infinite numbers" in error and not (tmp_path / "runs").exists()
    else:
        assert "no effect to explain" in error and only_run(tmp_path / "runs").state == "failed"


@pytest.mark.parametrize("method", ["direct", "relp", "eap-ig", "attribution-patching"])
def test_inference_mode_and_weights_that_ask_for_gradients(tokenizer: Any, task: Any, method: str) -> None:
    model = opened(tokenizer)
    plain = values(v.find(method, model, task))
    with torch.inference_mode():
        assert np.array_equal(values(v.find(method, model, task)), plain)
    model.hf.requires_grad_(True)
    assert np.array_equal(values(v.find(method, model, task)), plain)
    assert all(p.grad is None for p in model.hf.parameters())


def test_names_where_a_model_or_task_is_needed(tokenizer: Any, task: Any) -> None:
    model = opened(tokenizer)
    with pytest.raises(VesaliusError, match=r"vesalius\.open"):
        v.find("relp", "smollm2-135m", task)  # type: ignore[arg-type]
    with pytest.raises(VesaliusError, match=r"vesalius\.task"):
        v.find("relp", model, "ioi")  # type: ignore[arg-type]
    circuit = v.grow(v.find("relp", model, task), 2)
    with pytest.raises(VesaliusError, match=r"vesalius\.task"):
        circuit.prove(model, "ioi")
    with pytest.raises(VesaliusError, match="no prompts"):
        circuit.prove(model, task.pairs(model).take([]))


# ---- the command line and what is around it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("circuit --seed -1", ["--seed", "-1"]),
        ("circuit --seed 99999999999999999999", ["--seed"]),
        ("reuse --seed -1", ["--seed", "-1"]),
        ("circuit --threads 99999999999", ["--threads", "at most"]),
        ("circuit --compare acdc", ["--compare acdc", "edges"]),
    ],
)
def test_numbers_and_names_that_failed_late(arguments: str, words: list[str]) -> None:
    error = vesalius(*arguments.split()).error
    assert all(word in error for word in words), error


def beside(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`python -m vesalius` with these changes of the environment."""
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "vesalius", *map(os.fsencode, map(str, arguments))]
    return subprocess.run(command, env=given, capture_output=True, check=False)


@pytest.mark.parametrize("folder", ["ünï 😀", "r\udcff"])
def test_a_locale_without_letters_and_a_path_that_is_no_text(mover: Path, tmp_path: Path, folder: str) -> None:
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = ("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", tmp_path / folder, *RELP)
    done = beside(*command, **bare)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / folder)
    assert "·" in (run.folder / "report.html").read_text("utf-8")
    assert beside(*command, PYTHONIOENCODING="ascii").returncode == 0


def test_brackets_are_no_markup(mover: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesalius.cli.console.QUIET_SECONDS", 0.0)
    (tmp_path / "a[").mkdir()
    model = Path(shutil.copytree(mover, tmp_path / "a[" / "b]"))
    outcome = vesalius("check", model, "--out", tmp_path / "runs")
    assert str(model) in outcome.err


@pytest.mark.parametrize("stream", ["1", "2"])
def test_output_that_is_closed(stream: str) -> None:
    script = f'exec "{sys.executable}" -m vesalius tasks {stream}>&-'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_random_controls_are_the_same_in_every_process() -> None:
    script = """
from vesalius import parse
from vesalius.prove.circuit import Circuit
from vesalius.prove.proof import random_nodes
parts = [parse(f"L{l}.{w}") for l in range(6) for w in ("H0", "H1", "MLP")]
print(sorted(map(str, random_nodes(Circuit(frozenset(parts[:5])), parts, 1000).nodes)))
"""
    given = os.environ | {"PYTHONPATH": str(ROOT)}
    drawn = {
        subprocess.check_output([sys.executable, "-c", script], env=given | {"PYTHONHASHSEED": str(seed)})
        for seed in range(4)
    }
    assert len(drawn) == 1
