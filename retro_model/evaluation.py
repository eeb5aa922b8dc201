"""What retrieval gave, on documents that no training saw (sections 2.6 and 4 of the paper).

    result = evaluate_models(Path("models/baseline"), Path("models/retro"), Path("data/chunks"), ...)
    result.metrics["gain_on_vs_off"]          # bits per byte that retrieval saves

Four columns over the same documents: `baseline`, the decoder trained without retrieval; `off`, RETRO
with nothing retrieved; `on`, RETRO with its nearest neighbors; `random`, RETRO with neighbors drawn
from the database, which must not help. Bits are those of every label, the end of the document
included; bytes are those of the original text, so that models with other tokenizers compare.
"""

import csv
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from retro_model.artifacts import Artifact, write_json, write_whole
from retro_model.checkpoint import from_pretrained
from retro_model.config import Config, setting
from retro_model.dataset import retrieved_tokens
from retro_model.devices import resolve_number_type
from retro_model.errors import ConfigError, DocumentError
from retro_model.figures import (
    DIGITS,
    LEAKAGE_NEIGHBORS,
    Curve,
    Scores,
    columns_curve,
    leakage_curve,
    metrics_of,
)
from retro_model.model import RETRO
from retro_model.overlap import longest_shared_runs
from retro_model.page import make_page
from retro_model.passages import build_passages, choose_passages
from retro_model.progress import Progress
from retro_model.report import Passage, render
from retro_model.scoring import Scorer, Span, choose_spans
from retro_model.tokenizer import Tokenizer

IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class EvaluateConfig(Config, section="evaluate"):
    """How much is evaluated, and what of it is shown."""

    sweep_knn: tuple[int, ...] = setting((0, 1, 2, 4, 8), minimum=0)
    max_chunks: int | None = setting(1000, minimum=1)  # null: all held-out chunks
    bootstrap_samples: int = setting(2000, minimum=1)
    passages: int = setting(12, minimum=0)
    number_type: str = setting("float32", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.sweep_knn) != sorted(set(self.sweep_knn)):
            raise ConfigError(f"evaluate.sweep_knn: found {list(self.sweep_knn)}, expected rising numbers")


@dataclass(frozen=True)
class EvaluationResult:
    """`metrics` and `curves` are equal for equal inputs; `timings` are not, and go to no DVC output."""

    metrics: Mapping[str, float | int]
    curves: Mapping[str, Curve]
    timings: Mapping[str, float]


def evaluate_models(
    baseline_folder: Path,
    retro_folder: Path,
    chunks_folder: Path,
    neighbors_folder: Path,
    tokenizer_folder: Path,
    config: EvaluateConfig,
    *,
    knn: int,
    seq_len: int,
    seed: int,
    out_metrics: Path,
    out_plots: Path,
    out_report: Path,
    device: str = "cpu",
    batch_size: int = 8,
) -> EvaluationResult:
    """Evaluates both models on the test split: `out_metrics`, `out_plots`/evaluate_*.csv and `out_report`.

    `chunks_folder` and `neighbors_folder` hold a folder for each split; the training chunks are the
    database. Equal inputs give equal files; what differs between batch sizes lies behind the digits
    that are written.

    Raises an ArtifactError where the inputs do not belong together, ConfigError for a `knn` or a sweep
    that is not stored, DocumentError where there is nothing to score, TrainingError where a loss is
    not finite.
    """
    started = time.perf_counter()
    inputs = Inputs.open(baseline_folder, retro_folder, chunks_folder, neighbors_folder, tokenizer_folder)
    _check_knn(inputs.neighbors, knn, config)
    number_type = resolve_number_type(config.number_type, torch.device(device))
    scorer = Scorer(
        inputs.chunks,
        inputs.database,
        spans_with_text(inputs.chunks, config.max_chunks, seed),
        seq_len,
        device=device,
        batch_size=batch_size,
        number_type=number_type,
    )
    run = _score(inputs, scorer, config, knn, seed, device)
    scores = Scores(scorer, run.losses)
    resampled = scores.bootstrap(config.bootstrap_samples, seed)
    metrics = metrics_of(scores, resampled)
    curves = {
        "columns": columns_curve(scores, resampled),
        "knn": Curve(("knn", "test_bpb"), tuple(run.sweep.items())),
        "leakage": leakage_curve(scores, _shared_runs(inputs, scorer), inputs.chunks.facts["chunk_size"]),
    }
    passages = _passages(inputs, scores, config.passages, knn, seed)
    page = make_page(metrics, curves, passages, inputs.chunks, inputs.database.rows, knn=knn, seq_len=seq_len)
    write_json(out_metrics, metrics)
    for name, curve in curves.items():
        write_whole(out_plots / f"evaluate_{name}.csv", to_csv(curve))
    write_whole(out_report, render(page))
    return EvaluationResult(metrics, curves, {**run.timings, "seconds": time.perf_counter() - started})


