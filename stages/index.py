"""Writes data/index: a faiss index over the train chunks' vectors. Measures its recall against exact search."""

from pathlib import Path

from retro_model.core.artifacts import Artifact, write_json
from retro_model.search.build import make_index
from stages.common.harness import record_timing, run_stage, work_folder
from stages.common.params import read_params


def main() -> None:
    """Reads the vectors, writes the index and its metrics."""
    params = read_params("index", "runtime")
    embeddings = Path("data/embeddings")
    with work_folder("index", params) as work:
        outcome = make_index(
            embeddings,
            params.index,
            Path("data/index"),
            device=params.runtime.device,
            engine=params.runtime.make_engine(),
            work_folder=work,
        )
    write_json(Path("metrics/index.json"), outcome.metrics)
    made = Artifact.open(Path("data/index"), "index", verify=False).fingerprint
    record_timing("index.search", made, **outcome.timings)


if __name__ == "__main__":
    run_stage("index", main)
