"""Another database, another model, another tokenizer: what is dropped, and that bytes make them compare."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import CORPUS, STORED, small_run, write_data, write_model

from retro_model.core.artifacts import SPLITS, Artifact
from retro_model.core.config import optional_path
from retro_model.core.errors import ConfigError, DocumentError, MismatchError, MissingArtifactError
from retro_model.corpus.chunks import document_texts
from retro_model.corpus.documents import Corpus
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.embedding.config import EmbedConfig
from retro_model.evaluation.comparison import spread_over_rows
from retro_model.evaluation.config import EvaluateConfig
from retro_model.evaluation.evaluate import EvaluationResult, EvaluationRun, evaluate_models, time_retrieval
from retro_model.evaluation.inputs import Inputs, Searching, rechunk_documents, search_other_database
from retro_model.evaluation.scoring import Scorer, choose_spans
from retro_model.network.model import RETRO
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def other(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in other tokens and longer chunks, and models of these."""
    root = tmp_path_factory.mktemp("other")
    write_data(run, root / "data", vocab_size=340, chunk_size=12)
    write_model(root / "plain", root / "data", retrieval=False, seq_len=48, seed=3)
    write_model(root / "reading", root / "data", retrieval=True, seq_len=48, knn=3, seed=4)
    return root


def searching_of(run: Path, **corpus: Any) -> Searching:
    return Searching(
        dataclasses.replace(CORPUS, **corpus),
        EmbedConfig(encoder=str(run / "encoder")),
        IndexConfig(),
        NeighborsConfig(stored=STORED),
    )


def evaluate(
    run: Path,
    out: Path,
    data: Path | None = None,
    retro: Path | None = None,
    baseline: Path | None = None,
    **changes: Any,
) -> EvaluationResult:
    values = {"compare": str(run / "none"), "database": str(run / "none"), "sweep_knn": (), "passages": 2}
    seq_len, knn = changes.pop("seq_len", 32), changes.pop("knn", 2)
    evaluation = EvaluationRun(
        data or run / "data",
        baseline or run / "models/baseline",
        retro or run / "models/retro",
        EvaluateConfig(**{**values, "max_chunks": None, "bootstrap_samples": 20, **changes}),
        searching_of(run),
        knn=knn,
        seq_len=seq_len,
        seed=0,
        out_metrics=out / "metrics.json",
        out_plots=out / "plots",
        out_report=out / "report.html",
        work_folder=out / "work",
    )
    return evaluate_models(evaluation)


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    return evaluate(run, tmp_path_factory.mktemp("evaluated"))


def number_of(run: Path, *splits: str) -> int:
    return sum(1 for _ in Corpus(run / "documents", CORPUS).documents(*splits))


# ---- another database ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_documents_as_database_give_the_same_figures(
    run: Path, evaluated: EvaluationResult, tmp_path: Path
) -> None:
    """All held-out ones are dropped from it, and what is left is the train split, found in the same way."""
    result = evaluate(run, tmp_path, database=str(run / "documents"))
    swapped = dict(result.metrics)
    assert swapped.pop("database_documents_held_out") == number_of(run, "valid", "test")
    assert swapped.pop("database_documents_kept") == number_of(run, "train")
    beside = {name: swapped.pop(name) for name in tuple(swapped) if "on_train" in name}
    assert swapped == evaluated.metrics
    assert beside["test_bpb_on_train"] == swapped["test_bpb_on"] and beside["gain_on_vs_on_train"] == 0
    for name in ("knn", "part", "overlap", "documents"):  # shares of it are by numbers, which are others now
        assert result.curves[name] == evaluated.curves[name]
    assert "Neighbors come from documents" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_other_documents_are_found_and_make_a_difference(run: Path, tmp_path: Path) -> None:
    from fixtures import tiny_corpus

    tiny_corpus(tmp_path / "more", num_documents=7, seed=9)
    result = evaluate(run, tmp_path, database=str(tmp_path / "more"))
    assert result.metrics["database_documents_kept"] == 7
    assert result.metrics["test_bpb_on"] != result.metrics["test_bpb_on_train"]
    assert "more/" not in (tmp_path / "report.html").read_text(), "no path of this machine"
    again = evaluate(run, tmp_path, database=str(tmp_path / "more"))  # with what the first run left behind
    assert again.metrics == result.metrics


def held_out_text(run: Path) -> str:
    chunks = Artifact.open(run / "data/chunks/test", "chunks")
    return max((item.text for item in document_texts(chunks, Tokenizer.open(run / "data/tokenizer"))), key=len)


