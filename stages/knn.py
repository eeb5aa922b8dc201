"""Writes data/neighbors/{train,valid,test}: each chunk's nearest train chunks from other documents."""

from pathlib import Path

from retro_model.core.artifacts import Artifact, write_json
from retro_model.search.neighbors import make_neighbors
from stages.common.harness import project_root, record_timing, run_stage, work_folder
from stages.common.params import read_params


def main() -> None:
    """Reads index, vectors and chunks, writes the neighbors and their metrics."""
    params = read_params("neighbors", "runtime")
    embeddings, index, chunks = Path("data/embeddings"), Path("data/index"), Path("data/chunks")
    with work_folder("knn", params) as work:
        outcome = make_neighbors(
            embeddings,
            index,
            chunks,
            params.neighbors,
            Path("data/neighbors"),
            device=params.runtime.device,
            engine=params.runtime.make_engine(),
            work_folder=work,
            parts=params.runtime.kept_parts(project_root()),
        )
    write_json(Path("metrics/knn.json"), outcome.metrics)
    made = Artifact.open(Path("data/neighbors/train"), "neighbors", verify=False).fingerprint
    record_timing("knn.search", made, **outcome.timings)


if __name__ == "__main__":
    run_stage("knn", main)
