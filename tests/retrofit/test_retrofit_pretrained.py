"""Adapters on disk: they come back bit for bit, and onto their own base alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import opened, tiny_base, token_rows
from transformers import AutoModelForCausalLM

from retro_model import Retrofit
from retro_model.core.errors import (
    ConfigError,
    DamagedArtifactError,
    MismatchError,
    MissingArtifactError,
    RetroError,
    SourceError,
)

M = 8
SEQ, RETRIEVED = token_rows(2, 27), token_rows(2, 3, 2, 16, seed=1)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A base's folder."""
    tiny_base("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(tmp_path: Path, base_folder: Path) -> Path:
    """A model's folder, around that base."""
    opened(Retrofit(base_folder, M, pad_id=0)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_base("gpt2", dtype).save_pretrained(tmp_path / "base")
    model = opened(Retrofit(tmp_path / "base", M, enc_cross_attn_layers=None, cross_attn_layers=(1, 3)))
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["adapters.safetensors", "config.json"]
    for base in (None, tmp_path / "base", tiny_base("gpt2", dtype)):
        again = Retrofit.from_pretrained(tmp_path / "model", base)
        assert again.settings == model.settings and not again.training and again.frozen
        assert torch.equal(again(SEQ, RETRIEVED), model(SEQ, RETRIEVED))
        for name, weight in model.adapter_state_dict().items():
            assert torch.equal(again.adapter_state_dict()[name], weight) and weight.requires_grad, name
    model.save_pretrained(tmp_path / "again")
    for name in ("adapters.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_the_weights_are_the_parameters_themselves() -> None:
    model = Retrofit(tiny_base("llama"), M)
    weights = model.adapter_state_dict()
    assert {id(weight) for weight in weights.values()} == {id(weight) for weight in model.adapters.parameters()}


def test_a_trained_base_is_saved_beside_the_adapters(tmp_path: Path) -> None:
    model = opened(Retrofit(tiny_base("qwen2"), M, freeze=False))
    with torch.no_grad():
        model.embedding.weight[3] += 1
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(Retrofit.from_pretrained(tmp_path / "trained")(SEQ, RETRIEVED), model(SEQ, RETRIEVED))
    AutoModelForCausalLM.from_pretrained(tmp_path / "trained/base")
    assert len({file.stat().st_mode for file in (tmp_path / "trained").rglob("*") if file.is_file()}) == 1
    opened(Retrofit(tiny_base("qwen2"), M)).save_pretrained(tmp_path / "full", full=True)
    assert Retrofit.from_pretrained(tmp_path / "full", freeze=False).frozen is False


def test_adapters_are_refused_on_another_base(saved: Path) -> None:
    for other in (tiny_base("llama", seed=1), tiny_base("llama", torch.bfloat16), tiny_base("mistral", seed=2)):
        with pytest.raises(MismatchError, match=r"adapters for .* in float32 \(sha256 \w{12}\), found a base in"):
            Retrofit.from_pretrained(saved, other)
    changed = tiny_base("llama")
    with torch.no_grad():
        changed.get_input_embeddings().weight[0, 0] += 1e-3
    with pytest.raises(MismatchError, match="load the base that they were trained with"):
        Retrofit.from_pretrained(saved, changed)


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_a_folder_that_was_saved_before_there_was_a_revision_loads(saved: Path) -> None:
    expected = Retrofit.from_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    del config["retrieval"], config["base"]["revision"]
    (saved / "config.json").write_text(json.dumps(config))
    again = Retrofit.from_pretrained(saved)
    assert again.settings == expected.settings
    assert torch.equal(again(SEQ, RETRIEVED), expected(SEQ, RETRIEVED))


def without_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(folder, base={**config["base"], "name": ""})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), MissingArtifactError, "config.json is not there"),
        (
            lambda folder: (folder / "adapters.safetensors").unlink(),
            MissingArtifactError,
            "adapters.safetensors is not",
        ),
        (
            lambda folder: (folder / "adapters.safetensors").write_bytes(b"\x80\x04"),
            DamagedArtifactError,
            "cannot be read",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), DamagedArtifactError, "is not JSON"),
        (lambda folder: change(folder, base="gpt2"), DamagedArtifactError, "does not say which base"),
        (
            lambda folder: change(folder, base={"name": "x", "dtype": "save", "sha256": ""}),
            DamagedArtifactError,
            "which base",
        ),
        (lambda folder: change(folder, heads=3), MismatchError, "must have the shape"),
        (lambda folder: change(folder, chunk_size=0), ConfigError, "chunk_size: found 0"),
        (lambda folder: change(folder, more=1), ConfigError, "more: unknown key"),
        (lambda folder: change(folder, cross_attn_sink=False), MismatchError, "has 1 tensors that the network lacks"),
        (without_name, SourceError, "the base of these adapters has no name; pass it"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    saved: Path, damage: Any, error: type[RetroError], message: str
) -> None:
    damage(saved)
    with pytest.raises(error, match=message) as caught:
        Retrofit.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_another_chunk_size_is_refused(saved: Path) -> None:
    assert Retrofit.from_pretrained(saved, chunk_size=M).config.chunk_size == M
    with pytest.raises(MismatchError, match="adapters for chunks of 8 tokens, expected 16"):
        Retrofit.from_pretrained(saved, chunk_size=16)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    no_weights(folder)
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")


def with_code(folder: Path) -> None:
    """A model that only code beside its weights could build."""
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": classes}))
    (folder / "evil.py").write_text("raise SystemExit('this code must not run')\n")


def encoder_decoder(folder: Path) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_weights, "safetensors"),
        (pickled, "safetensors"),
        (with_code, "cannot be loaded"),
        (encoder_decoder, "cannot be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04"), "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_base_is_refused_in_one_line(base_folder: Path, change: Any, message: str) -> None:
    change(base_folder)
    with pytest.raises(SourceError, match=message) as caught:
        Retrofit(base_folder)
    assert "\n" not in str(caught.value)


def test_a_base_that_is_not_there_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="no such folder, and not on the hub") as caught:
        Retrofit(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
