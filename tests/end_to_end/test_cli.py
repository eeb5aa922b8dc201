"""The command `retro`, as a user types it: what it prints, what it says when it cannot, and how it ends."""

import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from small_run import STORED, small_run, write_data, write_model

from retro_model.cli import main
from retro_model.core.artifacts import Artifact
from retro_model.corpus.chunks import chunk_text
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.inference.retriever import Retriever


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = small_run(tmp_path_factory.mktemp("run"))
    (root / "params.yaml").write_text(yaml.safe_dump({"embed": {"encoder": "encoder"}}))
    return root


@pytest.fixture
def run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that succeeds."""
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("retro: ") and captured.err.count("\n") == 1
    return captured.err


# ---- neighbors -------------------------------------------------------------------------------------


def test_a_stored_chunk_is_shown_with_what_was_found_for_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "neighbors", "--split", "valid", "--chunk", "3", "--knn", "5")
    chunks, train = (Artifact.open(f"data/chunks/{split}", "chunks") for split in ("valid", "train"))
    neighbors = Artifact.open("data/neighbors/valid", "neighbors")
    tokenizer = Tokenizer.open("data/tokenizer")
    (text,) = chunk_text(tokenizer, chunks["tokens"][3:4][:, :-1])
    flat = " ".join(out.split())
    assert out.startswith("valid chunk 3: ") and " ".join(text.split()) in flat
    distances = [float(found) for found in re.findall(r"^\d\. distance ([\d.]+), \S+\.txt", out, flags=re.MULTILINE)]
    assert distances == pytest.approx(neighbors["distances"][3][:5].tolist(), abs=1e-4)
    for row in neighbors["ids"][3][:5]:
        (found,) = chunk_text(tokenizer, train["tokens"][row : row + 1][:, :-1])
        assert " ".join(found.split()) in flat


def test_a_text_finds_live_what_the_retriever_finds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Gaba fuco dilem"
    out = said(capsys, "neighbors", "--text", text, "-k", "3")
    found = Retriever.open("data", encoder="encoder").retrieve_text([text], 3)
    distances = [float(each) for each in re.findall(r"^\d\. distance ([\d.]+)", out, flags=re.MULTILINE)]
    assert distances == pytest.approx(found.distances[0].tolist(), abs=1e-4)
    assert out.startswith(f"text\n   {text}\n")


def test_control_characters_of_a_text_do_not_reach_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "neighbors", "--text", "a\x1b[31mb\rc", "-k", "1")
    assert "\x1b" not in out and "\r" not in out and "a\N{SYMBOL FOR ESCAPE}[31mb" in out


def test_names_of_documents_reach_the_terminal_as_one_printable_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of chunks that were made elsewhere, whatever wrote them."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "copy"))
    for split in ("train", "valid"):
        for table in Path(f"data/chunks/{split}").glob("documents-*.jsonl"):
            entries = [json.loads(line) for line in table.read_text().splitlines()]
            hostile = [json.dumps({**entry, "source": "a\x1b[31m\x07\nforged: b.txt"}) for entry in entries]
            table.unlink()
            table.write_text("\n".join(hostile) + "\n")
    out = said(capsys, "neighbors", "--split", "valid", "--chunk", "3", "--knn", "2")
    assert out.startswith("valid chunk 3: a\u241b[31m\u2407\u240aforged: b.txt, chunk ")
    assert re.search(r"^1\. distance [\d.]+, a\u241b\[31m\u2407\u240aforged: b.txt, chunk", out, flags=re.MULTILINE)
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", out)


# ---- generate --------------------------------------------------------------------------------------

GENERATE = ("generate", "--prompt", "Gaba fuco di", "--max-new-tokens", "20")


def test_what_is_written_follows_the_prompt_and_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = said(capsys, *GENERATE), said(capsys, *GENERATE, "--seed", "0")
    assert first == again and first.startswith("Gaba fuco di") and len(first) > 14
    assert said(capsys, *GENERATE, "--seed", "1") != first
    greedy = said(capsys, *GENERATE, "--temperature", "0")
    assert (
        greedy == said(capsys, *GENERATE, "--top-k", "1", "--seed", "9") == said(capsys, *GENERATE, "--top-p", "1e-9")
    )


def test_retrieval_can_be_left_out_and_changes_what_is_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = (*GENERATE, "--temperature", "0")
    without = said(capsys, *greedy, "--knn", "0")
    assert without != said(capsys, *greedy)
    assert "Gaba" in said(capsys, *greedy, "--model", "models/baseline", "--data", "nowhere")


def test_neighbors_are_shown_at_each_boundary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Gaba fuco dilem norpa que ri"
    out = said(capsys, *GENERATE, "--prompt", prompt, "--show-neighbors", "--temperature", "0", "--knn", "3")
    plain = said(capsys, *GENERATE, "--prompt", prompt, "--temperature", "0", "--knn", "3")
    tokenizer = Tokenizer.open("data/tokenizer")
    length = 1 + len(tokenizer.encode(prompt)) + 20
    finished = (min(length, 32) - 1) // 8  # the last token that is written is not read
    blocks = re.findall(r"retrieved with chunk (\d+) of this text", out)
    assert blocks == [str(number) for number in range(1, finished + 1)] and finished >= 3
    assert out.count("| 1. distance") == finished and out.count("| 3. distance") == finished
    text = re.sub(r"\n\n(?:  \| [^\n]*\n)+\n", "", out)
    assert text == plain


def test_whole_characters_come_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(4):
        out = said(
            capsys, *GENERATE, "--temperature", "5", "--top-p", "1", "--seed", str(seed), "--max-new-tokens", "26"
        )
        out.encode()


def test_control_characters_of_a_prompt_do_not_reach_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, "generate", "--prompt", "a\x1b[31mb\tc\nd", "--max-new-tokens", "1")
    assert out.startswith("a\N{SYMBOL FOR ESCAPE}[31mb\tc\nd")


def standard_input(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii")


@pytest.mark.usefixtures("run")
def test_a_prompt_comes_from_standard_input_whatever_its_encoding_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", standard_input("Gab\xe4\r\nfuco".encode()))
    assert said(capsys, "generate", "--prompt", "-", "--max-new-tokens", "1").startswith("Gab\xe4\nfuco")


@pytest.mark.usefixtures("run")
def test_a_terminal_that_cannot_show_a_character_shows_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, shown in (
        (("neighbors", "--text", "Gab\xe4 \u4e2d"), b"text\n   Gab? ?\n"),
        (("generate", "--prompt", "Gab\xe4 \u4e2d", "--max-new-tokens", "1"), b"Gab? ?"),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert main(arguments) == 0
        assert written.getvalue().startswith(shown)


# ---- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("neighbors", "--chunk", "99999"), "--chunk: found 99999, expected 0 to "),
        (("neighbors", "--chunk", "1", "-k", "99"), f"--knn: found 99, expected at most {STORED}"),
        (("neighbors", "--text", " "), "--text: found no text"),
        (("neighbors", "--text", "a", "--encoder", "models/retro"), "models/retro"),
        (("generate", "--prompt", "a b c d e f g h i j k l m n o p q r s t u v w x y z"), "expected fewer than the 32"),
        (("generate", "--prompt", "a", "--model", "models/baseline", "-k", "2"), "models/baseline has no retrieval"),
        (("generate", "--prompt", "a", "--knn", "0", "--show-neighbors"), "nothing is retrieved here"),
        (("generate", "--prompt", "a", "--model", "data/index"), "expected retro/model, found retro/index"),
        (("serve", "--model", "models/baseline"), "models/baseline has no retrieval"),
        (("serve", "--host", "192.0.2.1"), "--host, --port: cannot listen on 192.0.2.1, port 8000"),
        (("serve", "--port", "0", "--encoder", "models/retro"), "models/retro"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *arguments)


NOT_UTF8 = "found byte 0xe9 at position 3, expected text in UTF-8"


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("arguments", [("neighbors", "--text"), ("generate", "--prompt")])
def test_an_argument_that_is_not_utf8_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert refused(capsys, *arguments, os.fsdecode(b"caf\xe9")) == f"retro: {arguments[1]}: {NOT_UTF8}\n"


@pytest.mark.usefixtures("run")
def test_a_standard_input_that_is_not_utf8_or_closed_or_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", standard_input(b"caf\xe9"))
    assert f"--prompt, standard input: {NOT_UTF8}" in refused(capsys, "generate", "--prompt", "-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "--prompt: standard input is closed" in refused(capsys, "generate", "--prompt", "-")
    with io.TextIOWrapper(io.BufferedReader(_Broken())) as broken:
        monkeypatch.setattr(sys, "stdin", broken)
        assert "standard input cannot be read (Is a directory)" in refused(capsys, "generate", "--prompt", "-")


class _Broken(io.RawIOBase):
    """A directory as standard input, as the shell gives it."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        raise IsADirectoryError(errno.EISDIR, "Is a directory")


