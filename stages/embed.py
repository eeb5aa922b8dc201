"""Writes data/embeddings/{train,valid,test}: a vector for each chunk, by a frozen encoder."""

from pathlib import Path

from retro_model.artifacts import write_json
from retro_model.embedding import make_embeddings
from stages.harness import run_stage
from stages.params import read_params


def main() -> None:
    """Chunks in, vectors out."""
    params = read_params("embed", "runtime")
    metrics = make_embeddings(
        Path("data/chunks"),
        Path("data/tokenizer"),
        params.embed,
        Path("data/embeddings"),
        batch_size=params.runtime.embed_batch_size,
        device=params.runtime.device,
    )
    write_json(Path("metrics/embed.json"), metrics)


if __name__ == "__main__":
    run_stage("embed", main)
