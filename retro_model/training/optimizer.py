"""What training needs besides network and data: number type, random numbers, schedule, optimizer."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from retro_model.core.devices import NumberType
from retro_model.training.sharding import part_of, whole

# One stream of random numbers for each purpose, all from the seed and the step.
NEIGHBOR_DROPOUT, DROPOUT, RANDOM_NEIGHBORS = 1, 2, 3


def autocast(number_type: NumberType, device: torch.device) -> AbstractContextManager[object]:
    """Runs matrix products in bfloat16 if that is the type; weights and sums stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=number_type == "bfloat16")


def random_numbers(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Random numbers that depend on the arguments alone, so that a resumed run draws the same."""
    return np.random.default_rng([seed, step, purpose])


def reseed(seed: int, step: int, purpose: int, rank: int = 0) -> None:
    """Sets torch's generators, which dropout draws from, as a function of the arguments alone."""
    torch.manual_seed(int(random_numbers(seed, step, purpose).integers(2**63, size=rank + 1)[rank]))


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, schedule: str, floor: float) -> float:
    """The rate of a step (from 0): linear warm-up to `peak`, then constant, or a cosine to `floor * peak`.

    The cosine reaches its floor after the last step.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    assert schedule == "cosine", schedule
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on parameters of two or more dimensions only, in the order of the model.

    A stable order is what lets a saved state fit another process.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    not_empty = [group for group in groups if group["params"]]
    return torch.optim.AdamW(not_empty, lr=lr, betas=(0.9, 0.95), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm_clipped(parameters: Iterable[Tensor], maximum: float) -> Tensor:
    """The norm of all gradients together, which are then scaled down to `maximum` at most (0: never)."""
    norm = nn.utils.clip_grad_norm_(parameters, maximum or math.inf)
    full_tensor = getattr(norm, "full_tensor", None)  # of gradients that are cut among processes
    return norm if full_tensor is None else full_tensor()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the parameters' names: `decoder.0.up.weight/exp_avg`.

    Of a model that is cut among processes it is the whole state, and all must ask.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": whole(value)
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
        state.setdefault(places[name], {})[key] = part_of(tensor, parameters[places[name]])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
