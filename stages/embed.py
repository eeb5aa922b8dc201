"""Writes data/embeddings/{train,valid,test}: a vector for each chunk, from a frozen encoder."""

from functools import partial
from pathlib import Path

from retro_model.core.artifacts import Artifact, write_json
from retro_model.embedding.embed import make_embeddings
from stages.common.harness import project_root, record_timing, run_stage, work_folder
from stages.common.locked import restore_last_run
from stages.common.params import read_params

CODE_FOLDERS = ("retro_model/embedding", "retro_model/corpus")  # they decide the bytes of a vector


def main() -> None:
    """Reads chunks and tokenizer, writes the vectors and their metrics."""
    params = read_params("embed", "runtime")
    chunks, tokenizer = Path("data/chunks"), Path("data/tokenizer")
    with work_folder("embed", params):  # another process that makes the same is waited for
        outcome = make_embeddings(
            chunks,
            tokenizer,
            params.embed,
            Path("data/embeddings"),
            batch_size=params.runtime.embed_batch_size or None,
            device=params.runtime.device,
            engine=params.runtime.make_engine(),
            parts=params.runtime.kept_parts(project_root()),
            restore=partial(restore_last_run, "embed", CODE_FOLDERS),
        )
    write_json(Path("metrics/embed.json"), outcome.metrics)
    made = Artifact.open(Path("data/embeddings/train"), "embeddings", verify=False).fingerprint
    record_timing("embed.forward", made, **outcome.timings)


if __name__ == "__main__":
    run_stage("embed", main)
