"""`vesalius distil`: a student beside its control, encoders with sliding windows, and a run that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as tf
from cli_helpers import vesalius
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from vesalius.corpus import far_news
from vesalius.model.sources.quiet import quiet_transformers

QUICK = ("--card-rows", "2", "--card-n", "4", "--card-tasks", "", "--no-time")
SHORT = ("--steps", "3", "--rows", "2", "--row-length", "16", "--lr", "0.01")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of more than 128 tokens in the random Llama's vocabulary of words."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [" ".join(f"w{(7 * i + j * (i % 3 + 3)) % 19}" for j in range(160)) for i in range(60)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return file


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Planted news."""
    file = tmp_path_factory.mktemp("text") / "news.jsonl"
    stories = far_news.FarNews(words=200, gap=60).documents(40)
    file.write_text("\n".join(json.dumps({"text": d.text, "id": d.id}) for d in stories))
    return file


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of four blocks that reads 64 tokens of planted news."""
    folder, reader = tmp_path_factory.mktemp("models") / "bert", far_news.tokenizer(64)
    config = tf.BertConfig(
        vocab_size=len(reader), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, pad_token_id=reader.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet_transformers():
        tf.BertForMaskedLM(config).save_pretrained(folder)
        reader.save_pretrained(folder)
    return folder


def card(told: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(told["card"]).set_index(["model", "metric"])


def test_half_a_causal_model_beside_its_control(random_llama: Path, words: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "small"
    shutil.copytree(random_llama, base)
    AutoTokenizer.from_pretrained(base, eos_token="w1").save_pretrained(base)  # stands between documents
    given = ("distil", "--teacher", base, "--student", "half", "--corpus", words, "--card-text", words, "--out", out,
             "--runs", tmp_path / "runs", *SHORT, *QUICK, "--json")  # fmt: skip
    outcome = vesalius(*given)
    told = outcome.json
    assert all(f"training {name}: step 3/3" in outcome.err for name in ("distilled", "control"))
    assert told["change"] == "distil" and told["checkpoint"] == str(out) and told["blocks"] == 1
    hf = AutoModelForCausalLM.from_pretrained(out)
    assert hf.config.num_hidden_layers == 1 and sum(p.numel() for p in hf.parameters()) == told["after"]
    found = card(told)
    assert set(found.index.get_level_values(0)) == {"distilled", "control", "start"}
    assert json.loads((out / "vesalius.json").read_text())["change"] == "distil"
    training = pd.read_parquet(Path(told["run"]) / "training.parquet")
    assert set(training["model"]) == {"distilled", "control"} and training["step"].max() == 3
    assert training[training["model"] == "distilled"]["cosine"].notna().all()
    read = [json.loads(line)["text"] for line in (Path(told["run"]) / "corpus.jsonl").read_text().splitlines()]
    assert len(read) == 58  # the two documents of the card were not learnt from
    assert "The card" in Path(told["report"]).read_text()
    assert vesalius(*given).json == told  # the run and the folder are found again


def test_a_student_from_a_folder_that_holds_other_weights_later(
    random_llama: Path, words: Path, tmp_path: Path
) -> None:
    small, recipe = tmp_path / "small", tmp_path / "student.yaml"
    shutil.copytree(random_llama, small)
    recipe.write_text(
        f"name: student\nmodel: {{source: {small}}}\ndata: {{synthetic: markov}}\nsteps: 1\n"
        "optimizer: {name: adamw, lr: 0.001}\n"
    )
    given = ("distil", "--teacher", random_llama, "--student", recipe, "--corpus", words, "--card-text", words,
             "--steps", "0", "--runs", tmp_path / "runs", *QUICK, "--json")  # fmt: skip
    first = vesalius(*given).json
    assert vesalius(*given).json["run"] == first["run"]
    hf = AutoModelForCausalLM.from_pretrained(small)
    with torch.no_grad():
        hf.lm_head.weight.mul_(2)
    hf.save_pretrained(small)
    assert vesalius(*given).json["run"] != first["run"]


def test_an_encoder_with_sliding_windows_and_half_of_it(bert: Path, news: Path, tmp_path: Path) -> None:
    long, half = tmp_path / "long", tmp_path / "half"
    shared = ("--card-text", news, "--corpus", news, "--runs", tmp_path / "runs", *QUICK, "--json")
    told = vesalius(
        "distil", "--teacher", bert, "--student", "same", "--attention", "longformer", "--window", "128", "--length",
        "160", "--steps", "0", "--out", long, *shared,
    ).json  # fmt: skip
    made = AutoModelForMaskedLM.from_pretrained(long)
    assert type(made).__name__ == "LongformerForMaskedLM" and made.config.max_position_embeddings == 161
    found = card(told)
    # 64 tokens and a window of 64 to each side: what [CLS] reads through its own projections is the same
    assert found.loc[("converted", "perplexity"), "change"] == pytest.approx(1, abs=1e-3)
    assert {"hidden words accuracy", "divergence"} <= {m for _, m in found.index}
    told = vesalius(
        "distil", "--teacher", long, "--student", "2-layers", *SHORT, "--row-length", "150", "--out", half, *shared
    ).json
    assert AutoModelForMaskedLM.from_pretrained(half).config.attention_window == [128, 128]
    assert "hidden words" in told["lead"] and told["before"] > told["after"]


def test_nonsense_is_one_line_and_leaves_nothing(random_llama: Path, bert: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refusal(teacher: Path, *more: object) -> str:
        given = ("--corpus", words, "--card-text", words, "--out", out, "--runs", tmp_path / "runs", *QUICK)
        error = vesalius("distil", "--teacher", teacher, *given, *more).error
        assert not out.exists()
        return error

    assert "--attention fast is none of" in refusal(bert, "--attention", "fast")
    assert "is the teacher itself" in refusal(bert, "--student", "same")
    assert "a Longformer is made of BERT or RoBERTa" in refusal(random_llama, "--attention", "longformer")
    assert "unknown recipe 'hlaf'" in refusal(bert, "--student", "hlaf")
    assert "student of 9 blocks cannot start from 3" in refusal(random_llama, "--student", "9-layers")
    assert "--row-length 128 is more than" in refusal(bert)
    assert "unknown corpus 'fodoc'" in refusal(random_llama, "--corpus", "fodoc")
