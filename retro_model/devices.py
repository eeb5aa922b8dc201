"""Where to compute, and in which numbers: what `auto` stands for on this machine."""

from typing import Literal

import torch

from retro_model.errors import ConfigError

NumberType = Literal["float32", "bfloat16"]


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for here; `auto` is the GPU where there is one.

    Raises ConfigError where cuda is asked for and absent.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("runtime.device: found cuda, expected auto or cpu: torch sees no GPU here")
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    return torch.device(name)


def resolve_number_type(name: str, device: torch.device) -> NumberType:
    """The type of matrix products: `auto` is bfloat16 where `device` multiplies in it natively, else float32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities()
            native = any(capabilities.get(feature, False) for feature in ("amx_bf16", "avx512_bf16"))
        return "bfloat16" if native else "float32"
    assert name in ("float32", "bfloat16"), name
    return "bfloat16" if name == "bfloat16" else "float32"
