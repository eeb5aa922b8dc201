"""Writes data/index: a faiss index over the train chunks' vectors, with its recall against exact search."""

from pathlib import Path

from retro_model.artifacts import write_json
from retro_model.index import make_index
from stages.harness import run_stage, work_folder
from stages.params import read_params


def main() -> None:
    """Vectors in, index and its recall out."""
    params = read_params("index", "runtime")
    embeddings = Path("data/embeddings")
    with work_folder("index", [embeddings], {"index": params.index}) as work:
        metrics = make_index(
            embeddings,
            params.index,
            Path("data/index"),
            device=params.runtime.device,
            engine=params.runtime.make_engine(),
            work_folder=work,
        )
    write_json(Path("metrics/index.json"), metrics)


if __name__ == "__main__":
    run_stage("index", main)
