"""Resolve the settings `device` and `number_type`, and tune memory and float32 products on CPUs."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from retro_model.core.errors import ConfigError

NumberType = Literal["float32", "bfloat16"]

# Parameter numbers of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`; `auto` is the GPU if there is one.

    Raises ConfigError for `cuda` on a machine without a GPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("runtime.device: found cuda, expected auto or cpu: torch sees no GPU here")
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    return torch.device(name)


def resolve_number_type(name: str, device: torch.device) -> NumberType:
    """Return the dtype of matrix products; `auto` is bfloat16 if `device` multiplies in it natively, else float32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities()
            native = any(capabilities.get(feature, False) for feature in ("amx_bf16", "avx512_bf16"))
        return "bfloat16" if native else "float32"
    assert name in ("float32", "bfloat16"), name
    return "bfloat16" if name == "bfloat16" else "float32"


def keep_freed_memory() -> None:
    """Make malloc keep freed memory in this process for later allocations, up to the process's peak.

    By default glibc returns large blocks to the system, so on a CPU every training step allocates its activations
    anew, page by page; that takes a tenth of the step. Does nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before version 2.35, glibc accepts at most 32 MiB as M_MMAP_THRESHOLD.
    if mallopt is not None and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def fast_float32_products(device: torch.device) -> Iterator[None]:
    """Use oneDNN instead of MKL for large float32 matrix products in this block, on AMD CPUs with AVX-512.

    By default torch uses MKL, which runs 256-bit kernels on AMD processors even if they have 512-bit units. oneDNN
    uses both widths, but torch calls it only if it allows rounding to bfloat16, and oneDNN rounds only on AMX
    units. So on AMD processors with AVX-512 and without AMX we allow that rounding; products stay float32.
    Products with a single row get slower, so do not use this for token-by-token generation.
    """
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set when torch is imported
    has = torch.cpu.get_capabilities()
    before = products.fp32_precision
    if device.type == "cpu" and "AMD" in has.get("cpu_name", "") and has.get("avx512_bw") and not has.get("amx_tile"):
        products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
