"""Models on disk: what goes in comes out, and nothing else is taken. Retrofit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_network import SMALL, M, make, retrieved_for, tokens

from retro_model.core.errors import ConfigError, DamagedArtifactError, MismatchError, MissingArtifactError
from retro_model.network.model import RETRO
from retro_model.network.pretrained import CONFIG_NAME, WEIGHTS_NAME, load_config
from retro_model.training.warm_start import retrofit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- saving and loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"retrieval": False}, {"norm_klass": "layernorm"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = make(**changes).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = RETRO.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    seq = tokens(2, 2 * M)
    retrieved = retrieved_for(seq) if model.config.retrieval else None
    assert torch.equal(model(seq, retrieved), loaded(seq, retrieved))
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
    converted = RETRO.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float32)
    assert {p.dtype for p in converted.parameters()} == {torch.float32}


def test_what_is_written(folder: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert load_config(folder) == make().config
    make().save_pretrained(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_whoever_may_read_the_config_may_read_the_weights(folder: Path) -> None:
    assert (folder / WEIGHTS_NAME).stat().st_mode == (folder / CONFIG_NAME).stat().st_mode


def test_a_config_from_before_copying_is_the_network_without_it(folder: Path) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert config.pop("copy_tokens") == 0 and config.pop("cross_attn_sink") is False
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    seq = tokens(2, 2 * M)
    assert torch.equal(RETRO.from_pretrained(folder)(seq, retrieved_for(seq)), make()(seq, retrieved_for(seq)))
    del config["heads"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"missing model config keys \['heads'\]"):
        RETRO.from_pretrained(folder)


def test_saving_over_an_older_model(folder: Path) -> None:
    model = make(seed=1, dec_depth=2, dec_cross_attn_layers=(1,))
    model.save_pretrained(folder)
    seq = tokens(1, 2 * M)
    assert torch.equal(RETRO.from_pretrained(folder)(seq), model(seq))


def test_an_interrupted_save_is_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retro_model.network.pretrained.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        make(seed=1).save_pretrained(folder)
    with pytest.raises(MissingArtifactError, match=CONFIG_NAME):
        RETRO.from_pretrained(folder)


def test_a_model_that_cannot_be_saved_destroys_nothing(folder: Path) -> None:
    class Own(torch.nn.LayerNorm):
        pass

    with pytest.raises(ConfigError, match="norm_klass"):
        RETRO(**SMALL, norm_klass=Own).save_pretrained(folder)
    RETRO.from_pretrained(folder)


# ---- refusing --------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG_NAME).read_text())
    values.update(changes)
    (folder / CONFIG_NAME).write_text(json.dumps({k: v for k, v in values.items() if v != "remove"}))


def edit_weights(folder: Path, **changes: Any) -> None:
    weights = load_file(folder / WEIGHTS_NAME)
    for name, tensor in changes.items():
        if tensor is None:
            del weights[name.replace("__", ".")]
        else:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / WEIGHTS_NAME)


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, embedding__weight=None)
    with pytest.raises(MismatchError, match=r"lacks 1 tensors.*embedding.weight"):
        RETRO.from_pretrained(folder)


def test_extra_tensor(folder: Path) -> None:
    edit_weights(folder, bias=torch.zeros(3))
    with pytest.raises(MismatchError, match=r"has 1 tensors.*bias"):
        RETRO.from_pretrained(folder)


def test_misshapen_tensor(folder: Path) -> None:
    edit_weights(folder, embedding__weight=torch.zeros(5, 8))
    with pytest.raises(MismatchError, match=r"embedding.weight.*\(23, 8\).*\(5, 8\)"):
        RETRO.from_pretrained(folder)


def test_config_of_another_model(folder: Path) -> None:
    edit_config(folder, dec_depth=4)
    with pytest.raises(MismatchError, match=r"lacks.*decoder\.3"):
        RETRO.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 7}, r"config\.json: unknown.*window"),
        ({"heads": "remove"}, r"config\.json: missing.*heads"),
        ({"heads": "two"}, r"config\.json: heads"),
        ({"dec_cross_attn_layers": [9]}, r"config\.json: dec_cross_attn_layers.*9"),
    ],
)
def test_config_keys(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        RETRO.from_pretrained(folder)


def test_no_folder_and_no_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match="nowhere"):
        RETRO.from_pretrained(tmp_path / "nowhere")
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(MissingArtifactError, match=WEIGHTS_NAME):
        RETRO.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_damaged_config(folder: Path, text: str) -> None:
    (folder / CONFIG_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(DamagedArtifactError, match=CONFIG_NAME):
        RETRO.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedArtifactError, match=WEIGHTS_NAME):
        RETRO.from_pretrained(folder)


# ---- retrofit --------------------------------------------------------------------------------------

RETRIEVAL = {name: SMALL[name] for name in ("enc_dim", "enc_depth", "dec_cross_attn_layers")}


@pytest.mark.parametrize("deepnet", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("copying", [{}, {"copy_tokens": 2, "cross_attn_sink": True}])
def test_retrofit_off_is_exactly_the_base_model(deepnet: bool, tied: bool, copying: dict[str, Any]) -> None:
    base = make(retrieval=False, use_deepnet=deepnet, tie_embeddings=tied)
    model = retrofit(base, **RETRIEVAL, **copying).eval()
    seq = tokens(2, 3 * M + 1)
    assert torch.equal(model(seq), base(seq))
    assert not torch.equal(model(seq, retrieved_for(seq)), base(seq))


def test_retrofit_trains_only_what_is_new() -> None:
    base = make(retrieval=False)
    model = retrofit(base, **RETRIEVAL)
    old = set(base.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in old), name
        assert name in old or name.startswith("encoder.") or ".cross_attention." in name
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seq = tokens(2, 3 * M + 1)
    for _ in range(2):
        model(seq, retrieved_for(seq[:, :-1]), return_loss=True).backward()
        optimizer.step()
    assert torch.equal(model.eval()(seq), base(seq))
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert set(moved) == {name for name, _ in model.named_parameters()} - old


def test_retrofit_of_everything_leaves_the_base_alone() -> None:
    base = make(retrieval=False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = retrofit(base, freeze=False, **RETRIEVAL)
    assert all(parameter.requires_grad for parameter in model.parameters())
    seq = tokens(2, 3 * M + 1)
    model(seq, retrieved_for(seq[:, :-1]), return_loss=True).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_retrofit_refuses() -> None:
    with pytest.raises(ConfigError, match="has retrieval already"):
        retrofit(make(), **RETRIEVAL)
    with pytest.raises(ConfigError, match="cannot change dec_depth"):
        retrofit(make(retrieval=False), dec_depth=9)


def test_a_retrofitted_model_is_saved_like_any_other(tmp_path: Path) -> None:
    model = retrofit(make(retrieval=False), **RETRIEVAL).eval()
    model.save_pretrained(tmp_path)
    seq = tokens(1, 2 * M)
    assert torch.equal(RETRO.from_pretrained(tmp_path)(seq, retrieved_for(seq)), model(seq, retrieved_for(seq)))
