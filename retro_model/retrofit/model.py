"""Retrofit: a Hugging Face causal language model with retrieval (RETROfit, section 4.2.3).

    model = Retrofit("HuggingFaceTB/SmolLM2-135M")        # or a loaded AutoModelForCausalLM
    loss = model(seq, retrieved, return_loss=True)        # as RETRO
    text = model.generate(prompt, retrieve=retriever.for_generation(k=2), max_new_tokens=100)

Chunked cross-attention follows the base's layers `cross_attn_layers`: it changes their outputs through forward hooks
that exist only during a call. So the base itself stays as it is, and works alone as before. Without neighbors the
logits are exactly those of the base, and before the first training step they are so with neighbors too.

Packed documents are taken apart: each document becomes a row of its own, and documents with equally many chunks are
one batch. So attention cannot cross documents, whatever the base makes of masks and positions.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from retro_model.core.bases import decoder_layers
from retro_model.core.errors import ConfigError, SourceError
from retro_model.network.attention import NeighborAttention
from retro_model.network.flops import retrieval_flops
from retro_model.network.language_model import LanguageModel
from retro_model.network.model import check_batch, check_ids, sequence_and_labels, stream_of
from retro_model.retrofit.adapters import Adapters, WholePass
from retro_model.retrofit.bases import base_sizes, load_base
from retro_model.retrofit.config import AdapterConfig

# Changes the output of a decoder layer: (its number, its hidden states (B, N, D)) -> hidden states; None: leaves them.
Reader = Callable[[int, Tensor], Tensor | None]
Retrieve = Callable[[Tensor], Tensor]  # finished chunks (B', M) -> neighbors (B', K, R), pad where one is missing

_RETRIEVED_STAYS = "assisted decoding takes tokens back, and what was retrieved for them stays"
_NOT_SUPPORTED = {
    "assistant_model": _RETRIEVED_STAYS,
    "prompt_lookup_num_tokens": _RETRIEVED_STAYS,
    "custom_generate": "code from elsewhere is not run",
    "trust_remote_code": "code from elsewhere is not run",
}


class _Rows(NamedTuple):
    """Rows of a batch that the base reads at once; each is one document."""

    places: Tensor | None  # of its tokens in the flattened batch; None: it is the whole batch
    seq_BN: Tensor
    retrieved_BLKR: Tensor | None


class Retrofit(LanguageModel):
    """A causal language model with retrieval. `base` is one of transformers, or its name or folder.

    The other arguments are `chunk_size` and the fields of AdapterConfig. With `freeze` only the adapters are trained,
    and the base stays in eval mode. Adapters have the base's number type, but at least float32. With
    `retrieval=False` there are no adapters: the model is the base, which reads packed documents.

    Raises SourceError for a base that cannot be loaded or has no decoder layers to attach to, and ConfigError.
    """

    def __init__(
        self,
        base: PreTrainedModel | str | os.PathLike[str],
        chunk_size: int = 64,
        *,
        freeze: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = AdapterConfig(chunk_size=chunk_size, **settings)
        self.base = base if isinstance(base, PreTrainedModel) else load_base(base)
        sizes = base_sizes(self.base, len(decoder_layers(self.base, config.layers)))
        self.settings = config.resolved(sizes)
        self.config = self.settings.network(sizes)
        self.vocab_size = sizes.vocab_size
        self.base_name = self.base.name_or_path  # under which it is recorded with the adapters
        self.adapters = Adapters(self.config)
        reference = self.embedding.weight
        self.adapters.to(reference.device, torch.promote_types(reference.dtype, torch.float32))
        self.base.requires_grad_(not freeze)
        self.train(self.base.training)

    # -- the parts

    @property
    def embedding(self) -> nn.Embedding:
        """The base's embeddings of tokens, which are also those of the neighbors' tokens."""
        return cast("nn.Embedding", self.base.get_input_embeddings())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def cross_attentions(self) -> list[NeighborAttention]:
        """The attention to neighbors after each layer that has it, from the first to the last."""
        return [self.adapters.of_layer(number).inner for number in sorted(self.config.dec_cross_attn_layers)]

    @property
    def frozen(self) -> bool:
        """Whether the base is frozen."""
        return not self.embedding.weight.requires_grad

    def train(self, mode: bool = True) -> "Retrofit":
        """Set the mode of the adapters, and of the base unless it is frozen: its dropout would only add noise."""
        super().train(mode)
        if self.frozen:
            cast("nn.Module", self.base).eval()
        return self

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The new weights by name: the parameters themselves, not copies."""
        return dict(self.adapters.named_parameters())

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of each base layer, and recompute the rest in the backward pass.

        Unlike the base's own gradient checkpointing this also works in eval mode, which a frozen base is in, and
        leaves the hooks outside of what is recomputed.
        """
        for layer in self._layers:
            if not isinstance(layer.forward, partial):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        for module in self.base.modules():
            if getattr(module, "gradient_checkpointing", False):
                cast("Any", module).gradient_checkpointing = False

    def step_flops(self, rows: int, length: int, neighbors: int) -> float:
        """FLOPs of the matrix products of a training step: see network/flops.py.

        A frozen base has no gradients of weights, and none at all below the first cross-attention.
        """
        config, tokens = self.config, rows * length
        scores = 2 * tokens * length * config.dec_dim  # of a layer; causal: half of all
        weights = [sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1) for layer in self._layers]
        forward = [2 * tokens * number + scores for number in weights]
        head = 2 * tokens * config.dec_dim * self.vocab_size
        retrieval = 3 * retrieval_flops(config, tokens, neighbors)
        if not self.frozen:
            return 3.0 * (sum(forward) + head) + retrieval
        first = min(config.dec_cross_attn_layers, default=config.dec_depth)
        return float(sum(forward) + head + sum(forward[first:]) + head + retrieval)

    @property
    def _layers(self) -> list[nn.Module]:
        return list(decoder_layers(self.base, self.settings.layers))

    # -- logits and losses

    def forward(
        self,
        seq: Tensor,
        retrieved: Tensor | None = None,
        return_loss: bool = False,
        *,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, N, V), or with `return_loss` the mean cross-entropy over labels that are not pad.

        The arguments are those of `RETRO.forward`, with the base's token ids.
        """
        seq, labels = sequence_and_labels(seq, labels, return_loss)
        if labels is not None:
            losses_BN = self.token_losses(seq, retrieved, labels, documents)
            return losses_BN.sum() / (labels != self.config.pad_id).sum().clamp(min=1)
        rows = self._rows(seq, retrieved, documents)
        return _to_batch(seq, self.config.chunk_size, [(each.places, self._logits(each)) for each in rows])

    def token_losses(
        self,
        seq: Tensor,
        retrieved: Tensor | None = None,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy of each token in nats: (B, N) float32, 0 where the label is pad."""
        if labels is None or labels.shape != seq.shape:
            found = None if labels is None else tuple(labels.shape)
            raise ConfigError(f"labels must have the shape of seq, {tuple(seq.shape)}: {found}")
        rows = self._rows(seq, retrieved, documents)
        check_ids("labels", labels, self.config.num_tokens)
        padded_BN = _pad_to_chunks(labels.long(), self.config.chunk_size, self.config.pad_id)
        losses = []
        for each in rows:
            labels_BN = labels.long() if each.places is None else padded_BN.flatten()[each.places].view_as(each.seq_BN)
            losses.append((each.places, self._losses(self._logits(each), labels_BN)))
        return _to_batch(seq, self.config.chunk_size, losses)

    def _losses(self, logits_BNV: Tensor, labels_BN: Tensor) -> Tensor:
        labeled_BN = labels_BN != self.config.pad_id
        losses_BN = logits_BNV.new_zeros(labels_BN.shape, dtype=torch.float32)
        losses = F.cross_entropy(logits_BNV[labeled_BN].float(), labels_BN[labeled_BN], reduction="none")
        return losses_BN.masked_scatter(labeled_BN, losses)

    def run_layers(self, seq: Tensor, retrieved: Tensor | None = None, documents: Tensor | None = None) -> None:
        """Run all layers for hooks on them, without logits."""
        for each in self._rows(seq, retrieved, documents):
            self._run(each, cast("Any", self.base).get_decoder())

    def _logits(self, rows: _Rows) -> Tensor:
        """The base's logits (B, N, V), with cross-attention if the rows have neighbors."""
        logits: Tensor = self._run(rows, self.base).logits
        return logits

    def _run(self, rows: _Rows, network: Callable[..., Any]) -> Any:
        """What the base, or its decoder without the head, makes of the rows."""
        seq_BN = self.existing(rows.seq_BN)
        if any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            self.checkpoint_activations()
        if rows.retrieved_BLKR is None or not bool((rows.retrieved_BLKR != self.config.pad_id).any()):
            return network(input_ids=seq_BN, use_cache=False)
        with self.attached(WholePass(self, seq_BN, rows.retrieved_BLKR)):
            return network(input_ids=seq_BN, use_cache=False)

    def _rows(self, seq: Tensor, retrieved: Tensor | None, documents: Tensor | None) -> list[_Rows]:
        """Take a batch apart into rows of one document each; rows of the same length stay together."""
        check_batch(self.config, seq, retrieved, documents)
        if retrieved is not None:
            retrieved = retrieved.long() if retrieved.dim() == 4 else retrieved.long()[:, :, None]
        if documents is None:
            return [_Rows(None, seq.long(), retrieved)]
        m, pad_id = self.config.chunk_size, self.config.pad_id
        seq_CM = _pad_to_chunks(seq.long(), m, pad_id).view(-1, m)
        chunks = len(seq_CM) // len(seq)
        if retrieved is not None:
            retrieved = F.pad(retrieved, (0, 0, 0, 0, 0, chunks - retrieved.shape[1]), value=pad_id).flatten(0, 1)
        order_C, groups, _ = stream_of(seq, documents, m)
        assert order_C is not None
        rows = []
        for (count, length), order in zip(groups, torch.split(order_C, [a * b for a, b in groups]), strict=True):
            places = (order[:, None] * m + torch.arange(m, device=order.device)).flatten()
            found = None if retrieved is None else retrieved[order].view(count, length, *retrieved.shape[1:])
            rows.append(_Rows(places, seq_CM[order].view(count, length * m), found))
        return rows

    # -- what readers need

    def existing(self, ids: Tensor) -> Tensor:
        """The ids with padding replaced if the base has no embedding for it. Nothing ever attends to padding."""
        return ids.masked_fill(ids == self.config.pad_id, 0) if self.config.pad_id >= self.vocab_size else ids

    def embed(self, ids: Tensor) -> Tensor:
        """The base's embeddings of tokens, in the adapters' number type: (..., D)."""
        embedded: Tensor = F.embedding(self.existing(ids), self.embedding.weight)
        return embedded.to(self.adapters.dtype)

    def output_rows(self, retrieved_AKR: Tensor) -> Tensor | None:
        """The normalized rows of the output matrix of the neighbors' tokens (A, J, D): see RETRO."""
        if not self.config.copy_rows:
            return None
        weight_VD = cast("Any", self.base).get_output_embeddings().weight
        rows = F.embedding(self.existing(retrieved_AKR.flatten(1)), weight_VD).to(self.adapters.dtype)
        return F.rms_norm(rows, rows.shape[-1:])

    @contextmanager
    def attached(self, reader: Reader) -> Iterator[None]:
        """In the block, `reader` changes the outputs of the base's layers with cross-attention."""
        layers = self._layers
        hooks = [
            layers[number - 1].register_forward_hook(partial(_change_output, reader, number))
            for number in self.config.dec_cross_attn_layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # -- generation

    def generate(self, input_ids: Tensor, retrieve: Retrieve | None = None, **options: Any) -> Any:
        """Generate with the base's own `generate`, whose `options` and result these are; pad prompts on the left.

        `retrieve` maps finished chunks (B', M) to their neighbors (B', K, R). It is called once for all complete
        chunks of the prompts, and then at each chunk boundary; chunks are counted from each row's first token. None:
        no retrieval. To continue a text, pass its RetrievalCache as `past_key_values`.

        Without `attention_mask` every token of the prompt is read, also one that equals the base's padding token; an
        id that no token has is always padding.

        Raises ConfigError for assisted decoding, and for code from elsewhere.
        """
        from retro_model.retrofit.cache import RetrievalCache

        for name, reason in _NOT_SUPPORTED.items():
            if options.get(name) is not None:
                raise ConfigError(f"generate: {name} is not supported: {reason}")
        cache = options.pop("past_key_values", None)
        if cache is None:
            cache = RetrievalCache(self, retrieve)
        elif not isinstance(cache, RetrievalCache) or retrieve is not None:
            raise ConfigError("generate: past_key_values must be a RetrievalCache, which already knows how to retrieve")
        if options.get("attention_mask") is None:
            options["attention_mask"] = (input_ids == self.existing(input_ids)).long()
        was_training = self.training
        self.eval()
        try:
            with cache.reading():
                written = cast("Any", self.base).generate(self.existing(input_ids), past_key_values=cache, **options)
        finally:
            self.train(was_training)
        ids = written if isinstance(written, Tensor) else written.sequences
        ids[:, : input_ids.shape[1]] = input_ids.repeat_interleave(len(ids) // len(input_ids), dim=0)
        return written

    # -- files

    def save_pretrained(self, folder: str | os.PathLike[str], *, full: bool = False) -> None:
        """Write adapters.safetensors and config.json; with `full`, or if the base is trained, also the base."""
        from retro_model.retrofit.pretrained import save

        save(self, folder, self.own_weights(), with_base=full or not self.frozen)

    def own_weights(self) -> dict[str, Tensor]:
        """The adapters, and the base unless it is frozen, by their names in `named_parameters`."""
        own = self.named_parameters()
        return {name: weight.detach() for name, weight in own if name.startswith("adapters.") or not self.frozen}

    def load_own_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of `own_weights`."""
        from retro_model.network.pretrained import check_names

        check_names(set(weights), set(self.own_weights()), "these weights")
        self.load_state_dict(weights, strict=False)

    def describe_base(self) -> dict[str, Any]:
        """What identifies the base: name, revision on the hub, number type, and the sha256 of its weights."""
        from retro_model.retrofit.pretrained import describe_base

        return describe_base(self)

    def save_weights(self, folder: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
        """As `save_pretrained`, with these weights."""
        from retro_model.retrofit.pretrained import save

        save(self, folder, weights, with_base=not self.frozen)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        base: PreTrainedModel | str | os.PathLike[str] | None = None,
        *,
        chunk_size: int | None = None,
        freeze: bool = True,
    ) -> "Retrofit":
        """Load a model that `save_pretrained` wrote, in eval mode.

        `base` None: the one in the folder, or the one of the recorded name. `chunk_size` is what the caller's chunks
        have.

        Raises MismatchError if the base has other weights than the one the adapters were trained with, or for another
        chunk size; MissingArtifactError, DamagedArtifactError or SourceError.
        """
        from retro_model.retrofit.pretrained import load

        return load(cls, folder, base, chunk_size, freeze)


def _change_output(reader: Reader, number: int, layer: nn.Module, arguments: Any, output: Any) -> Any:
    """A forward hook: decoder layers give their hidden states, alone or as the first part of a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise SourceError(
            f"base: layer {number}, a {type(layer).__name__}, gives no hidden states (batch, tokens, width)"
        )
    changed = reader(number, hidden)
    if changed is None:
        return None
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _pad_to_chunks(ids_BN: Tensor, chunk_size: int, pad_id: int) -> Tensor:
    return F.pad(ids_BN, (0, -ids_BN.shape[1] % chunk_size), value=pad_id)


def _to_batch(seq: Tensor, chunk_size: int, parts: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    """Put the values (B', N', ...) of the parts at their places in the batch: (B, N, ...)."""
    if parts[0][0] is None:
        return parts[0][1]
    (rows, length), values = seq.shape, torch.cat([part.flatten(0, 1) for _, part in parts])
    places = torch.cat([cast("Tensor", places) for places, _ in parts])
    ordered = torch.empty_like(values).index_copy(0, places, values)
    return ordered.view(rows, -1, *values.shape[1:])[:, :length]
