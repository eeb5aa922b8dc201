"""What this machine is asked for."""

import subprocess
import sys
import textwrap

import pytest
import torch

from retro_model.core.devices import fast_float32_products, keep_freed_memory, resolve_device
from retro_model.core.errors import ConfigError
from retro_model.memmaps.autofaiss_arguments import index_settings


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="runtime.device: found cuda, expected auto or cpu: torch sees no GPU here"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="use_gpu: found True, expected False: faiss sees no GPU here"):
        index_settings({"use_gpu": True})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other C libraries are left as they are")
def test_freed_memory_is_kept_for_what_comes_next() -> None:
    """Without it each large tensor comes from the system anew, a fault for each of its 16,384 pages."""
    assert faults_of_a_tensor(keep=False) > 10_000
    assert faults_of_a_tensor(keep=True) < 100


def faults_of_a_tensor(keep: bool) -> int:
    code = f"""
        import resource, torch
        from {keep_freed_memory.__module__} import keep_freed_memory
        if {keep}:
            keep_freed_memory()
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(30):  # until the heap is large enough for it
            torch.ones(2**24)  # 64 MiB
        before = faults()
        torch.ones(2**24)
        print(faults() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def test_fast_float32_products_are_float32() -> None:
    """torch is told that it may round to bfloat16; on the processors where it is told so, it cannot."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(512, 384, generator=generator), torch.randn(640, 384, generator=generator)
    batched = torch.randn(16, 128, 64, generator=generator)
    with fast_float32_products(torch.device("cpu")):
        assert relative_error(rows @ weight.T, rows.double() @ weight.double().T) < 1e-6
        assert relative_error(rows.T @ rows, rows.double().T @ rows.double()) < 1e-6
        assert relative_error(batched @ batched.mT, batched.double() @ batched.double().mT) < 1e-6
    rounded = rows.bfloat16() @ weight.bfloat16().T
    assert relative_error(rounded, rows.double() @ weight.double().T) > 1e-3


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_the_precision_of_products_is_as_before_after_the_block() -> None:
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    with pytest.raises(ZeroDivisionError), fast_float32_products(torch.device("cpu")):
        _ = 1 / 0
    assert products.fp32_precision == before
    with fast_float32_products(torch.device("cuda")):
        assert products.fp32_precision == before, "a GPU's products are none of its business"
