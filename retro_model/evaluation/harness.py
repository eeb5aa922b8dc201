"""The model in EleutherAI's lm-evaluation-harness (the extra `lm-eval`), registered there as `retro`.

    python -m retro_model.evaluation.harness --model retro --model_args model=models/retro,data=data --device auto \\
        --tasks my_task --include_path tasks

Texts are read as the pipeline reads documents: a begin token first, and neighbors for each whole chunk of what was read
so far. `loglikelihood_rolling` scores a text as `evaluate` scores a document, in the same windows and with its end
token, so that bits per byte mean the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor

from retro_model.core.artifacts import Artifact
from retro_model.core.devices import fast_float32_products, resolve_device
from retro_model.core.errors import ConfigError
from retro_model.core.progress import progress
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.evaluation.scoring import Span, sliding_windows
from retro_model.inference.retriever import Retriever
from retro_model.inference.text import Sampling, write_text
from retro_model.retrofit.loading import open_model

DEFAULT_NEW_TOKENS = 256  # as other models of the harness


@register_model("retro")
class HarnessModel(LM):  # type: ignore[misc,unused-ignore] # where the harness is not installed, LM is Any
    """A trained model with its database. `knn` is the number of neighbors, by default as in training; 0: none.

    `base` is the place of the base if the model is adapters, by default the recorded name.

    Raises MismatchError if the database was made with another tokenizer than the model's.
    """

    def __init__(
        self,
        model: str = "models/retro",
        data: str = "data",
        encoder: str | None = None,
        knn: int | None = None,
        base: str = "",
        device: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """`batch_size` and `max_batch_size` are the harness's; texts are read one at a time."""
        super().__init__()
        device = "cuda" if device == "cuda:0" else device  # what the harness passes if its user names none
        artifact = Artifact.open(model, "model")
        self.knn: int = artifact.facts["knn"] if knn is None else knn
        self.tokenizer = Tokenizer.open(Path(model) / "tokenizer")
        self.retriever: Retriever | None = None
        if self.knn:
            self.retriever = Retriever.open(data, encoder=encoder, device=device)
            artifact.require(
                retrieval=True, tokenizer=self.retriever.tokenizer.fingerprint, chunk_size=self.retriever.chunk_size
            )
        self.model = open_model(artifact, base, resolve_device(device))
        self.chunk_size, self.most = self.model.config.chunk_size, self.model.config.max_seq_len

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log-likelihood of the continuation in nats, and whether it is the text
        that always taking the likeliest token gives.

        A context that is too long loses its beginning. Raises ConfigError if the continuation alone is too long.
        """
        shown = progress(requests, "loglikelihood", len(requests), "text")
        return [self._score_continuation(*request.args) for request in shown]

    def _score_continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        ids = [self.tokenizer.begin_id, *self.tokenizer.encode(context + continuation).tolist()]
        # Spaces at the border are parts of the continuation's tokens.
        scored = len(ids) - 1 - len(self.tokenizer.encode(context.rstrip()))
        if scored > self.most:
            raise ConfigError(f"continuation: found {scored} tokens, expected at most {self.most}")
        if scored <= 0:
            return 0.0, True
        ids = ids[-(self.most + 1) :]
        log_probabilities_NV = self._read(ids[:-1])[-scored:]
        labels_N = torch.tensor(ids[-scored:], device=log_probabilities_NV.device)
        found = log_probabilities_NV.gather(1, labels_N[:, None]).double().sum()
        return float(found), bool((log_probabilities_NV.argmax(-1) == labels_N).all())

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each text the log-likelihood in nats of all its tokens and of its end, whatever its length."""
        shown = progress(requests, "loglikelihood_rolling", len(requests), "text")
        return [self._score_document(*request.args) for request in shown]

    def _score_document(self, text: str) -> float:
        tokenizer, size = self.tokenizer, self.chunk_size
        ids = [tokenizer.begin_id, *tokenizer.encode(text).tolist(), tokenizer.end_id]
        inputs, total = len(ids) - 1, 0.0
        for first, scored, stop in sliding_windows(Span(0, -(-inputs // size)), self.most // size):
            start, new, end = first * size, scored * size, min(stop * size, inputs)
            log_probabilities_NV = self._read(ids[start:end])[new - start :]
            labels_N = torch.tensor(ids[new + 1 : end + 1], device=log_probabilities_NV.device)
            total += float(log_probabilities_NV.gather(1, labels_N[:, None]).double().sum())
        return total

    @torch.no_grad()
    def _read(self, ids: list[int]) -> Tensor:
        """The log-probabilities (N, V) of what follows each of N tokens, with neighbors of each whole chunk."""
        seq_1N = torch.tensor([ids], device=self.model.device)
        chunks = len(ids) // self.chunk_size
        retrieved = None
        if self.retriever is not None and chunks:
            chunks_LM = seq_1N[0, : chunks * self.chunk_size].reshape(chunks, self.chunk_size)
            retrieved = self.retriever.for_generation(self.knn)(chunks_LM)[None]
        with fast_float32_products(seq_1N.device):
            logits: Tensor = self.model(seq_1N, retrieved)
        return logits[0].float().log_softmax(-1)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (context, settings) the text that follows, up to the first of the strings `until`.

        A context that leaves no room for `max_gen_toks` tokens loses its beginning.
        """
        shown = progress(requests, "generate_until", len(requests), "text")
        return [self._continue(*request.args) for request in shown]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        most = min(int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), self.most - 1)
        sampled = settings.get("do_sample", False)
        sampling = Sampling(
            max_new_tokens=most,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", Sampling.top_p)),
            top_k=settings.get("top_k"),
        )
        ids = [self.tokenizer.begin_id, *self.tokenizer.encode(context).tolist()][-(self.most - most) :]
        retrieve = self.retriever.for_generation(self.knn) if self.retriever is not None else None
        text = ""
        for piece in write_text(self.model, self.tokenizer, ids, sampling, retrieve):
            text += piece.text
            if any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


if __name__ == "__main__":
    cli_evaluate()
