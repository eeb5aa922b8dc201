"""Writes data/chunks/{train,valid,test}: the documents' tokens in rows of chunk_size, and where each came from."""

from pathlib import Path

from retro_model.artifacts import write_json
from retro_model.chunking import make_chunks
from stages.harness import run_stage
from stages.params import read_params


def main() -> None:
    """Documents and tokenizer in, chunks and their counts out."""
    params = read_params("documents", "corpus", "chunk_size")
    metrics = make_chunks(
        Path(params.documents), params.corpus, Path("data/tokenizer"), params.chunk_size, Path("data/chunks")
    )
    write_json(Path("metrics/chunk.json"), metrics)


if __name__ == "__main__":
    run_stage("chunk", main)
