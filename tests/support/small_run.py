"""A folder as after `dvc repro`, in seconds: tiny corpus and encoder, real data artifacts, models of random weights.

run = small_run(tmp_path)       # documents/, encoder/, none/, data/, models/baseline, models/retro
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from fixtures import tiny_corpus, tiny_encoder

from retro_model.core.artifacts import Artifact, ArtifactWriter
from retro_model.corpus.chunking import make_chunks
from retro_model.corpus.documents import CorpusConfig
from retro_model.corpus.tokenizer_training import TokenizerConfig, make_tokenizer
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.embed import make_embeddings
from retro_model.network.model import RETRO
from retro_model.search.build import make_index
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig, make_neighbors
from retro_model.training.mlmodel import write_mlmodel

CORPUS = CorpusConfig(valid=0.15, test=0.15)
STORED = 12
SIZES: dict[str, Any] = {
    "enc_dim": 12,
    "enc_depth": 1,
    "dec_dim": 16,
    "dec_depth": 2,
    "dec_cross_attn_layers": (1, 2),
    "heads": 2,
    "dim_head": 8,
}


def write_data(root: Path, folder: Path, *, vocab_size: int = 400, chunk_size: int = 8, search: bool = True) -> Path:
    """data/ of root/documents, as the stages write it; without `search` no more than tokenizer and chunks."""
    make_tokenizer(root / "documents", CORPUS, TokenizerConfig(vocab_size=vocab_size), folder / "tokenizer")
    make_chunks(root / "documents", CORPUS, folder / "tokenizer", chunk_size, folder / "chunks")
    if search:
        config = EmbedConfig(encoder=str(root / "encoder"))
        make_embeddings(folder / "chunks", folder / "tokenizer", config, folder / "embeddings")
        make_index(folder / "embeddings", IndexConfig(), folder / "index")
        out, config_of_neighbors = folder / "neighbors", NeighborsConfig(stored=STORED)
        make_neighbors(folder / "embeddings", folder / "index", folder / "chunks", config_of_neighbors, out)
    return folder


def write_model(
    folder: Path, data: Path, *, retrieval: bool, seq_len: int = 32, knn: int = 2, seed: int = 0, **sizes: Any
) -> Path:
    """A model artifact with random weights, of the tokenizer and chunks in `data`; `sizes` replace the small ones."""
    chunks = Artifact.open(data / "chunks/train", "chunks")
    torch.manual_seed(seed)
    model = RETRO(
        num_tokens=chunks.facts["vocab_size"],
        max_seq_len=seq_len,
        **{**SIZES, **sizes},
        chunk_size=chunks.facts["chunk_size"],
        pad_id=chunks.facts["pad_id"],
        retrieval=retrieval,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # as it starts, it predicts nothing: every token costs the same
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    with ArtifactWriter(folder, "model") as writer:
        model.save_pretrained(folder)
        write_mlmodel(folder, knn if retrieval else 0)
        shutil.copytree(data / "tokenizer", folder / "tokenizer")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            writer.add_file(file.relative_to(folder).as_posix())
        writer.facts.update(retrieval=retrieval, knn=knn if retrieval else 0, seq_len=seq_len)
        writer.facts.update({name: chunks.facts[name] for name in ("tokenizer", "chunk_size")})
        writer.facts.update(chunks=chunks.fingerprint)
        if retrieval and (data / "index").exists():
            writer.facts["index"] = Artifact.open(data / "index", "index").fingerprint
    return folder


def small_run(root: Path, num_documents: int = 40) -> Path:
    """Everything that a run has, but for the training."""
    tiny_corpus(root / "documents", num_documents=num_documents)
    tiny_encoder(root / "encoder")
    (root / "none").mkdir()
    write_data(root, root / "data")
    write_model(root / "models/baseline", root / "data", retrieval=False, seed=1)
    write_model(root / "models/retro", root / "data", retrieval=True, seed=2)
    return root
