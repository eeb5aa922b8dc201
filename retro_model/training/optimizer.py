"""Autocast, random numbers, learning rate schedule, and the optimizer and its state."""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retro_model.core.devices import NumberType
from retro_model.training.sharding import full_copy, local_part

# A separate stream of random numbers for each purpose; all depend only on seed and step.
NEIGHBOR_DROPOUT, DROPOUT, RANDOM_NEIGHBORS = 1, 2, 3


def autocast(number_type: NumberType, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16 if that is the number type; weights and sums stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=number_type == "bfloat16")


def random_numbers(seed: int, step: int, purpose: int) -> np.random.Generator:
    """A generator seeded by the arguments alone, so that a resumed run draws the same numbers."""
    return np.random.default_rng([seed, step, purpose])


def reseed(seed: int, step: int, purpose: int, rank: int = 0) -> None:
    """Seed torch's generators, from which dropout draws, as a function of the arguments alone."""
    torch.manual_seed(int(random_numbers(seed, step, purpose).integers(2**63, size=rank + 1)[rank]))


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, schedule: str, floor: float) -> float:
    """The learning rate of a step (from 0): linear warm-up to `peak`, then constant, or a cosine to `floor * peak`.

    The cosine would reach its floor at step `steps`, one after the last.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    assert schedule == "cosine", schedule
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


class AdamW(torch.optim.AdamW):
    """torch's AdamW without what its methods do for torch.compile; no step of the optimizer is compiled here.

    Those guards import torch's compiler, even if nothing is compiled. That takes as long as `import torch` itself.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the weights."""
        return inspect.unwrap(torch.optim.Adam.step)(self, closure)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay only on parameters of two or more dimensions.

    Parameters keep the model's order, so that another process can load a saved state.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    not_empty = [group for group in groups if group["params"]]
    return AdamW(not_empty or groups, lr=lr, betas=(0.9, 0.95), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], maximum: float) -> Tensor:
    """Clip the global gradient norm to `maximum` (0: no clipping), and return the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(parameters, maximum or math.inf)
    full_tensor = getattr(norm, "full_tensor", None)  # a DTensor, if gradients are sharded
    return norm if full_tensor is None else full_tensor()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, for example `decoder.0.up.weight/exp_avg`.

    If the model is sharded, this gathers full tensors, and all processes must call it.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": full_copy(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {names[parameter]: place for place, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(places[name], {})[key] = local_part(tensor, parameters[places[name]])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
