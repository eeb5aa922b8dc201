"""`retro serve` is killed, has a full disk, or its files are changed: a clear end or answer, and no wrong text."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import open_service, running, served_run
from test_http import Client, serving, until

from retro_model import cli
from retro_model.core.artifacts import Artifact
from retro_model.serving.watched import WatchedFiles

ASKED = {"prompt": "Gaba fuco dilem norpa que ri", "seed": 3, "max_new_tokens": 30}
LONG = {**ASKED, "max_new_tokens": 480, "temperature": 1.0, "seed": 2}
KINDS = {
    "models/retro": "model",
    "data/chunks/train": "chunks",
    "data/embeddings/train": "embeddings",
    "data/index": "index",
    "data/tokenizer": "tokenizer",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def files_of(root: Path) -> dict[str, tuple[int, int]]:
    """The size and time of every file below."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_after_a_kill_it_serves_again_and_nothing_is_left_behind(root: Path) -> None:
    before = files_of(root)
    with running(root) as server:
        client = Client(server.port)
        expected = client("POST", "/generate", ASKED).json
        connection = client.open("POST", "/generate", {**LONG, "stream": True})
        response = connection.getresponse()
        response.readline()
        server.process.kill()
        server.process.wait()
        assert not list(server.temporary.iterdir()) and files_of(root) == before
        connection.close()
        response.close()
        with running(root, "--port", str(server.port)) as again:
            assert again.port == server.port
            assert client("POST", "/generate", ASKED).json == expected


@pytest.mark.slow
def test_it_writes_no_file_so_a_full_disk_changes_nothing(made: Path) -> None:
    """Every write to a file fails, of live documents too."""
    with serving(open_service(made)) as client:
        expected = client("POST", "/generate", ASKED).json
    with running(made, no_files=True) as server:
        client = Client(server.port)
        assert client("POST", "/generate", ASKED).json == expected
        assert client("POST", "/documents", {"name": "notes", "text": "Gaba fuco"}).status == 201
        assert client("POST", "/neighbors", {"text": "Gaba fuco", "knn": 1}).json["neighbors"][0]["live"] == 1


def test_a_full_disk_under_its_output_is_said_in_one_line(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `retro serve > serve.log` and `retro generate ... > text` have it."""
    monkeypatch.chdir(made)
    for command in (["serve", "--port", "0"], ["generate", "--prompt", "Gaba", "--max-new-tokens", "2"]):
        with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", full)
            assert cli.main([*command, "--device", "cpu"]) == 1
        assert capsys.readouterr().err == "retro: standard output: No space left on device\n"


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x10
    with path.open("r+b") as file:
        file.write(content)


def removed(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("damage", [truncated, changed, removed])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_at_the_start(
    root: Path,
    name: str,
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = largest_file(root, name)
    damage(file)
    monkeypatch.chdir(root)
    assert cli.main(["serve", "--port", "0", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    what = "is missing" if damage is removed else "does not have the bytes that were written"
    assert said.err.startswith(f"retro: {file.relative_to(root)} {what}")


def largest_file(root: Path, name: str) -> Path:
    files = Artifact.open(root / name, KINDS[name]).files
    return max((root / name / file for file in files), key=lambda path: path.stat().st_size)


def served_files(root: Path) -> WatchedFiles:
    return WatchedFiles([Artifact.open(root / name, kind, verify=False) for name, kind in KINDS.items()])


@pytest.mark.parametrize("damage", [truncated, changed, removed, replaced])
@pytest.mark.parametrize("name", ["models/retro", "data/chunks/train", "data/index"])
def test_a_file_that_is_changed_while_it_is_served_ends_the_answers(
    root: Path, name: str, damage: Callable[[Path], None]
) -> None:
    service = open_service(root)
    service.files = served_files(root)
    service.files.check()
    file = largest_file(root, name)
    with serving(service) as client:
        expected = client("POST", "/generate", ASKED)
        assert expected.status == 200
        os.utime(file)  # touched, and the same
        assert client("POST", "/generate", ASKED).json == expected.json
        content = file.read_bytes()
        damage(file)
        for path, asked in (("/generate", ASKED), ("/neighbors", {"text": "Gaba"}), ("/score", {"text": "Gaba"})):
            answer = client("POST", path, asked)
            assert answer.status == 503 and str(file) in answer.json["detail"], answer
            assert answer.json["detail"].endswith("while it was served; start `retro serve` again")
        file.write_bytes(content)  # the maps may be of another file, or of what was there in between
        assert client("POST", "/generate", ASKED).status == 503
        assert client("GET", "/health").status == 200


def test_a_file_that_is_changed_while_text_is_written_ends_the_text(root: Path) -> None:
    """What comes until then is what it would have been, and the last line is an error."""
    service = open_service(root)
    service.files = served_files(root)
    with serving(service) as client:
        whole = client("POST", "/generate", {**LONG, "stream": True}).body.splitlines()
        go_on, retrieve, calls = threading.Event(), service.database.retrieve, []

        def wait(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                go_on.wait(60)
            return retrieve(*arguments)

        service.database.retrieve = wait  # type: ignore[method-assign]
        connection = client.open("POST", "/generate", {**LONG, "stream": True})
        response = connection.getresponse()
        until(lambda: len(calls) == 4)
        changed(largest_file(root, "data/chunks/train"))
        go_on.set()
        *lines, last = response.read().splitlines()
        connection.close()
    assert lines == whole[: len(lines)] and len(lines) > 10
    assert b'"event": "error", "status": 503' in last and b"was changed while it was served" in last


@pytest.mark.slow
def test_weights_that_are_cut_under_a_running_generation_end_it_clearly(root: Path) -> None:
    with running(root) as server:
        client = Client(server.port)
        connection = client.open("POST", "/generate", {**LONG, "stream": True})
        response = connection.getresponse()
        response.readline()
        truncated(root / "models/retro/model.safetensors")
        *_, last = response.read().splitlines()
        connection.close()
        assert b'"status": 503' in last and b"was changed while it was served" in last
        assert server.process.poll() is None and client("POST", "/generate", ASKED).status == 503
