"""What training, evaluation and generation need of a language model with retrieval: RETRO, or Retrofit."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from retro_model.network.attention import NeighborAttention
from retro_model.network.config import RETROConfig


class LanguageModel(nn.Module, ABC):
    """A decoder that reads rows of tokens in chunks, with or without the neighbors of each chunk.

    `config` gives the sizes: vocabulary, chunk_size, pad_id, the longest text, and what retrieval adds. The arguments
    `seq`, `retrieved`, `labels` and `documents` are those of `RETRO.forward`.
    """

    config: RETROConfig

    @abstractmethod
    def forward(
        self,
        seq: Tensor,
        retrieved: Tensor | None = None,
        return_loss: bool = False,
        *,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, N, V), or with `return_loss` the mean cross-entropy over labels that are not pad."""

    @abstractmethod
    def token_losses(
        self,
        seq: Tensor,
        retrieved: Tensor | None = None,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy of each token in nats: (B, N) float32, 0 where the label is pad."""

    @abstractmethod
    def run_layers(self, seq: Tensor, retrieved: Tensor | None = None, documents: Tensor | None = None) -> None:
        """Run all layers for hooks on them, without logits.

        Cross-attention sees the chunks that have neighbors in the order of `stream_of(seq, documents)`, in one or
        more calls.
        """

    @property
    @abstractmethod
    def cross_attentions(self) -> list[NeighborAttention]:
        """The attention to neighbors of each layer that has it, from the first to the last."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    @abstractmethod
    def frozen(self) -> bool:
        """Whether the decoder is frozen, so that a text without neighbors has nothing to train."""

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Keep fewer activations for the backward pass, and compute the others again."""

    @abstractmethod
    def step_flops(self, rows: int, length: int, neighbors: int) -> float:
        """FLOPs of the matrix products of a training step with `neighbors` neighbors of each chunk."""

    # -- the weights that training may change

    def own_weights(self) -> dict[str, Tensor]:
        """All weights that belong to this model, by name; those of a frozen base do not."""
        return self.state_dict()

    def load_own_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of `own_weights`."""
        self.load_state_dict(weights)

    @abstractmethod
    def save_weights(self, folder: str | PathLike[str], weights: Mapping[str, Tensor]) -> None:
        """Write this model, with `weights` in the place of its own, to a folder."""
