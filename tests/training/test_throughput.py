"""The matrix products of a training step, and the peak that its pace is a share of."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retro_model.network.config import RETROConfig
from retro_model.network.flops import step_flops
from retro_model.network.model import RETRO
from retro_model.training.throughput import DATA_SHEETS, known_chip, peak


def test_a_known_chip_has_its_data_sheet_and_another_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = peak(torch.device("cpu"), "float32")
    assert found.rate > 1e8 and found.source == "the fastest matrix product"
    assert peak(torch.device("cpu"), "float32") == found, "measured once"
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA A10G": 70e12}
    for name, rate in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak(torch.device("cuda"), "bfloat16").rate == rate, name
        assert peak(torch.device("cuda"), "float32").rate < rate
    assert all(bfloat16 > float32 for bfloat16, float32 in DATA_SHEETS.values())
    assert known_chip("NVIDIA L40S") == "L40S" and known_chip("NVIDIA L40") is None and known_chip("AMD EPYC") is None


def test_products_grow_with_what_is_computed() -> None:
    config = RETROConfig(num_tokens=50, enc_dim=16, enc_depth=1, dec_dim=8, dec_depth=2, dec_cross_attn_layers=(2,))
    bare = step_flops(config, 2, 128, 0)
    assert step_flops(config, 4, 128, 0) == 2 * bare
    assert bare < step_flops(config, 2, 128, 1) < step_flops(config, 2, 128, 2)


def test_products_are_those_that_torch_counts() -> None:
    """Forward and backward, without the causal half of the attention, which torch does not leave out."""
    model = RETRO(
        num_tokens=50, max_seq_len=32, enc_dim=16, enc_depth=2, enc_cross_attn_layers=(2,), dec_dim=8, dec_depth=2,
        dec_cross_attn_layers=(2,), heads=2, dim_head=4, chunk_size=4,
    )  # fmt: skip
    seq, retrieved = torch.randint(1, 50, (2, 16)), torch.randint(1, 50, (2, 4, 2, 8))
    for neighbors, given in ((2, retrieved), (0, None)):
        with FlopCounterMode(display=False) as counter:
            model(seq, given)
        counts = counter.get_flop_counts()["Global"]
        linear = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
        scores = sum(count for name, count in counts.items() if name not in (torch.ops.aten.mm, torch.ops.aten.addmm))
        # causal attention in one block computes all scores; `products` counts the half that is needed
        unneeded = 2 * 16 * model.config.dec_depth * 2 * 8 * 16
        assert 3 * (linear + scores - unneeded) == step_flops(model.config, 2, 16, neighbors)
