"""Writes models/baseline: the same decoder without retrieval, trained on the same data for the same steps.

With `retrofit.base`, that model as it is: scored, not trained, and recorded by its name and digest.
"""

from pathlib import Path

from stages.common.harness import run_stage
from stages.common.params import read_params
from stages.tracking.learning import learn


def main() -> None:
    """Reads the chunks, writes the model."""
    params = read_params("seq_len", "seed", "model", "train", "retrofit.base", "runtime")
    params.train = params.train.of_baseline()
    learn("baseline", params, neighbors=None, knn=0, out=Path("models/baseline"))


if __name__ == "__main__":
    run_stage("baseline", main)
