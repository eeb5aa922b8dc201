"""Writes data/chunks/{train,valid,test}: the documents' tokens in rows of chunk_size, and each row's source."""

from pathlib import Path

from retro_model.core.artifacts import write_json
from retro_model.corpus.chunking import make_chunks
from stages.common.dvcignore import dvc_name_filter
from stages.common.harness import project_root, run_stage, work_folder
from stages.common.params import read_params


def main() -> None:
    """Reads documents and tokenizer, writes the chunks and their counts."""
    params = read_params("documents", "corpus", "chunk_size", "runtime")
    tokenizer = Path("data/tokenizer")
    with work_folder("chunk", params):  # another process that makes the same is waited for
        metrics = make_chunks(
            Path(params.documents),
            params.corpus,
            tokenizer,
            params.chunk_size,
            Path("data/chunks"),
            engine=params.runtime.make_engine(),
            parts=params.runtime.kept_parts(project_root()),
            name_filter=dvc_name_filter(),
        )
    write_json(Path("metrics/chunk.json"), metrics)


if __name__ == "__main__":
    run_stage("chunk", main)