@pytest.mark.parametrize(("threshold", "kept", "dropped"), [(0.8, 1, 2), (0.0, 2, 1)])
def test_held_out_documents_are_dropped_from_a_database(
    run: Path, tmp_path: Path, threshold: float, kept: int, dropped: int
) -> None:
    text = held_out_text(run)
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a-copy.txt").write_text(text)
    words = text.split(" ")
    (documents / "a-near-copy.txt").write_text(" ".join([*words[:-1], "zenzen"]))
    (documents / "own.txt").write_text("Something else, and nothing but that. " * 5)
    (documents / "own-again.txt").write_text("Something else, and nothing but that. " * 5)
    (documents / "empty.txt").write_text("")
    searching = searching_of(run, near_duplicates=threshold)
    inputs, counts = search_other_database(documents, run / "data", searching, tmp_path / "work")
    assert (counts["kept"], counts["held_out"], counts["copies"], counts["flawed"]) == (kept, dropped, 1, 1)
    assert counts["read"] == 5
    used = {Artifact.open(run / "data/chunks" / split, "chunks")["documents"][:].max() for split in SPLITS}
    assert inputs.database["documents"][:].min() > max(used), "a number twice would pass for the query's own document"
    ids = inputs.neighbors["ids"][:]
    assert ids.max() == inputs.database.rows - 1 and (ids[:, 0] >= 0).all()


def test_a_database_leaves_out_what_dvc_does_not_see_and_names_what_is_lost(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "own.txt").write_text("Something else, and nothing but that. " * 5)
    (documents / "hidden.txt").write_text("Another thing that nobody may read. " * 5)
    (documents / "broken.jsonl.gz").write_bytes(b"no archive")
    searching = dataclasses.replace(
        searching_of(run), name_filter=lambda _, folders, files: (folders, [n for n in files if n != "hidden.txt"])
    )
    _, counts = search_other_database(documents, run / "data", searching, tmp_path / "work")
    assert (counts["read"], counts["kept"], counts["flawed"]) == (2, 1, 1)
    out = capsys.readouterr().out
    assert "not read: 1 that .dvcignore hides: hidden.txt\n" in out
    assert "  broken.jsonl.gz:1: unreadable file or truncated archive (Not a gzipped file" in out


def test_a_refused_document_of_a_database_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no archive")
    searching = searching_of(run)
    searching = dataclasses.replace(searching, corpus=dataclasses.replace(searching.corpus, bad_documents="refuse"))
    with pytest.raises(DocumentError, match=r"evaluate\.database: \S+: broken\.jsonl\.gz:1: unreadable .*; mend it"):
        search_other_database(tmp_path, run / "data", searching, tmp_path / "work")


def test_a_database_of_held_out_documents_alone_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_text(held_out_text(run))
    with pytest.raises(DocumentError, match=r"nothing to retrieve from: 1 documents read, 0 kept; dropped: 1 that are"):
        search_other_database(tmp_path / "copy.txt", run / "data", searching_of(run), tmp_path / "work")