@pytest.mark.usefixtures("run")
def test_params_that_are_no_yaml_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads them for the encoder, which may be a folder."""
    monkeypatch.setattr("retro_model.cli.PARAMS_FILE", tmp_path / "broken.yaml")
    (tmp_path / "broken.yaml").write_text("embed: [1, 2\n", encoding="utf-8")
    assert "broken.yaml: not valid YAML" in refused(capsys, "neighbors", "--text", "a")


def test_before_the_pipeline_has_run_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run `dvc repro`" in refused(capsys, "neighbors", "--text", "a")


def test_a_model_of_other_data_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(run, tmp_path / "data", vocab_size=380, search=False)
    write_model(tmp_path / "model", data, retrieval=True)
    line = refused(capsys, "generate", "--prompt", "a", "--model", str(tmp_path / "model"))
    assert "its tokenizer is not that of data" in line and "dvc repro" in line


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("neighbors",),
        ("neighbors", "--chunk", "-1"),
        ("neighbors", "--chunk", "1", "--text", "a"),
        ("generate", "--prompt", "a", "--temperature", "-1"),
        ("generate", "--prompt", "a", "--top-p", "0"),
        ("generate", "--prompt", "a", "--top-p", "0.5", "--top-k", "3"),
        ("generate", "--prompt", "a", "--max-new-tokens", "many"),
        ("serve", "--port", "65536"),
        ("serve", "--queue", "-1"),
    ],
)
def test_wrong_arguments_are_told_by_usage(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: retro" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--help",), ("neighbors", "--help"), ("generate", "--help"), ("serve", "--help")]
)
def test_help_explains_itself(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.startswith("usage: retro")
    assert "default:" in out or "retro generate --prompt" in out


def test_a_port_in_use_and_a_damaged_model_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in refused(capsys, "serve", "--port", str(port))
    shutil.copytree(run / "models/retro", tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "sha256 differs" in refused(capsys, "serve", "--port", "0", "--model", str(tmp_path / "model"))


# ---- as a process ----------------------------------------------------------------------------------


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys, contextlib\nfrom retro_model.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print(sorted({'torch', 'faiss', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_went_away_ends_it_without_a_word(finished: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # before a byte is written: the first write fails
    done = subprocess.run(
        [sys.executable, "-m", "retro_model", "neighbors", "--chunk", "1"],
        cwd=finished,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def closing(arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    """The command in a shell, which closes what `arguments` says."""
    return subprocess.run(
        ["bash", "-c", f"{sys.executable} -m retro_model {arguments}"],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_into_a_closed_pipe_ends_without_a_word() -> None:
    """The parser prints it and ends the program, so it is written when the program has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "retro_model", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    found = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, b"")


