"""Writes data/neighbors/{train,valid,test}: each chunk's nearest train chunks from other documents."""

from pathlib import Path

from retro_model.artifacts import write_json
from retro_model.neighbors import make_neighbors
from stages.harness import run_stage
from stages.params import read_params


def main() -> None:
    """Index, vectors and document ids in, neighbors out."""
    params = read_params("neighbors")
    metrics = make_neighbors(
        Path("data/embeddings"), Path("data/index"), Path("data/chunks"), params.neighbors, Path("data/neighbors")
    )
    write_json(Path("metrics/knn.json"), metrics)


if __name__ == "__main__":
    run_stage("knn", main)
