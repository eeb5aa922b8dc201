"""Writes data/tokenizer: trained on the train documents, or a self-contained copy of a named one or the base's."""

from pathlib import Path

from retro_model.core.artifacts import Artifact, write_json
from retro_model.core.bases import check_base
from retro_model.core.printable import say
from retro_model.corpus.tokenizer_training import make_tokenizer
from stages.common.dvcignore import dvc_name_filter
from stages.common.harness import last_made, record_timing, run_stage
from stages.common.params import read_params


def main() -> None:
    """Reads the documents, writes the tokenizer and its metrics."""
    params = read_params("documents", "corpus", "tokenizer", "retrofit.base")
    if params.retrofit.base:
        check_base(params.retrofit.base)  # before hours of work: without it, the stage baseline is the first to load it
    metrics = make_tokenizer(
        Path(params.documents),
        params.corpus,
        params.tokenizer.of_base(params.retrofit.base),
        Path("data/tokenizer"),
        name_filter=dvc_name_filter(),
    )
    write_json(Path("metrics/tokenizer.json"), metrics)
    made = Artifact.open(Path("data/tokenizer"), "tokenizer").fingerprint
    before = last_made("tokenizer.made")
    if before is not None and before != made:
        say(
            "tokenizer: it is not the one of the last run, so every document is tokenized and embedded again; if only "
            "documents were added, tokenizer.train_on keeps it as it is: see docs/growing.md"
        )
    record_timing("tokenizer.made", made)


if __name__ == "__main__":
    run_stage("tokenizer", main)