# ---- inputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The artifacts of an evaluation, which belong together."""

    baseline: Artifact
    retro: Artifact
    chunks: Artifact
    database: Artifact
    neighbors: Artifact
    tokenizer: Tokenizer

    @classmethod
    def open(cls, baseline: Path, retro: Path, chunks: Path, neighbors: Path, tokenizer: Path) -> "Inputs":
        """Opens all and checks that each was made from the others; raises an ArtifactError."""
        words = Tokenizer.open(tokenizer)
        test = Artifact.open(chunks / "test", "chunks").require(split="test", tokenizer=words.fingerprint)
        chunk_size = test.facts["chunk_size"]
        train = Artifact.open(chunks / "train", "chunks").require(
            split="train", tokenizer=words.fingerprint, chunk_size=chunk_size
        )
        trained_on = {"tokenizer": words.fingerprint, "chunks": train.fingerprint, "chunk_size": chunk_size}
        retro_model = Artifact.open(retro, "model").require(retrieval=True, **trained_on)
        return cls(
            baseline=Artifact.open(baseline, "model").require(retrieval=False, **trained_on),
            retro=retro_model,
            chunks=test,
            database=train,
            neighbors=Artifact.open(neighbors / "test", "neighbors").require(
                chunks=test.fingerprint, database=train.fingerprint, index=retro_model.facts["index"]
            ),
            tokenizer=words,
        )


def spans_with_text(chunks: Artifact, max_chunks: int | None, seed: int) -> list[Span]:
    """The documents to score; without a byte there are no bits per byte."""
    chosen = choose_spans(chunks["documents"][:], max_chunks, seed)
    spans = [span for span in chosen if chunks["bytes"][span.first : span.stop].any()]
    if not spans:
        raise DocumentError(f"{chunks.folder}: no text to evaluate on; add documents to this split")
    return spans


def _check_knn(neighbors: Artifact, knn: int, config: EvaluateConfig) -> None:
    stored = neighbors["ids"].shape[1]
    for key, wanted in (("knn", knn), ("evaluate.sweep_knn", max(config.sweep_knn, default=0))):
        if wanted > stored:
            where = f"which {neighbors.folder} stores"
            raise ConfigError(f"{key}: found {wanted}, expected at most {stored}, {where}")
    if knn < 1:
        raise ConfigError(f"knn: found {knn}, expected at least 1")


def random_neighbors(num_rows: int, knn: int, database_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """The control: (num_rows, knn) rows of the database, each as likely as any other."""
    return np.random.default_rng(seed).integers(database_rows, size=(num_rows, knn))


# ---- scoring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    losses: dict[str, npt.NDArray[np.floating[Any]]]
    sweep: dict[int, float]
    timings: dict[str, float]


def _score(inputs: Inputs, scorer: Scorer, config: EvaluateConfig, knn: int, seed: int, device: str) -> _Run:
    """The losses of every column, and bits per byte for each k of the sweep."""
    baseline = from_pretrained(inputs.baseline.folder, device=device)
    retro = from_pretrained(inputs.retro.folder, device=device)
    nearest = inputs.neighbors["ids"][scorer.rows]
    drawn = random_neighbors(len(scorer.rows), knn, inputs.database.rows, seed)
    columns: dict[str, tuple[RETRO, IntArray | None]] = {
        "baseline": (baseline, None),
        "off": (retro, None),
        "on": (retro, nearest[:, :knn]),
        "random": (retro, drawn),
    }
    further = [k for k in config.sweep_knn if k not in (0, knn)]
    losses, timings, sweep = {}, {}, {}
    with Progress("evaluate", (len(columns) + len(further)) * scorer.num_sequences, unit="sequence") as shown:
        for name, (model, neighbors) in columns.items():
            started = time.perf_counter()
            losses[name] = scorer.losses(model, neighbors, shown)
            seconds = time.perf_counter() - started
            timings[f"tokens_per_second_{name}"] = float(scorer.is_label.sum()) / seconds
        for k in config.sweep_knn:
            same = {0: "off", knn: "on"}.get(k)
            found = losses[same] if same else scorer.losses(retro, nearest[:, :k], shown)
            sweep[k] = round(Scores(scorer, {"on": found}).bpb("on"), DIGITS)
    return _Run(losses, sweep, timings)


def _shared_runs(inputs: Inputs, scorer: Scorer) -> IntArray:
    """The longest run of tokens that each row's labels share with its nearest neighbors in the database."""
    pad_id = inputs.database.facts["pad_id"]
    runs = []
    for start in range(0, len(scorer.rows), 1024):  # retrieved tokens are large: few rows at a time
        some = slice(start, start + 1024)
        ids = inputs.neighbors["ids"][scorer.rows[some]][:, :LEAKAGE_NEIGHBORS]
        runs.append(longest_shared_runs(scorer.labels[some], retrieved_tokens(inputs.database, ids), pad_id))
    return np.concatenate(runs)


def _passages(inputs: Inputs, scores: Scores, num: int, knn: int, seed: int) -> tuple[Passage, ...]:
    scorer = scores.scorer
    nearest = inputs.neighbors["ids"][scorer.rows][:, :knn]
    chosen = choose_passages(scorer, scores.saved_bits().sum(axis=1), nearest, num, seed)
    return tuple(
        build_passages(
            chosen,
            scorer,
            scores.losses["off"],
            scores.losses["on"],
            nearest,
            inputs.neighbors["distances"][scorer.rows],
            inputs.tokenizer,
        )
    )


def to_csv(curve: Curve) -> str:
    """The curve as CSV, a head line first."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([curve.head, *curve.rows])
    return stream.getvalue()
