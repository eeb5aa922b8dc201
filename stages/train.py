"""Writes models/retro: the network with retrieval, with the weights of the best validation loss."""

from pathlib import Path

from stages.common.harness import run_stage
from stages.common.params import read_params
from stages.tracking.learning import learn


def main() -> None:
    """Reads chunks and neighbors, writes the model."""
    params = read_params("knn", "seq_len", "seed", "model", "train", "retrofit", "runtime")
    learn("train", params, neighbors=Path("data/neighbors"), knn=params.knn, out=Path("models/retro"))


if __name__ == "__main__":
    run_stage("train", main)
