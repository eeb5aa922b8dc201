"""What comes from outside, text, files, names, is data: it is never run, and it reaches no other place.

First rules over the code, read as syntax trees, that no linter has; ruff holds the others (pyproject.toml).
Then hostile files. Last, what the whole pipeline does on this machine, seen by audit events.
"""

import ast
import configparser
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import tiny_corpus, tiny_encoder
from paths import ROOT
from stagewise import contents, copy_of, run, write_params

import stages
from retro_model import RETRO
from retro_model.core.artifacts import Artifact, file_digest, write_description
from retro_model.core.errors import DamagedArtifactError, RetroError, SourceError
from retro_model.corpus.files import find_files
from retro_model.corpus.readers import read_entries
from retro_model.corpus.tokenizer import load
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.encoder import Encoder

CODE = sorted(path for folder in ("retro_model", "stages", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


# ---- rules over the code ---------------------------------------------------------------------------


def dotted(node: ast.expr) -> str:
    """The name of what is called: `np.load`, `AutoModel.from_pretrained`; "" where it has none."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def literal(call: ast.Call, name: str) -> object:
    """The constant that a call gives to a keyword; ... where it gives none."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else ...


# What a call must look like: a name, and what is wrong with a call of that name.
RULES: list[tuple[str, Callable[[ast.Call], bool]]] = [
    (r"(np|numpy)\.(load|save)|.*\.write_array", lambda call: literal(call, "allow_pickle") is not False),
    # faiss and numpy write through files of C, and a disk that is full at their last buffer goes unnoticed
    (r"np\.save", lambda call: True),
    (r".*\.write_index", lambda call: "PyCallbackIOWriter" not in ast.unparse(call.args[1])),
    (r"(np|numpy)\.(memmap|lib\.format\.open_memmap)", lambda call: literal(call, "mode") != "r"),
    (r"Auto\w+\.from_pretrained", lambda call: literal(call, "trust_remote_code") is not False),
    (r"AutoModel\w*\.from_pretrained", lambda call: literal(call, "use_safetensors") is not True),
    (r".*\btorch\.(load|save)", lambda call: True),
    (r"mlflow\.(pytorch|pyfunc|sklearn)\..*", lambda call: True),  # would pickle a model
    (r"os\.(system|popen|exec\w*|spawn\w*)", lambda call: True),
    (r"subprocess\.\w+", lambda call: literal(call, "shell") is not ... or isinstance(call.args[0], ast.Constant)),
    (r"(yaml\.(load|unsafe_load|full_load)|eval|exec|compile|__import__)", lambda call: True),
    (r".*\.(extractall|extract|unpack_archive)", lambda call: True),
]


def breaches(source: str) -> list[str]:
    """The calls in a piece of code that break a rule."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"line {call.lineno}: {dotted(call.func)}"
        for call in calls
        for pattern, wrong in RULES
        if re.fullmatch(pattern, dotted(call.func)) and wrong(call)
    ]


@pytest.mark.parametrize("file", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_call_can_run_what_it_reads(file: Path) -> None:
    assert breaches(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.save(path, array, allow_pickle=False)",
        "faiss.write_index(index, str(path))",
        "np.memmap(path, dtype)",
        "np.memmap(path, mode='r+')",
        "AutoTokenizer.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)",
        "torch.load(path, weights_only=True)",
        "torch.save(model, path)",
        "mlflow.pytorch.log_model(model, 'model')",
        "os.system('ls')",
        "subprocess.run('ls', check=True)",
        "subprocess.run(['ls'], shell=True)",
        "yaml.load(text)",
        "eval(text)",
        "archive.extractall(folder)",
    ],
)
def test_the_rules_see_what_they_forbid(source: str) -> None:
    assert len(breaches(source)) == 1


# ---- hostile files ---------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Path]:
    """The file that a bomb would write."""
    path = tmp_path / "exploded"
    yield path
    assert not path.exists(), "a pickle was loaded"


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def rewritten(folder: Path, name: str) -> None:
    """The description of an artifact with the digest that its file has now: as if it had been written so."""
    description = json.loads((folder / "artifact.json").read_text())
    del description["digest"]
    description["sha256"][name] = file_digest(folder / name)
    write_description(folder, description)


def test_an_array_of_objects_is_no_shard(pipeline: Path, tmp_path: Path, fuse: Path) -> None:
    folder = Path(shutil.copytree(pipeline / "data/chunks/train", tmp_path / "chunks"))
    (folder / "tokens-00000.npy").unlink()  # it is read-only
    np.save(folder / "tokens-00000.npy", np.array([Bomb(fuse)], dtype=object), allow_pickle=True)
    rewritten(folder, "tokens-00000.npy")
    with pytest.raises(DamagedArtifactError, match=r"tokens-00000.npy cannot be read"):
        Artifact.open(folder, "chunks")["tokens"][0]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "of torch"])
def test_a_pickle_is_no_model(pipeline: Path, tmp_path: Path, fuse: Path, zipped: bool) -> None:
    folder = Path(shutil.copytree(pipeline / "models/retro", tmp_path / "model"))
    if zipped:
        torch.save({"weight": Bomb(fuse)}, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(RetroError, match=r"model.safetensors cannot be read"):
        RETRO.from_pretrained(folder)


def test_a_pickle_is_no_checkpoint(tmp_path: Path, fuse: Path) -> None:
    """Also where whoever put it there made the digests fit."""
    from retro_model.training.checkpoints import Checkpoints, TrainingState, _write_state

    checkpoints = Checkpoints(tmp_path / "checkpoints", "x")
    tensors = {"weight": torch.ones(2)}
    path = checkpoints.save(TrainingState(step=1), tensors, tensors, {})
    assert checkpoints.load() is not None
    torch.save({"weight": Bomb(fuse)}, path / "weights.safetensors")
    with pytest.raises(DamagedArtifactError, match="does not have the bytes that were written; delete"):
        checkpoints.load()
    (path / "state.json").unlink()
    _write_state(path, "x", TrainingState(step=1), None)
    with pytest.raises(DamagedArtifactError, match="cannot be read"):
        checkpoints.load()


def test_an_encoder_that_is_a_pickle_is_not_unpickled(tmp_path: Path, fuse: Path) -> None:
    folder = tiny_encoder(tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(fuse)}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"model.safetensors \(no pickle\)") as caught:
        Encoder.open(EmbedConfig(encoder=str(folder)))
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_an_encoder_or_tokenizer_is_not_run(tmp_path: Path, fuse: Path) -> None:
    folder = tiny_encoder(tmp_path / "encoder")
    (folder / "evil.py").write_text(f"import os\nos.system('touch {fuse}')\nclass Evil: pass\n")
    for name, classes in (("config.json", {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}),
                          ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]})):  # fmt: skip
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": classes}))
    for opened in (lambda: Encoder.open(EmbedConfig(encoder=str(folder))), lambda: load(str(folder))):
        try:
            opened()
        except SourceError as error:
            assert "\n" not in str(error)


def test_an_artifact_names_no_file_outside_its_folder(pipeline: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("../secret", "/etc/hostname", "a/../../secret")):
        folder = Path(shutil.copytree(pipeline / "data/tokenizer", tmp_path / str(number)))
        (tmp_path / "secret").write_text("x")
        description = json.loads((folder / "artifact.json").read_text())
        del description["digest"]
        description["sha256"][name] = file_digest(tmp_path / "secret")
        write_description(folder, description)
        with pytest.raises(DamagedArtifactError, match="outside"):
            Artifact.open(folder, "tokenizer")


def test_archives_are_read_and_never_unpacked(tmp_path: Path) -> None:
    """A .zip is no document; a .gz is a stream, whatever name it says that its content had."""
    import gzip

    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("../../escaped.txt", "words")
    with (
        (tmp_path / "a.jsonl.gz").open("wb") as file,
        gzip.GzipFile("../../escaped.jsonl", "wb", fileobj=file) as stream,
    ):
        stream.write(b'{"text": "words"}\n')
    found = find_files(tmp_path)
    assert (found.files, found.other_files) == ([(tmp_path / "a.jsonl.gz", "a.jsonl.gz")], 1)
    assert [entry.text for entry in read_entries(found.files[0][0], "a", "text", None)] == ["words"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "texts.zip"]


HOSTILE_NAMES = (
    "$(touch exploded).txt",
    "; touch exploded.txt",
    "`touch exploded`.md",
    "-rf.txt",
    "a\nb.txt",
    "'\"<b>.txt",
)


@pytest.mark.slow
def test_names_and_texts_of_documents_reach_neither_a_shell_nor_a_page(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through every stage, to the report."""
    monkeypatch.chdir(copy_of(pipeline, tmp_path / "copy"))
    documents = tiny_corpus(Path("tiny/$(touch exploded) & texts"))
    for number, name in enumerate(HOSTILE_NAMES):
        script = f"<script>alert({number})</script><img src=x onerror=alert(1)> $(touch exploded) " * 40
        (documents / name).write_text(script + f"ba co di {number}. " * 40)
    write_params(Path.cwd(), documents=documents.as_posix(), corpus__valid=0.3, corpus__test=0.3,
                 corpus__near_duplicates=0.0, evaluate__max_chunks=None, evaluate__passages=40)  # fmt: skip
    for stage in ("tokenizer", "chunk", "embed", "index", "knn", "baseline", "train", "evaluate"):
        run(stage)
    page = Path("reports/evaluate.html").read_text()
    assert "alert(" in page or "&lt;script" in page or "touch exploded" in page, (
        "hostile text must be shown to prove this"
    )
    assert "<script" not in page and "<img" not in page and "onerror=alert(1)>" not in page
    assert not list(Path.cwd().rglob("exploded"))


# ---- what runs, seen from outside ------------------------------------------------------------------


def test_nothing_that_was_written_is_a_pickle(pipeline: Path) -> None:
    """Data, models, and what went to MLflow."""
    found = contents(pipeline)
    written = {name: content for name, content in found.items() if name.split("/")[0] not in ("retro_model", "stages")}
    assert len(written) > 50 and any(name.startswith("mlartifacts") for name in written)
    for name, content in written.items():
        assert not name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")), name
        if not (name.endswith(".safetensors") and content[8:9] == b"{"):  # begins with the length of its JSON
            assert not re.match(rb"\x80[\x02-\x05]", content), f"{name} begins like a pickle"
        assert not zipfile.is_zipfile(io.BytesIO(content)), f"{name} is an archive, as torch.save writes"
        if name.endswith(".npy"):
            assert b"'|O'" not in content[:128], f"{name} holds objects"


WATCHED = ("pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "os.system", "subprocess.Popen")
SEEN: list[tuple[str, tuple[object, ...]]] = []
_watching = False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in WATCHED:
        SEEN.append((event, arguments))


@pytest.fixture
def watched() -> Iterator[list[tuple[str, tuple[object, ...]]]]:
    """The watched events of the test, as they come. An audit hook cannot be taken off, so it is put to sleep."""
    global _watching
    if not hasattr(sys, "_retro_watches"):
        sys._retro_watches = True  # type: ignore[attr-defined]
        sys.addaudithook(_watch)
    SEEN.clear()
    _watching = True
    yield SEEN
    _watching = False


@pytest.mark.parametrize(
    "stage", ["sample", "tokenizer", "chunk", "embed", "index", "knn", "baseline", "train", "evaluate"]
)
def test_a_stage_opens_no_connection_loads_no_pickle_and_starts_nothing_but_git(
    stage: str,
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watched: list[tuple[str, tuple[object, ...]]],
) -> None:
    monkeypatch.chdir(copy_of(pipeline, tmp_path / "copy"))
    run(stage)
    started = [arguments[1] for event, arguments in watched if event == "subprocess.Popen"]
    assert all(isinstance(command, list) and command[0] == "git" for command in started), started
    assert [seen for seen in watched if seen[0] != "subprocess.Popen"] == []


def test_the_watch_sees(watched: list[tuple[str, tuple[object, ...]]]) -> None:
    import socket

    pickle.loads(pickle.dumps(Path("x")))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
    assert {event for event, _ in watched} == {"pickle.find_class", "socket.bind"}


def test_dvc_and_mlflow_call_nobody() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc" / "config")
    core = {key.strip(): value for key, value in config["core"].items()}
    assert core["analytics"] == "false" and core["check_update"] == "false"
    assert not [section for section in config.sections() if "remote" in section], "no remote comes with the repository"
    program = (
        "import os, stages.tracking.runs\n"
        "print(*(os.environ.get(name) for name in "
        "('MLFLOW_DISABLE_TELEMETRY', 'DO_NOT_TRACK', 'HF_HUB_DISABLE_TELEMETRY', 'RAY_USAGE_STATS_ENABLED')))"
    )
    bare = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=bare, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["true", "true", "1", "0"]
    assert stages.__doc__


def test_ray_is_joined_and_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project opens no dashboard and no port: it connects to a cluster that somebody started."""
    from retro_model.jobs.engine import Engine, EngineConfig

    ray = pytest.importorskip("ray")
    given: dict[str, object] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **arguments: (given.update(arguments), _refuse())[0])

    with pytest.raises(RetroError, match="no Ray cluster"), Engine(EngineConfig(engine="ray")).open(None):  # type: ignore[arg-type]
        pass
    assert given["address"] == "auto"
    with pytest.raises(RetroError, match="ray_address"):
        EngineConfig(engine="ray", ray_address="local")


def _refuse() -> None:
    raise ConnectionError("nobody there")