def test_an_empty_folder_is_none_and_a_missing_one_a_mistake(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.gitkeep").touch()
    assert optional_path("evaluate.compare", str(tmp_path / "empty")) is None
    assert optional_path("evaluate.compare", str(run / "models/retro")) == run / "models/retro"
    with pytest.raises(ConfigError, match=r"evaluate\.database: found '.*nowhere', expected a path that is there"):
        optional_path("evaluate.database", str(tmp_path / "nowhere"))
    with pytest.raises(MissingArtifactError, match="no finished model here"):
        evaluate(run, tmp_path, compare=str(run / "documents"))


def test_what_retrieval_costs_is_measured(run: Path) -> None:
    timings = time_retrieval(run / "data", searching_of(run), 2)
    assert set(timings) == {"retrieval_ms_per_chunk_alone", "retrieval_ms_per_chunk_batched"}
    assert all(0 < value < 1e6 for value in timings.values())


# ---- another model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "column"), [("retro", "on"), ("baseline", "baseline")])
def test_a_model_compared_with_itself_has_the_same_figures(run: Path, tmp_path: Path, folder: str, column: str) -> None:
    result = evaluate(run, tmp_path, compare=str(run / "models" / folder))
    for name in ("test_bpb", "test_perplexity"):
        assert result.metrics[f"{name}_compared"] == result.metrics[f"{name}_{column}"]
    for name in ("low", "high"):
        pair = dict(zip(result.curves["columns"].column("column"), result.curves["columns"].column(name), strict=True))
        assert pair["compared"] == pair[column]
    leakage = result.curves["leakage"]
    assert leakage.column("compared") == leakage.column(column)
    page = (tmp_path / "report.html").read_text()
    assert f"the model {folder}" in page and "was trained on other chunks" not in page


def test_a_model_of_other_tokens_is_read_in_its_own_and_measured_in_bytes(
    run: Path, other: Path, tmp_path: Path
) -> None:
    result = evaluate(run, tmp_path, compare=str(other / "plain"))
    chunks = Artifact.open(other / "data/chunks/test", "chunks")
    scorer = Scorer(chunks, chunks, choose_spans(chunks["documents"][:], None, 0), 48)
    losses = scorer.losses(RETRO.from_pretrained(other / "plain"), None)
    num_bytes = int(chunks["bytes"][:].sum())
    assert num_bytes == result.metrics["test_bytes"]
    expected = float(losses.sum(dtype=np.float64)) / math.log(2) / num_bytes
    assert result.metrics["test_bpb_compared"] == pytest.approx(expected, abs=2e-6)
    perplexity = math.exp(losses.sum(dtype=np.float64) / scorer.is_label.sum())
    assert result.metrics["test_perplexity_compared"] == pytest.approx(perplexity, rel=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert "in tokens and chunks of its own" in page and "was trained on other chunks" in page


@pytest.mark.slow
def test_a_model_of_other_tokens_gets_neighbors_of_its_own(run: Path, other: Path, tmp_path: Path) -> None:
    result = evaluate(run, tmp_path / "here", compare=str(other / "reading"))
    itself = evaluate(run, tmp_path / "there", other / "data", other / "reading", other / "plain", seq_len=48, knn=3)
    assert result.metrics["test_bpb_compared"] == pytest.approx(itself.metrics["test_bpb_on"], abs=2e-6)
    assert itself.metrics["test_bpb_on"] != itself.metrics["test_bpb_off"]


def test_a_cut_document_is_cut_for_the_other_model_too(run: Path, other: Path, tmp_path: Path) -> None:
    from retro_model.evaluation.comparison import Comparison

    inputs = Inputs.open(run / "data")
    documents = inputs.chunks["documents"][:]

    def row_losses(max_chunks: int | None) -> tuple[Any, Any, int]:
        spans = choose_spans(documents, max_chunks, 0)
        options: dict[str, Any] = {"device": "cpu", "batch_size": 4, "number_type": "float32"}
        comparison = Comparison(other / "plain", run / "data", searching_of(run), tmp_path / "work", **options)
        found = comparison.score(inputs, spans)
        return np.concatenate([np.arange(*span) for span in spans]), found.row_losses, found.num_labels

    _, whole, num_labels = row_losses(None)
    rows, cut, fewer = row_losses(7)
    np.testing.assert_allclose(cut, whole[rows], atol=1e-4)
    assert 0 < fewer < num_labels


def test_what_the_tokenizer_does_not_spell_cannot_be_cut_anew(run: Path, other: Path, tmp_path: Path) -> None:
    inputs = Inputs.open(run / "data")
    inputs.chunks.facts = {**inputs.chunks.facts, "lossy_documents": 2}
    with pytest.raises(MismatchError, match=r"does not spell for 2 of \d+ documents of test; expected a model of"):
        rechunk_documents(inputs, run / "data", other / "plain/tokenizer", 12, ("test",), tmp_path)


def test_more_neighbors_than_are_stored_are_refused(run: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "greedy", run / "data", retrieval=True, knn=STORED + 1)
    with pytest.raises(ConfigError, match=rf"trained with {STORED + 1} neighbors, found {STORED} stored; raise"):
        evaluate(run, tmp_path / "out", compare=str(tmp_path / "greedy"))


def test_texts_come_back_from_their_tokens(run: Path) -> None:
    tokenizer = Tokenizer.open(run / "data/tokenizer")
    for split in SPLITS:
        found = list(document_texts(Artifact.open(run / "data/chunks" / split, "chunks"), tokenizer))
        expected = list(Corpus(run / "documents", CORPUS).documents(split))
        assert [(item.source, item.text) for item in found] == [(item.source, item.text) for item in expected]
        assert [item.number for item in found] == list(range(SPLITS.index(split), 3 * len(found), 3))


def lay_slowly(losses: list[float], ends: list[int], bounds: list[int], whole: bool) -> list[float]:
    """Byte by byte: each byte of a token carries an equal part of its loss."""
    rows, before = [0.0] * (len(bounds) - 1), 0

    def row_of(byte: int) -> int | None:
        return next((row for row, stop in enumerate(bounds[1:]) if bounds[row] <= byte < stop), None)

    for loss, end in zip(losses, ends, strict=True):
        if end > before:
            for byte in range(before, end):
                row = row_of(byte)
                if row is not None:
                    rows[row] += loss / (end - before)
        else:
            row = row_of(end)
            if row is not None:
                rows[row] += loss
            elif whole:
                rows[-1] += loss
        before = end
    return rows


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 9)), min_size=1, max_size=30),
    st.lists(st.integers(0, 6), min_size=1, max_size=8),
    st.booleans(),
)
def test_losses_are_laid_on_rows_byte_by_byte(tokens: list[tuple[int, float]], sizes: list[int], whole: bool) -> None:
    ends = np.cumsum([size for size, _ in tokens]).tolist()
    losses = [loss for _, loss in tokens]
    if whole:  # all text lies in the rows
        sizes = [*sizes, max(0, ends[-1] - sum(sizes))]
    if sum(sizes) > ends[-1]:  # and rows hold no more than the text
        return
    bounds = [0, *np.cumsum(sizes).tolist()]
    found = spread_over_rows(np.array(losses), np.array(ends, dtype=float), np.array(bounds, dtype=float), whole)
    np.testing.assert_allclose(found, lay_slowly(losses, ends, bounds, whole), atol=1e-9)
    if whole:
        assert found.sum() == pytest.approx(sum(losses))
