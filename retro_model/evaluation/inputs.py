"""Open or build what an evaluation reads: held-out chunks, a database, and the neighbors found in it.

The pipeline has built these for its own models. Two options need extra data but no training:

- `evaluate.database`, another database: its documents are chunked, embedded, indexed and searched for the held-out
  chunks. Documents that equal or nearly equal held-out ones are dropped first.
- `evaluate.compare` with a model that has another tokenizer or chunk length and cannot read these chunks: the
  documents are decoded from their tokens, which must spell the text exactly, and chunked again.
"""

import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from retro_model.core.artifacts import SPLITS, Artifact
from retro_model.core.errors import DocumentError, MismatchError
from retro_model.core.progress import Progress
from retro_model.corpus.chunking import write_chunks
from retro_model.corpus.chunks import SourceText, document_texts
from retro_model.corpus.documents import CorpusConfig
from retro_model.corpus.files import NameFilter, find_files
from retro_model.corpus.near_duplicates import NearDuplicates
from retro_model.corpus.reading import ReadingReport
from retro_model.corpus.tokenizer import Tokenizer
from retro_model.embedding.config import EmbedConfig
from retro_model.embedding.embed import make_embeddings
from retro_model.jobs.engine import Engine
from retro_model.jobs.parts import Parts
from retro_model.search.build import make_index
from retro_model.search.keys import IndexConfig
from retro_model.search.neighbors import NeighborsConfig, make_neighbors

logger = logging.getLogger(__name__)

HELD_OUT = ("valid", "test")


@dataclass(frozen=True)
class Searching:
    """Settings of the stages that turn text into neighbors, and where they run."""

    corpus: CorpusConfig
    embed: EmbedConfig
    index: IndexConfig
    neighbors: NeighborsConfig
    device: str = "auto"
    embed_batch_size: int | None = None
    engine: Engine | None = None
    parts: Parts | None = None  # of embeddings, also those of the stage embed
    name_filter: NameFilter | None = None  # leaves out files and folders of another database


@dataclass(frozen=True)
class Inputs:
    """Held-out chunks, the database to retrieve from, and the neighbors found in it."""

    chunks: Artifact
    database: Artifact
    neighbors: Artifact
    tokenizer: Tokenizer

    @classmethod
    def open(cls, data: Path, chunks: Path | None = None, neighbors: Path | None = None) -> "Inputs":
        """Open the artifacts below `data` and check that each was made from the others.

        `chunks` and `neighbors` override the folders of those artifacts. Raises an ArtifactError.
        """
        chunks, neighbors = chunks or data / "chunks", neighbors or data / "neighbors"
        tokenizer = Tokenizer.open(data / "tokenizer")
        test = Artifact.open(chunks / "test", "chunks").require(split="test", tokenizer=tokenizer.fingerprint)
        train = Artifact.open(chunks / "train", "chunks").require(
            split="train", tokenizer=tokenizer.fingerprint, chunk_size=test.facts["chunk_size"]
        )
        found = Artifact.open(neighbors / "test", "neighbors")
        return cls(test, train, found.require(chunks=test.fingerprint, database=train.fingerprint), tokenizer)

    def of_split(self, data: Path, split: str) -> "Inputs":
        """The inputs for another split of `data`, with the same database (its train split) and the same index.

        Raises an ArtifactError.
        """
        chunks = self.database if split == "train" else Artifact.open(data / "chunks" / split, "chunks")
        chunks.require(split=split, tokenizer=self.tokenizer.fingerprint, chunk_size=self.chunks.facts["chunk_size"])
        found = Artifact.open(data / "neighbors" / split, "neighbors")
        searched = {name: self.neighbors.facts[name] for name in ("database", "index", "stored")}
        found.require(chunks=chunks.fingerprint, **searched)
        return replace(self, chunks=chunks, neighbors=found)


# ---- another database ------------------------------------------------------------------------------


def search_other_database(documents: Path, data: Path, searching: Searching, work: Path) -> tuple[Inputs, Counter[str]]:
    """Find neighbors for the held-out chunks in `documents`; count the documents kept and dropped.

    Drops documents that equal or nearly equal a held-out one (`corpus.near_duplicates`): queries would find their
    own text. The index type is chosen for this number of chunks (`index.key` auto). Embeddings that are in
    `searching.parts` are reused.

    Raises DocumentError if no document is left.
    """
    tokenizer = Tokenizer.open(data / "tokenizer")
    held_out = {split: Artifact.open(data / "chunks" / split, "chunks") for split in HELD_OUT}
    counts: Counter[str] = Counter()
    folder = _make_empty_folder(work / "chunks")
    report = ReadingReport()
    texts = _usable_documents(documents, searching, list(held_out.values()), tokenizer, counts, report)
    # Number them above all documents of the pipeline: an equal number would pass for the query's own document.
    first = 1 + max(int(Artifact.open(data / "chunks" / split, "chunks")["documents"][:].max()) for split in SPLITS)
    numbered = (item._replace(number=first + place) for place, item in enumerate(texts))
    write_chunks(folder / "train", "train", numbered, tokenizer, held_out["test"].facts["chunk_size"])
    for split in HELD_OUT:
        os.symlink((data / "chunks" / split).resolve(), folder / split)
    _search(folder, data / "tokenizer", searching, work)
    logger.info(f"evaluate: database {documents}: {_describe_counts(counts)}")
    for line in report.lines():
        logger.warning(line)
    return Inputs.open(data, folder, work / "neighbors"), counts