def test_closed_streams_are_one_line_or_none(finished: Path) -> None:
    done = closing("generate --prompt - <&-", finished)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "standard input is closed" in done.stderr
    done = closing("neighbors --chunk 1 >&-", finished)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "retro: standard output is closed\n")
    done = closing("neighbors --chunk 99999 2>&-", finished)
    assert (done.returncode, done.stdout) == (1, "")


def test_an_interrupt_ends_it_with_130(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def interrupted(logits: object, **options: object) -> object:
        written.append(logits)
        raise KeyboardInterrupt

    monkeypatch.setattr("retro_model.inference.generation.sample", interrupted)
    assert main(GENERATE) == 130 and len(written) == 1
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == "Gaba fuco di"


def test_serve_answers_until_it_is_interrupted_and_ends_at_once(finished: Path) -> None:
    """Even while a generation runs."""
    server = subprocess.Popen(
        [sys.executable, "-m", "retro_model", "serve", "--port", "0"],
        cwd=finished,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        found = re.fullmatch(r"serving models/retro at (http://127\.0\.0\.1:\d+)/ .*\n", server.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(f"{found[1]}/health", timeout=120) as answer:
            assert json.loads(answer.read())["status"] == "ok"
        body = json.dumps({"prompt": "Gaba", "stream": True}).encode()
        asked = urllib.request.Request(f"{found[1]}/generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as stream:
            stream.readline()
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=120)
        assert (server.returncode, out, err) == (130, "", "")
    finally:
        server.kill()
        server.wait()


def test_the_entry_point_is_this_command() -> None:
    assert 'retro = "retro_model.cli:main"' in (ROOT / "pyproject.toml").read_text()
