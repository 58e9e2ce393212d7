"""What a run promises: the same request finds it again, and nothing half-written or changed is believed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vesalius.errors import RunError
from vesalius.parts import parse
from vesalius.run_index import find_run, list_runs
from vesalius.runs import Run, request_hash
from vesalius.scores import Scores

REQUEST = {
    "command": "circuit",
    "arguments": {"model": "smollm2-135m", "task": "ioi", "method": "relp", "n": 64},
    "seeds": [0],
    "model_fingerprint": "abc",
    "task_fingerprint": "def",
}
FRAME = pd.DataFrame({"part": ["L0.H1", "L3.MLP"], "score": [0.1 + 0.2, -1e-17], "layer": pd.array([0, None], "Int64")})


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs `code` with REQUEST at hand, and says `ready` when it has set the stage."""
    head = f"import os, sys, time\nfrom vesalius.runs import Run\nREQUEST = {REQUEST!r}\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().strip() == "ready", process.stderr.read()


def stop(process: subprocess.Popen[str], how: int = signal.SIGKILL) -> None:
    process.send_signal(how)
    process.communicate(timeout=20)


# ---- the same request, the same folder


def test_same_request_finds_its_run(tmp_path: Path) -> None:
    with Run.start(REQUEST, tmp_path) as run:
        run.save_table("scores", FRAME)
    shuffled = dict(reversed(list(REQUEST.items())))
    again = Run.start(shuffled, tmp_path)
    assert again.folder == run.folder and again.done
    pd.testing.assert_frame_equal(again.table("scores"), FRAME)
    again.close()
    for change in ({"seeds": [1]}, {"model_fingerprint": "abd"}, {"arguments": {**REQUEST["arguments"], "n": 65}}):  # type: ignore[dict-item]
        other = Run.start({**REQUEST, **change}, tmp_path)
        assert other.folder != run.folder and not other.has("scores")
        other.close()


def test_request_hash_is_of_values_not_types() -> None:
    a = {"path": Path("x/y"), "part": parse("L9.H6"), "k": np.int64(3), "set": {"b", "a"}, "t": (1, 2)}
    b = {"t": [1, 2], "set": ["a", "b"], "k": 3, "part": "L9.H6", "path": "x/y"}
    assert request_hash(a) == request_hash(b)
    assert request_hash({"n": 1}) != request_hash({"n": True}) != request_hash({"n": "1"})
    with pytest.raises(RunError, match="function"):
        request_hash({"f": lambda: 0})


def test_name_is_readable_and_safe(tmp_path: Path) -> None:
    nasty = {"command": "circuit", "arguments": {"model": "wheel:x==0.1/../a b.gguf", "task": "/tmp/my prompts.jsonl"}}
    run = Run.start(nasty, tmp_path)
    assert run.folder.parent == tmp_path and run.folder.is_dir()
    assert run.name.startswith("circuit-a-b.gguf-my-prompts-")
    run.close()


def test_interrupted_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Run.start(REQUEST, tmp_path) as run:
        run.save_table("scores", FRAME)
        with run.stage("prove", total=10) as stage:
            stage.update(4)
            raise KeyboardInterrupt
    assert Run.open(run.folder).state == "interrupted"
    assert json.loads((run.folder / "status.json").read_text())["stage"] == "prove"
    with Run.start(REQUEST, tmp_path) as again:
        assert not again.done and again.has("scores")
        again.save_json("summary", {"accuracy": 1.0})
    assert Run.open(run.folder).state == "done" and Run.open(run.folder).status["attempts"] == 2


def test_failure_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError), Run.start(REQUEST, tmp_path) as run:
        raise ValueError("two\nlines")
    assert Run.open(run.folder).status["error"] == "ValueError: two lines"
    assert Run.open(run.folder).state == "failed"


def test_fresh_forgets_only_its_own_files(tmp_path: Path) -> None:
    with Run.start(REQUEST, tmp_path) as run:
        run.save_table("scores", FRAME)
        run.checkpoint("sweep").put(["a"], np.ones((1, 2)))
    (run.folder / "my notes.txt").write_text("mine")
    with Run.start(REQUEST, tmp_path, fresh=True) as again:
        assert not again.has("scores") and len(again.checkpoint("sweep")) == 0
        assert not (run.folder / "scores.parquet").exists()
    assert (run.folder / "my notes.txt").read_text() == "mine"


