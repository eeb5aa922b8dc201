"""A small run whose model is adapters around a tiny base, with weights that all matter; params.yaml names the base.

root = based_run(tmp_path)      # as small_run, with base/
"""

import shutil
from pathlib import Path

import yaml
from small_run import small_run
from tiny_bases import opened, tiny_base

from retro_model import Retrofit
from retro_model.core.artifacts import Artifact, ArtifactWriter
from retro_model.training.mlmodel import write_mlmodel

KNN = 2


def based_run(root: Path) -> Path:
    """Everything that a run with `retrofit.base` has, but for the training."""
    small_run(root)
    chunks = Artifact.open(root / "data/chunks/train", "chunks")
    base = tiny_base("llama", vocab_size=chunks.facts["vocab_size"], max_position_embeddings=512)
    base.save_pretrained(root / "base")
    for name, retrieval in (("baseline", False), ("retro", True)):
        shutil.rmtree(root / "models" / name)
        _write_adapters(root, root / "models" / name, chunks, retrieval)
    params = {"embed": {"encoder": str(root / "encoder")}, "retrofit": {"base": str(root / "base")}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def _write_adapters(root: Path, folder: Path, chunks: Artifact, retrieval: bool) -> None:
    """As the stages baseline and train do; the base's name is recorded without its folder, as an absolute path is."""
    facts = chunks.facts
    model = Retrofit(root / "base", facts["chunk_size"], pad_id=facts["pad_id"], retrieval=retrieval, dim_head=8)
    model.base_name = "base"
    with ArtifactWriter(folder, "model") as writer:
        opened(model).save_pretrained(folder)
        write_mlmodel(folder, KNN if retrieval else 0)
        shutil.copytree(root / "data/tokenizer", folder / "tokenizer")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            writer.add_file(file.relative_to(folder).as_posix())
        writer.facts.update(retrieval=retrieval, knn=KNN if retrieval else 0, seq_len=32, chunks=chunks.fingerprint)
        writer.facts.update({name: facts[name] for name in ("tokenizer", "chunk_size")}, base=model.describe_base())
        if retrieval:
            writer.facts["index"] = Artifact.open(root / "data/index", "index").fingerprint
