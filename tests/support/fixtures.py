"""Small local stand-ins for what the tests must not download: an encoder and a corpus, made in seconds.

    encoder = tiny_encoder(tmp_path / "encoder")   # a folder that `embed.encoder` can name
    corpus = tiny_corpus(tmp_path / "documents")   # a folder that `documents` can name
    data = tiny_data(tmp_path / "data", corpus)    # data/tokenizer and data/chunks, as the stages write them
    write_vectors(tmp_path / "data", ...)          # data/chunks and data/embeddings, made up

All are functions of their arguments alone: the same seed gives the same bytes.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.core.artifacts import SPLITS, Artifact, ArtifactWriter, write_description
from retro_model.corpus.chunking import make_chunks
from retro_model.corpus.documents import CorpusConfig
from retro_model.corpus.tokenizer_training import TokenizerConfig, make_tokenizer

ENCODER_DIM = 32
SYLLABLES = (
    "ba",
    "co",
    "di",
    "fu",
    "ga",
    "lem",
    "mi",
    "nor",
    "pa",
    "que",
    "ri",
    "sto",
    "tu",
    "ver",
    "wa",
    "zen",
)


def _words(generator: random.Random, num_words: int = 400) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < num_words:
        words["".join(generator.choices(SYLLABLES, k=generator.randint(1, 3)))] = None
    return list(words)


def _sentence(generator: random.Random, topic: list[str]) -> str:
    words = generator.choices(topic, k=generator.randint(5, 12))
    return words[0].capitalize() + " " + " ".join(words[1:]) + generator.choice((".", ".", ".", "?", "!"))


def tiny_corpus(folder: Path, num_documents: int = 48, seed: int = 0) -> Path:
    """Writes `num_documents` .txt files of 60 to 400 words and returns the folder.

    Six topics, each with its own words; every third file lies in a subfolder. Two documents in three
    quote one of eight passages, word for word, in a different place: real neighbors in other documents,
    and far from enough for the documents to count as near-duplicates. Some lines are not ASCII.
    """
    generator = random.Random(seed)
    words = _words(generator)
    topics = [words[40 * number : 40 * number + 160] for number in range(6)]
    passages = [" ".join(_sentence(generator, topics[number % 6]) for _ in range(6)) for number in range(8)]
    for number in range(num_documents):
        topic = topics[number % len(topics)]
        paragraphs = [
            " ".join(_sentence(generator, topic) for _ in range(generator.randint(2, 5)))
            for _ in range(generator.randint(3, 7))
        ]
        if number % 3:
            paragraphs.insert(generator.randrange(len(paragraphs)), passages[number % len(passages)])
        if number % 8 == 5:
            paragraphs.append("Caf\u00e9 na\u00efve: \ud55c\uad6d\uc5b4 \ubb38\uc7a5, \U0001f600.")
        path = folder / ("part" if number % 3 == 0 else ".") / f"document-{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8", newline="\n")
    return folder


def tiny_encoder(folder: Path, dim: int = ENCODER_DIM, seed: int = 0) -> Path:
    """Saves a random two-layer BERT with an uncased WordPiece tokenizer as a Hugging Face folder; returns it.

    The vocabulary has the corpus's syllables, and single characters for everything else in ASCII.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *SYLLABLES]
    pieces += [f"##{piece}" for piece in (*characters, *SYLLABLES)]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(pieces) + "\n", encoding="utf-8", newline="\n")
    tokenizer = BertTokenizerFast(vocab=str(vocabulary), do_lower_case=True, model_max_length=256)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * dim,
        max_position_embeddings=256,
        initializer_range=0.2,  # BERT's own 0.02 makes all texts nearly equal in so small a network
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).eval().save_pretrained(folder)
    return folder


def tiny_data(folder: Path, corpus: Path, chunk_size: int = 16) -> Path:
    """Writes tokenizer and chunks of `corpus` below `folder`, as the stages do; returns the folder."""
    documents = CorpusConfig(valid=0.15, test=0.15)
    make_tokenizer(corpus, documents, TokenizerConfig(vocab_size=400), folder / "tokenizer")
    make_chunks(corpus, documents, folder / "tokenizer", chunk_size, folder / "chunks")
    return folder


def write_vectors(
    folder: Path,
    vectors: Mapping[str, npt.NDArray[Any]],
    documents: Mapping[str, npt.NDArray[Any]],
    rows_per_shard: int = 1 << 18,
    **facts: Any,
) -> Path:
    """Writes chunks with these document ids and embeddings with these vectors, by split; returns the folder.

    Row i of a split has the made-up tokens i % 50 + 3, ...: rows 50 apart are copies. `facts` replace
    those of the embeddings.
    """
    for split in SPLITS:
        num_rows = len(documents[split])
        tokens = (np.arange(num_rows)[:, None] % 50 + 3 + np.arange(5)).astype(np.uint16)
        with ArtifactWriter(folder / "chunks" / split, "chunks", rows_per_shard) as writer:
            writer.append(tokens=tokens, documents=documents[split].astype(np.int32), bytes=np.ones(num_rows, np.int32))
            writer.facts.update(split=split, chunk_size=4, pad_id=0, begin_id=1, end_id=2, vocab_size=100)
            writer.facts.update(tokenizer="none")
        chunks = Artifact.open(folder / "chunks" / split, "chunks")
        with ArtifactWriter(folder / "embeddings" / split, "embeddings", rows_per_shard) as writer:
            writer.append(vectors=vectors[split].astype(np.float16))
            writer.facts.update(chunks=chunks.fingerprint, encoder="none", encoder_name="none", pooling="mean")
            writer.facts.update(normalize=False, max_tokens=8, number_type="float32", truncated_chunks=0)
            writer.facts.update(dim=vectors[split].shape[1], **facts)
    return folder


def change_fact(folder: Path, name: str, value: object) -> None:
    """Writes another fact into an artifact's description, which is then one of another run."""
    content = json.loads((folder / "artifact.json").read_text())
    content["facts"][name] = value
    del content["digest"]
    write_description(folder, content)