def test_everything_stored_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [parse("L0.H1"), parse("L2.MLP")]
    scores = Scores(parts, np.array([0.5, -1.0]), rng.normal(size=(2, 5)), info={"task": "ioi"})
    with Run.start(REQUEST, tmp_path) as run:
        run.save_array("acts", a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.array(["x"]))
        run.save_json("summary", {"x": float("nan"), "n": np.int32(4), "part": parse("L1.H1")})
        run.save_scores("scores", scores)
        run.save_file("circuit.mib.json", lambda p: p.write_text("{}"))
        with pytest.raises(RunError, match="Python objects"):
            run.save_array("bad", a=np.array([object()]))
        for name in ("status", "a/b", "../x", ""):
            with pytest.raises(RunError, match="cannot be the name"):
                run.save_json(name, 1)
    run = Run.open(run.folder)
    assert run.array("acts")["a"].dtype == np.float32 and run.array("acts")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert run.json("summary") == {"x": None, "n": 4, "part": "L1.H1"}
    back = run.scores()
    assert list(back.parts) == list(scores.parts) and back.info == scores.info
    np.testing.assert_array_equal(back.per_example, scores.per_example)
    assert run.files == ["acts.npz", "circuit.mib.json", "scores.json", "scores.parquet", "summary.json"]
    with pytest.raises(RunError, match="scores.parquet"):
        run.table("score")
    with pytest.raises(RunError, match="not open for writing"):
        run.save_json("summary", {})


# ---- what is not believed


def test_kill_in_mid_write_leaves_nothing_believed(tmp_path: Path) -> None:
    process = child(
        """
        run = Run.start(REQUEST, sys.argv[1])
        run.save_json("first", [1, 2, 3])
        def slow(path):
            with path.open("wb") as handle:
                handle.write(b"half of it"); handle.flush()
                print("ready", flush=True)
                time.sleep(60)
        run.save_file("second.bin", slow)
        """,
        tmp_path,
    )
    wait_ready(process)
    stop(process)
    (folder,) = tmp_path.iterdir()
    assert (folder / "second.bin.part").exists()  # the kill did come in the middle
    seen = Run.open(folder)
    assert seen.state == "interrupted" and seen.has("first") and not seen.has("second.bin")
    with Run.start(REQUEST, tmp_path) as run:
        assert run.json("first") == [1, 2, 3] and not run.has("second.bin")
        assert not list(folder.glob("*.part"))


def test_file_renamed_but_not_listed_is_not_believed(tmp_path: Path) -> None:
    with Run.start(REQUEST, tmp_path) as run:
        run.save_json("first", 1)
    (run.folder / "second.json").write_text("2")  # the kill came between the rename and the manifest
    assert not Run.open(run.folder).has("second")
    with pytest.raises(RunError, match="holds no second.json"):
        Run.open(run.folder).json("second")


