"""Open a model for MLflow: the loader module that a model's `MLmodel` names (retro_model.training.mlmodel).

    model = mlflow.pyfunc.load_model("models/retro", model_config={"data": "data"})
    model.predict([{"prompt": "Return the indices"}], params={"seed": 1})       # what `retro generate` prints

The folder with the database is never part of a model. It is named by `data` of the model config or by the environment
variable RETRO_DATA, as `retro generate` has it in `--data`. `encoder` or RETRO_ENCODER names the encoder if it is not
found by its recorded name, and `base` or RETRO_BASE the base of a model that is adapters. A model that retrieves
refuses to write while no database is named, unless it is asked for no neighbors (`knn` 0).
"""

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_model.core.artifacts import Artifact
from retro_model.core.devices import resolve_device
from retro_model.core.errors import ConfigError, SourceError
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.inference.retriever import Retriever
from retro_model.inference.text import Sampling, encode_prompt, write_text
from retro_model.retrofit.loading import open_model

NO_DATABASE = (
    "data: no database is named, and this model retrieves; set the environment variable RETRO_DATA or the model config "
    '{"data": ...} to the folder that holds chunks, embeddings and index, or ask for knn 0'
)
NO_BASE = 'set the environment variable RETRO_BASE or the model config {"base": ...} to the place of the base'


class TextModel:
    """What MLflow calls: a model with its tokenizer and, if a database is named, its retriever."""

    def __init__(self, folder: Path, data: str, encoder: str, base: str, device: str) -> None:
        artifact = Artifact.open(folder, "model")
        self.retrieval, self.knn = artifact.facts["retrieval"], artifact.facts["knn"]
        self.tokenizer = Tokenizer.open(folder / "tokenizer")
        self.retriever: Retriever | None = None
        if self.retrieval and data:
            self.retriever = Retriever.open(data, encoder=encoder or None, device=device)
            artifact.require(tokenizer=self.retriever.tokenizer.fingerprint, chunk_size=self.retriever.chunk_size)
        elif self.retrieval:
            print(f"retro: {NO_DATABASE}", file=sys.stderr, flush=True)  # once a server answers, its log has no errors
        try:
            self.model = open_model(artifact, base, resolve_device(device))
        except SourceError as error:
            raise SourceError(f"{error}; {NO_BASE}") from error
        self._one_at_a_time = threading.Lock()  # a server calls from several threads

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Each prompt with the text that follows it. `model_input` is a table with the column `prompt`.

        `params` are those of the model's signature, which say the same as the options of `retro generate`. Each prompt
        is continued by itself, with the same seed. Raises ConfigError if neighbors are asked for and no database is
        named.
        """
        options = dict(params or {})
        knn = options.pop("knn", self.knn)
        options["top_k"] = options.get("top_k") or None
        sampling = Sampling(**options)
        retrieve = self._open_database().for_generation(knn) if knn else None
        texts = []
        for prompt in model_input["prompt"]:
            if not isinstance(prompt, str):
                raise ConfigError(f"prompt: found {type(prompt).__name__}, expected text in each row")
            ids = encode_prompt(self.model, self.tokenizer, prompt)
            with self._one_at_a_time:
                pieces = list(write_text(self.model, self.tokenizer, ids, sampling, retrieve))
            texts.append(prompt + "".join(piece.text for piece in pieces))
        return texts

    def _open_database(self) -> Retriever:
        if not self.retrieval:
            raise ConfigError("knn: found a number above 0, expected 0: this model has no retrieval")
        if self.retriever is None:
            raise ConfigError(NO_DATABASE)
        return self.retriever


def _load_pyfunc(data_path: str, model_config: Mapping[str, Any] | None = None) -> TextModel:
    """Called by MLflow with the model's folder and the model config."""
    config = model_config or {}
    data = config.get("data") or os.environ.get("RETRO_DATA", "")
    encoder = config.get("encoder") or os.environ.get("RETRO_ENCODER", "")
    base = config.get("base") or os.environ.get("RETRO_BASE", "")
    return TextModel(Path(data_path), data, encoder, base, config.get("device") or "auto")
