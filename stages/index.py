"""Writes data/index: a faiss index over the train chunks' vectors, with its recall against exact search."""

from pathlib import Path

from retro_model.artifacts import write_json
from retro_model.index import make_index
from stages.harness import run_stage
from stages.params import read_params


def main() -> None:
    """Vectors in, index and its recall out."""
    params = read_params("index")
    metrics = make_index(Path("data/embeddings"), params.index, Path("data/index"))
    write_json(Path("metrics/index.json"), metrics)


if __name__ == "__main__":
    run_stage("index", main)
