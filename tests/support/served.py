"""A service over a small run: the folder, and the service opened as `retro serve` opens it."""

import shutil
from pathlib import Path

import yaml
from small_run import small_run, write_model

from retro_model.inference.retriever import Retriever
from retro_model.network.model import RETRO
from retro_model.serving.live import LiveDatabase
from retro_model.serving.service import Service
from retro_model.serving.worker import Worker

KNN = 2


def served_run(root: Path, seq_len: int = 512) -> Path:
    """A small run whose model reads longer texts, and whose params.yaml names the encoder."""
    small_run(root)
    shutil.rmtree(root / "models/retro")
    write_model(root / "models/retro", root / "data", retrieval=True, seq_len=seq_len, knn=KNN)
    (root / "params.yaml").write_text(yaml.safe_dump({"embed": {"encoder": str(root / "encoder")}}))
    return root


def open_service(
    root: Path, *, most_waiting: int = 8, wait_seconds: float = 120, run_seconds: float = 120, most_chunks: int = 500
) -> Service:
    """The service; close its worker when done."""
    retriever = Retriever.open(root / "data", encoder=str(root / "encoder"))
    model = RETRO.from_pretrained(root / "models/retro")
    database = LiveDatabase(retriever, most_documents=3, most_chunks=most_chunks)
    return Service(model, database, KNN, Worker(most_waiting, wait_seconds, run_seconds))