@pytest.mark.parametrize("harm", ["change", "truncate", "remove", "unlist", "manifest"])
def test_tampering_is_noticed(tmp_path: Path, harm: str) -> None:
    with Run.start(REQUEST, tmp_path) as run:
        run.save_table("scores", FRAME)
        run.save_json("summary", {"accuracy": 0.5})
    path = run.folder / "summary.json"
    if harm == "change":
        path.write_text(path.read_text().replace("0.5", "0.9"))  # the same size
    elif harm == "truncate":
        path.write_bytes(path.read_bytes()[:-3])
    elif harm == "remove":
        path.unlink()
    elif harm == "unlist":
        manifest = json.loads((run.folder / "manifest.json").read_text())
        del manifest["files"]["summary.json"]
        (run.folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        (run.folder / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"summary\.json|manifest\.json") as caught:
        Run.open(run.folder).json("summary")
    assert "\n" not in str(caught.value) and "again" in str(caught.value)
    with pytest.raises(RunError):
        Run.open(run.folder).has("summary")  # not to be taken for "not measured"
    with Run.start(REQUEST, tmp_path) as again:
        assert not again.done and not again.has("summary")
        assert again.has("scores") == (harm != "manifest")
        again.save_table("scores", FRAME)
        again.save_json("summary", {"accuracy": 0.5})
    assert Run.open(run.folder).done and Run.open(run.folder).json("summary") == {"accuracy": 0.5}


def test_changed_request_is_refused(tmp_path: Path) -> None:
    with Run.start(REQUEST, tmp_path) as run:
        run.save_json("summary", 1)
    (run.folder / "request.json").write_text(json.dumps({**REQUEST, "seeds": [7]}))
    with pytest.raises(RunError, match=r"request"):
        Run.open(run.folder)
    with pytest.raises(RunError, match=r"request\.json"):
        Run.start(REQUEST, tmp_path)
    Run.start(REQUEST, tmp_path, fresh=True).close()


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    process = child(
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = Run.start(REQUEST, sys.argv[1])
        run.save_json("summary", [0] * 10)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            run.save_json("summary", [1] * 10000)
        except Exception as error:
            print(type(error).__name__, error)
        """,
        tmp_path,
    )
    said = process.communicate(timeout=30)[0]
    assert said.startswith("RunError cannot write") and "summary.json" in said and len(said.splitlines()) == 1
    (folder,) = tmp_path.iterdir()
    assert Run.open(folder).json("summary") == [0] * 10 and not list(folder.glob("*.part"))


# ---- refusals


def test_unwritable_places(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="is a file.*--out"):
        Run.start(REQUEST, file)
    with pytest.raises(RunError, match="--out"):
        Run.start(REQUEST, file / "below")
    if Path("/proc/self").exists():  # where not even root can make a folder
        with pytest.raises(RunError, match="cannot write runs in /proc/vesalius.*--out"):
            Run.start(REQUEST, "/proc/vesalius")
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(RunError, match="cannot write runs in .*--out"):
            Run.start(REQUEST, closed)
    assert file.read_text() == ""


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    process = child('run = Run.start(REQUEST, sys.argv[1])\nprint("ready", flush=True)\ntime.sleep(60)', tmp_path)
    wait_ready(process)
    with pytest.raises(RunError, match=f"is being written by process {process.pid} "):
        Run.start(REQUEST, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert Run.open(folder).state == "running"
    assert list_runs(tmp_path)["state"].tolist() == ["running"]
    other = Run.start({**REQUEST, "seeds": [1]}, tmp_path)  # another request is free to go
    other.close()
    stop(process)
    assert Run.open(folder).state == "interrupted"
    taken = Run.start(REQUEST, tmp_path)  # the dead process's run is taken over
    assert taken.state == "running" and taken.status["pid"] == os.getpid()
    with pytest.raises(RunError, match="this Python process"):
        Run.start(REQUEST, tmp_path)
    taken.close()


def test_ctrl_c_is_recorded_by_the_process_itself(tmp_path: Path) -> None:
    process = child(
        'with Run.start(REQUEST, sys.argv[1]) as run:\n    with run.stage("sweep"):\n'
        '        run.checkpoint("s").put(["a"], [[1.5]])\n        print("ready", flush=True)\n        time.sleep(60)\n',
        tmp_path,
    )
    wait_ready(process)
    stop(process, signal.SIGINT)
    (folder,) = tmp_path.iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["stage"]) == ("interrupted", "sweep")
    assert Run.open(folder).checkpoint("s").get(["a"])["a"].tolist() == [1.5]


# ---- checkpoints


def test_checkpoint_gives_back_exactly_what_was_put_before_a_crash(tmp_path: Path) -> None:
    process = child(
        """
        import numpy as np
        run = Run.start(REQUEST, sys.argv[1])
        ck = run.checkpoint("sweep")
        for i in range(100000):
            ck.put([f"L{i}.H0", f"L{i}.H1"], np.random.default_rng(i).normal(size=(2, 7)).astype(np.float32))
            print("ready" if i == 5 else i, flush=True) if i >= 5 else None
        """,
        tmp_path,
    )
    wait_ready(process)
    time.sleep(0.05)
    stop(process)
    with Run.start(REQUEST, tmp_path) as run:
        ck = run.checkpoint("sweep")
        n = len(ck) // 2
        assert n >= 6 and len(ck) == 2 * n and ck.ignored == 0  # whole chunks, no gaps
        for i in range(n):
            want = np.random.default_rng(i).normal(size=(2, 7)).astype(np.float32)
            found = ck.get([f"L{i}.H0", f"L{i}.H1"])
            got = np.stack([found[f"L{i}.H0"], found[f"L{i}.H1"]])
            assert got.dtype == want.dtype and got.tobytes() == want.tobytes()
        assert ck.missing([f"L{n - 1}.H0", f"L{n}.H0"]) == [f"L{n}.H0"]


def test_checkpoint_chunks_are_checked_and_bound_to_the_request(tmp_path: Path) -> None:
    with Run.start(REQUEST, tmp_path) as run:
        ck = run.checkpoint("sweep")
        buffer = np.array([[1.0, np.nan], [np.inf, -0.0]])
        ck.put([parse("L0.H0"), "b"], buffer)
        buffer[:] = 9  # the caller's array is not kept
        ck.put(["c"], [[3.0]])
        ck.put(["b"], [[5.0]])
        assert np.array_equal(ck.get(["L0.H0"])["L0.H0"], [1.0, np.nan], equal_nan=True)
        for keys, values in ((["x", "y"], [[1.0]]), (["x"], [[1]]), (["x"], [["t"]])):
            with pytest.raises(RunError, match="array of floats"):
                ck.put(keys, values)
    again = Run.open(run.folder).checkpoint("sweep")
    assert again.get(["b", "c"])["b"].tolist() == [5.0]  # the later value
    files = sorted(again.folder.glob("*.npz"))
    files[1].write_bytes(files[1].read_bytes()[:-20])
    torn = Run.open(run.folder).checkpoint("sweep")
    assert torn.ignored == 1 and torn.missing(["L0.H0", "b", "c"]) == ["c"]
    with Run.start({**REQUEST, "seeds": [1]}, tmp_path) as other:
        folder = other.folder / "checkpoints" / "sweep"
        folder.mkdir(parents=True)
        (folder / files[0].name).write_bytes(files[0].read_bytes())  # copied over from the other request
        foreign = other.checkpoint("sweep")
        assert len(foreign) == 0 and foreign.ignored == 1


# ---- finding and listing


def test_find_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for seed in range(2):
        with Run.start({**REQUEST, "seeds": [seed]}, tmp_path) as run:
            folders.append(run.folder)
        time.sleep(0.002)
    roots = [tmp_path]
    assert find_run(str(folders[0]), []).folder == folders[0]
    assert find_run(folders[0].name, roots).folder == folders[0]
    assert find_run(folders[1].name[-10:-4], roots).folder == folders[1]
    assert find_run("last", roots).folder == folders[1]
    with Run.start({**REQUEST, "seeds": [0]}, tmp_path):
        pass  # asked for again: that is the last one now
    assert find_run("last", roots).folder == folders[0]
    (folders[1] / "lens.json").write_text("{}")
    assert find_run("last", roots, "lens.json").folder == folders[1]
    assert find_run("circuit-smol", roots, "lens.json").folder == folders[1]
    with pytest.raises(RunError, match="no run in .* holds sae.json"):
        find_run("last", roots, "sae.json")
    with pytest.raises(RunError, match="any of 2 runs"):
        find_run("circuit-smol", roots)
    with pytest.raises(RunError, match=f"nearest: .*{folders[0].name}"):
        find_run("circuit-smolm-135m-ioi", roots)
    with pytest.raises(RunError, match="no runs in"):
        find_run("last", [tmp_path / "none"])


def test_list_runs_shows_headlines_and_damage(tmp_path: Path) -> None:
    with Run.start(REQUEST, tmp_path) as run:
        run.save_json("summary", {"accuracy": 0.98, "faithfulness": {"mean": 0.86}, "size": {"heads": 34, "mlps": 12}})
    with pytest.raises(ValueError), Run.start({**REQUEST, "seeds": [1]}, tmp_path):
        raise ValueError("boom")
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "request.json").write_text("{")
    frame = list_runs(tmp_path).set_index("state")
    assert sorted(frame.index) == ["damaged", "done", "failed"]
    done = frame.loc["done"]
    assert (done["model"], done["task"], done["method"]) == ("smollm2-135m", "ioi", "relp")
    assert (done["accuracy"], done["faithfulness"], done["heads"]) == (0.98, 0.86, 34)
    assert frame.loc["failed", "error"] == "ValueError: boom"
    assert list_runs(tmp_path / "none").empty
