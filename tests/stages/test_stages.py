"""Each stage alone, without DVC: what it writes, and what it says to inputs that are missing, torn or mismatched.

One tiny pipeline is run once, stage by stage, in a folder (tests/support/stagewise.py); every test works on a copy.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import tiny_corpus
from paths import ROOT
from stagewise import OUTS, STAGES, contents, copy_of, refuse, run, write_params

from retro_model.core.artifacts import Artifact
from retro_model.core.errors import MismatchError
from retro_model.corpus.chunks import read_documents
from stages import summary


@pytest.fixture
def finished(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every stage has run, as the current one; to be read only."""
    monkeypatch.chdir(pipeline)
    return pipeline


@pytest.fixture
def work(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished folder, as the current one."""
    folder = copy_of(pipeline, tmp_path / "copy")
    monkeypatch.chdir(folder)
    return folder


# ---- happy paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("baseline", "train")])
def test_a_stage_that_runs_again_writes_the_same_bytes(stage: str, work: Path) -> None:
    before = contents(work / OUTS[stage])
    shutil.rmtree(work / OUTS[stage])
    run(stage)
    assert before and contents(work / OUTS[stage]) == before


@pytest.mark.parametrize("stage", ["baseline", "train"])
def test_training_again_from_nothing_writes_the_same_bytes(stage: str, work: Path) -> None:
    before = contents(work / OUTS[stage]), (work / f"plots/{stage}.csv").read_bytes()
    assert not (work / ".retro").exists()
    shutil.rmtree(work / OUTS[stage])
    run(stage)
    assert (contents(work / OUTS[stage]), (work / f"plots/{stage}.csv").read_bytes()) == before


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [([], 2), pytest.param(TORCHRUN, 0, marks=pytest.mark.torture)],
    ids=["stage", "torchrun"],
)
def test_a_stage_in_two_processes(work: Path, launcher: list[str], processes: int) -> None:
    """Started by the stage itself or by torchrun; the first process alone writes, logs and holds the lock."""

    def num_runs() -> int:
        with sqlite3.connect("mlflow.db") as store:
            return int(store.execute("select count(*) from runs").fetchone()[0])

    before, runs = json.loads(Path("metrics/train.json").read_text()), num_runs()
    shutil.rmtree("models/retro")
    write_params(work, train__processes=processes)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "stages.train"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = json.loads(Path("metrics/train.json").read_text())
    assert after == pytest.approx(before, rel=2e-3)
    assert num_runs() == runs + 1
    Artifact.open("models/retro", "model")


def test_retrieval_is_trained_around_the_frozen_baseline_or_from_new_weights(work: Path) -> None:
    """The default is RETROfit: without neighbors RETRO is the baseline. From scratch is one setting away."""

    def evaluated() -> dict[str, float]:
        metrics: dict[str, float] = json.loads(Path("metrics/evaluate.json").read_text())
        return metrics

    found = evaluated()
    assert found["test_bpb_off"] == found["test_bpb_baseline"] != found["test_bpb_on"]
    write_params(work, retrofit__init_from="models/none")
    for stage in ("train", "evaluate"):
        shutil.rmtree(OUTS[stage])
        run(stage)
    found = evaluated()
    assert found["test_bpb_off"] != found["test_bpb_baseline"]


def test_every_output_opens_and_names_what_it_was_made_from(finished: Path) -> None:
    tokenizer = Artifact.open("data/tokenizer", "tokenizer")
    chunks = {split: Artifact.open(f"data/chunks/{split}", "chunks") for split in ("train", "valid", "test")}
    index = Artifact.open("data/index", "index")
    for split, artifact in chunks.items():
        artifact.require(tokenizer=tokenizer.fingerprint, split=split, chunk_size=16)
        vectors = Artifact.open(f"data/embeddings/{split}", "embeddings").require(chunks=artifact.fingerprint)
        assert vectors.rows == artifact.rows > 0
        neighbors = Artifact.open(f"data/neighbors/{split}", "neighbors")
        neighbors.require(chunks=artifact.fingerprint, database=chunks["train"].fingerprint, index=index.fingerprint)
        assert neighbors["ids"].shape == (artifact.rows, 8)
    for name, retrieval in (("baseline", False), ("retro", True)):
        model = Artifact.open(f"models/{name}", "model")
        model.require(retrieval=retrieval, tokenizer=tokenizer.fingerprint, chunks=chunks["train"].fingerprint)
    for stage in STAGES[1:]:
        metrics = json.loads(Path(f"metrics/{stage}.json").read_text())
        assert metrics and all(isinstance(value, (int, float)) for value in metrics.values())


def test_the_last_table_says_what_came_out_of_every_stage(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.main()
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(STAGES)] == list(STAGES[1:])
    metrics = json.loads(Path("metrics/evaluate.json").read_text())
    share, low, high = (metrics[f"saved_share_vs_baseline{end}"] for end in ("", "_low", "_high"))
    assert (
        f"{metrics['test_bpb_on']:.4f}  RETRO, retrieval on: saves {share:.1%} of the plain decoder (95%: {low:.1%} to "
        f"{high:.1%}; {metrics['test_documents']} test documents)" in out
    )
    assert f"{metrics['test_bpb_mixed']:.4f}  plain decoder mixed with the bigram rule" in out
    assert "compared" not in out


@pytest.mark.parametrize(("low", "said"), [(0.001, True), (-0.001, False)])
def test_the_last_table_says_what_random_neighbors_save_too(
    work: Path, capsys: pytest.CaptureFixture[str], low: float, said: bool
) -> None:
    """Around a base, training on the text helps whatever is found."""
    file = work / "metrics/evaluate.json"
    metrics = {**json.loads(file.read_text()), "gain_random_vs_off": 0.0625, "gain_random_vs_off_low": low}
    file.write_text(json.dumps({**metrics, "test_bpb_baseline": 1.25}))
    summary.main()
    out = capsys.readouterr().out
    assert ("RETRO, random neighbors: save 5.0% too, which comes from training" in out) == said


def test_no_neighbor_is_of_its_own_document_or_held_out(finished: Path) -> None:
    database = Artifact.open("data/chunks/train", "chunks")["documents"][:]
    held_out = set()
    for split in ("train", "valid", "test"):
        documents = Artifact.open(f"data/chunks/{split}", "chunks")["documents"][:]
        if split != "train":
            held_out |= set(documents.tolist())
        ids = Artifact.open(f"data/neighbors/{split}", "neighbors")["ids"][:]
        found = ids >= 0
        assert found.any()
        assert (database[ids[found]] != documents.repeat(ids.shape[1]).reshape(ids.shape)[found]).all()
    assert not held_out & set(database.tolist())


def test_no_output_names_a_path_of_this_machine_or_a_run(finished: Path) -> None:
    for folder in ("data", "models", "metrics", "plots", "reports"):
        for name, content in contents(finished / folder).items():
            assert str(finished).encode() not in content, name
            assert str(ROOT).encode() not in content, name
            assert b"mlruns" not in content and b"mlartifacts" not in content, name


# ---- inputs that are not there, torn, or of something else ----------------------------------------

# Each stage and what it reads; for more of them, tests/contract/test_bad_input.py has the whole line.
MISSING = [
    ("embed", "data/tokenizer", "stage tokenizer"),
    ("index", "data/embeddings/train", "stage embed"),
    ("knn", "data/index", "stage index"),
    ("knn", "data/embeddings/test", "stage embed"),
    ("knn", "data/chunks/train", "stage chunk"),
    ("baseline", "data/chunks/valid", "stage chunk"),
    ("train", "data/neighbors/train", "stage knn"),
    ("evaluate", "models/baseline", "stage baseline or train"),
    ("evaluate", "data/neighbors/test", "stage knn"),
    ("evaluate", "data/neighbors/valid", "stage knn"),
]


@pytest.mark.parametrize(("stage", "missing", "advice"), MISSING)
def test_a_missing_input_says_which_stage_makes_it(
    stage: str, missing: str, advice: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(missing)
    line = refuse(stage, capsys)
    assert missing in line and "run `dvc repro`" in line and advice in line


TORN = [
    ("chunk", "data/tokenizer/tokenizer.json"),
    ("embed", "data/chunks/valid/tokens-00000.npy"),
    ("knn", "data/chunks/test/documents-00000.npy"),
    ("train", "data/neighbors/valid/ids-00000.npy"),
]


@pytest.mark.parametrize(("stage", "torn"), TORN)
def test_a_torn_input_is_refused(stage: str, torn: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(torn)
    os.truncate(path, path.stat().st_size - 16)
    assert torn in refuse(stage, capsys)


def test_inputs_that_do_not_belong_together_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_params(work, tokenizer__vocab_size=380)
    run("tokenizer")
    for stage in ("embed", "baseline", "train", "evaluate"):  # chunks of the old tokenizer
        assert "made for tokenizer" in refuse(stage, capsys), stage
    shutil.rmtree(work / "data/chunks")
    run("chunk")
    assert "made for chunks" in refuse("knn", capsys)  # vectors of the old chunks
    assert "made for" in refuse("train", capsys)


def test_neighbors_of_another_index_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_params(work, embed__pooling="cls")
    shutil.rmtree(work / "data/embeddings")
    run("embed")
    assert "made for embeddings" in refuse("knn", capsys)


def test_an_encoder_that_is_not_there_says_what_was_tried(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_params(work, embed__encoder="nobody/no-such-encoder")
    line = refuse("embed", capsys)
    assert "nobody/no-such-encoder" in line and "embed.encoder" in line


def test_evaluation_without_the_encoder_says_that_retrieval_was_not_timed(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No figure needs the encoder: whoever pulled the artifacts may not have it."""
    before = Path("metrics/evaluate.json").read_bytes()
    run("evaluate")
    assert "evaluate: retrieval, milliseconds a chunk: " in capsys.readouterr().out
    write_params(work, embed__encoder="nobody/no-such-encoder")
    run("evaluate")
    assert "evaluate: retrieval was not timed: embed.encoder: nobody/no-such-encoder" in capsys.readouterr().out
    assert Path("metrics/evaluate.json").read_bytes() == before


def test_another_encoder_than_the_one_used_costs_the_timing_of_retrieval_and_nothing_else(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*arguments: object) -> None:
        raise MismatchError("data/embeddings: made by encoder a, found b")

    monkeypatch.setattr("stages.evaluate.time_retrieval", other)
    run("evaluate")
    assert "evaluate: retrieval was not timed: data/embeddings: made by encoder a" in capsys.readouterr().out


def test_knn_beyond_what_is_stored_is_refused_before_any_work(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_params(work, knn=9)
    for stage in STAGES:
        assert "knn: found 9, expected at most neighbors.stored = 8" in refuse(stage, capsys)


# ---- documents that cannot be used, or not all of them --------------------------------------------


@pytest.fixture
def documents(work: Path) -> Path:
    shutil.rmtree("tiny/documents")
    Path("tiny/documents").mkdir()
    return Path("tiny/documents")


def test_no_documents(documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("tokenizer", "chunk"):
        assert "tiny/documents" in refuse(stage, capsys)
    documents.rmdir()
    for stage in ("tokenizer", "chunk"):
        assert "tiny/documents" in refuse(stage, capsys)


def test_only_empty_documents(documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        (documents / f"{number}.txt").write_text(" \n")
    for stage in ("tokenizer", "chunk"):
        assert "empty" in refuse(stage, capsys)


def test_one_document_only(documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (documents / "all.txt").write_text("some words\n---\nand more words\n")
    for stage in ("tokenizer", "chunk"):
        line = refuse(stage, capsys)
        assert "3" in line and "documents_separator" in line


def test_bad_documents_are_counted_and_short_ones_kept(documents: Path) -> None:
    tiny_corpus(documents)
    (documents / "latin.txt").write_bytes("café".encode("latin-1"))
    (documents / "empty.txt").write_text("")
    (documents / "short.txt").write_text("ba")
    for stage in ("tokenizer", "chunk"):
        shutil.rmtree(OUTS[stage])
        run(stage)
    metrics = json.loads(Path("metrics/chunk.json").read_text())
    assert metrics["documents_read"] == metrics["documents_kept"] + 2
    assert metrics["dropped_not_utf8"] == metrics["dropped_empty"] == 1
    sources = {}
    for split in ("train", "valid", "test"):
        for entry in read_documents(Artifact.open(f"data/chunks/{split}", "chunks")):
            sources[entry["source"]] = entry
    assert sources["short.txt"]["chunks"] == 1 and sources["short.txt"]["bytes"] == 2