def _usable_documents(
    documents: Path,
    searching: Searching,
    held_out: list[Artifact],
    tokenizer: Tokenizer,
    counts: Counter[str],
    report: ReadingReport,
) -> Iterator[SourceText]:
    """Yield the documents that may be retrieved from; count the others by reason.

    Texts are compared as the tokenizer spells them, which for most tokenizers is exact. Raises DocumentError if no
    document is left, or for what `corpus.bad_documents` refuses.
    """
    corpus = searching.corpus
    near = NearDuplicates(corpus.near_duplicates) if corpus.near_duplicates else None
    held_out_digests, kept_digests = set[bytes](), set[bytes]()
    for item in (item for chunks in held_out for item in document_texts(chunks, tokenizer)):
        held_out_digests.add(_digest(item.text))
        if near is not None:
            near.add(item.text)
    found = find_files(documents, searching.name_filter)
    report.add_files(found)
    options = corpus.reading_options(f"evaluate.database: {documents}")
    with Progress("database", None, "document") as progress:
        for entry in (each for file, name in found.files for each in report.usable_entries(file, name, options)):
            progress.update()
            text = tokenizer.decode(tokenizer.encode(entry.text).tolist())
            digest = _digest(text)
            if digest in held_out_digests or (near is not None and near.repeated_by(text)):
                counts["held_out"] += 1
            elif digest in kept_digests:
                counts["copies"] += 1
            else:
                kept_digests.add(digest)
                counts["kept"] += 1
                yield SourceText(0, entry.source, entry.record, entry.text)
    counts.update(read=report.read, flawed=report.flawed.total())
    if not counts["kept"]:
        first = f"; first: {report.lost[0]}" if report.lost else ""
        raise DocumentError(f"{options.where}: nothing to retrieve from: {_describe_counts(counts)}{first}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _describe_counts(counts: Counter[str]) -> str:
    return (
        f"{counts['read']:,} documents read, {counts['kept']:,} kept; dropped: {counts['held_out']:,} that are "
        f"or nearly are held-out ones, {counts['copies']:,} copies, {counts['flawed']:,} unusable"
    )


def _search(chunks: Path, tokenizer: Path, searching: Searching, work: Path) -> None:
    """Embed, index and search the splits in `chunks`, writing below `work`."""
    device, engine = searching.device, searching.engine
    make_embeddings(
        chunks,
        tokenizer,
        searching.embed,
        work / "embeddings",
        batch_size=searching.embed_batch_size,
        device=device,
        engine=engine,
        parts=searching.parts,
    )
    embeddings, index = work / "embeddings", work / "index"
    # A key chosen for another number of chunks may not fit these.
    config = replace(searching.index, key="auto")
    parts = work / "parts" / "index"
    make_index(embeddings, config, index, device=device, engine=engine, work_folder=parts)
    parts = work / "parts" / "neighbors"
    config_of_neighbors, out = searching.neighbors, work / "neighbors"
    make_neighbors(embeddings, index, chunks, config_of_neighbors, out, device=device, engine=engine, work_folder=parts)


def _make_empty_folder(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


# ---- another tokenizer -----------------------------------------------------------------------------


def rechunk_documents(
    inputs: Inputs, data: Path, tokenizer_folder: Path, chunk_size: int, splits: Iterable[str], work: Path
) -> Path:
    """Chunk the same documents with another tokenizer or chunk length; return the folder of the given splits.

    Raises MismatchError if the current tokens do not spell the documents exactly.
    """
    tokenizer = Tokenizer.open(tokenizer_folder)
    folder = _make_empty_folder(work / "chunks")
    here = {"train": inputs.database, "test": inputs.chunks}
    for split in splits:
        chunks = here.get(split) or Artifact.open(data / "chunks" / split, "chunks")
        if lossy := chunks.facts["lossy_documents"]:
            raise MismatchError(
                "evaluate.compare: that model has another tokenizer or chunk length, so the documents must be chunked "
                f"again from their exact text, which the tokenizer {inputs.tokenizer.name} does not spell for "
                f"{lossy:,} of {chunks.facts['documents']:,} documents of {split}; expected a model of this tokenizer "
                f"and of chunks of {inputs.chunks.facts['chunk_size']} tokens"
            )
        write_chunks(folder / split, split, document_texts(chunks, inputs.tokenizer), tokenizer, chunk_size)
    return folder


def search_rechunked(chunks: Path, tokenizer_folder: Path, searching: Searching, work: Path) -> Inputs:
    """Find neighbors for those chunks in their train split."""
    _search(chunks, tokenizer_folder, searching, work)
    test, train = (Artifact.open(chunks / split, "chunks") for split in ("test", "train"))
    found = Artifact.open(work / "neighbors" / "test", "neighbors")
    return Inputs(test, train, found, Tokenizer.open(tokenizer_folder))
