"""Prints the pipeline's results as a short table, at the end of `make repro`."""

import json
import sys
from pathlib import Path
from typing import Any

from retro_model.evaluation.names import ModelNames
from retro_model.evaluation.statistics import COLUMNS
from stages.common.harness import read_timings
from stages.common.params import read_params

# (stage, format string for the metrics in metrics/<stage>.json)
LINES = (
    ("tokenizer", "{vocabulary:,} tokens in the vocabulary"),
    ("chunk", "{train_chunks:,} / {valid_chunks:,} / {test_chunks:,} chunks of train / valid / test"),
    ("embed", "{dim} numbers a chunk"),
    ("index", "recall {recall:.3f} against exact search"),
    ("knn", "{train_missing_share:.1%} of the train chunks' neighbors missing"),
    ("baseline", "validation loss {valid_loss:.3f}, {num_weights:,} weights"),
    ("train", "validation loss {valid_loss:.3f}, without retrieval {valid_loss_off:.3f}"),
)
NEXT = """
look next:
  reports/evaluate.html        what retrieval gave, in numbers and passages (open it in a browser)
  retro generate --prompt TEXT watch the model write; with --show-neighbors, what it looks up
  mlflow ui                    the runs, at http://127.0.0.1:5000/#/experiments/1/runs
  dvc plots show               the curves
  dvc exp run -S knn=4         change one thing; only what depends on it runs again
(with `source .venv/bin/activate` first; README.md says the rest)"""


def main() -> None:
    """Prints a line for each stage, the bits per byte on the test split, and what to look at next."""
    seconds = _last_seconds()
    metrics = {stage: _metrics(stage) for stage in (*(stage for stage, _ in LINES), "evaluate")}
    print("\nstage      seconds  what came out")
    for stage, text in LINES:
        print(f"{stage:<10} {seconds.get(stage, '-'):>7}  {text.format(**metrics[stage])}")
    print(f"{'evaluate':<10} {seconds.get('evaluate', '-'):>7}  bits per byte of held-out documents:")
    names = ModelNames.of(read_params("retrofit.base").retrofit.base)
    for column in COLUMNS:
        if (bits := metrics["evaluate"].get(f"test_bpb_{column}")) is not None:
            print(f"{'':<19} {bits:.4f}  {names.column(column)}{_saved(column, metrics['evaluate'], names)}")
    print(NEXT)


def _saved(column: str, metrics: dict[str, Any], names: ModelNames) -> str:
    """What is said of the column with retrieval, and of random neighbors if they save something too."""
    if column == "on":
        return f": {_saved_by_retrieval(metrics, names)}"
    if column == "random" and metrics["gain_random_vs_off_low"] > 0:
        share = metrics["gain_random_vs_off"] / metrics["test_bpb_baseline"]
        return f": save {share:.1%} too, which comes from training on this text and not from what is found"
    return ""


def _saved_by_retrieval(metrics: dict[str, Any], names: ModelNames) -> str:
    """The share of the baseline's bits that retrieval saves, with its interval and the number of documents."""
    share, low, high = (metrics[f"saved_share_vs_baseline{end}"] for end in ("", "_low", "_high"))
    documents = metrics["test_documents"]
    return (
        f"saves {share:.1%} of the {names.plain} (95%: {low:.1%} to {high:.1%}; "
        f"{documents:,} test document{'' if documents == 1 else 's'})"
    )


def _metrics(stage: str) -> dict[str, Any]:
    file = Path(f"metrics/{stage}.json")
    if not file.is_file():
        sys.exit(f"summary: {file} is not there; run `dvc repro` (stage {stage})")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _last_seconds() -> dict[str, str]:
    """How long each stage took when it last ran in the workspace; without stages that DVC only restored."""
    return {
        record["stage"]: f"{record['seconds']:.0f}"
        for record in read_timings()
        if "seconds" in record and record.get("workspace")
    }


if __name__ == "__main__":
    main()
