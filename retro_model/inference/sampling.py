"""Choose the next token from logits: top-k and nucleus filters, temperature."""

from collections.abc import Callable

import torch
from torch import Tensor

from retro_model.core.errors import ConfigError

Filter = Callable[[Tensor, float], Tensor]


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keep the largest logits, a share 1 - thres of the vocabulary and at least one; set the others to -inf."""
    _check_share("top_k", thres)
    kept = max(1, round((1 - thres) * logits.shape[-1]))
    values, indices = logits.topk(kept, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020): keep the smallest set of most likely tokens with total probability
    thres or more; set the others to -inf."""
    _check_share("top_p", thres)
    values, indices = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # total of all likelier tokens
    values = values.masked_fill((before >= thres) & (before > 0), -torch.inf)
    return torch.empty_like(logits).scatter(-1, indices, values)


def _check_share(name: str, thres: float) -> None:
    if not 0 <= thres <= 1:
        raise ConfigError(f"filter_thres of {name} must be from 0 to 1: {thres}")


def sample(
    logits: Tensor,
    *,
    filter_fn: Filter,
    filter_thres: float,
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Sample one token per row of logits (B, V): (B,). Temperature 0 takes the most likely token after filtering."""
    if temperature == 0:
        return filter_fn(logits.float(), filter_thres).argmax(-1)
    filtered = filter_fn(logits.float() / temperature, filter_thres)
    return torch.multinomial(filtered.softmax(-1), 1, generator=generator).squeeze(-1)
