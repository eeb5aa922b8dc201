"""Functions from a folder of text to neighbors, over raw memory maps, for scripts that do not use the stages.

    counts = text_folder_to_chunks_(folder="text", chunks_memmap_path="train.chunks.dat", ...)
    path, index = chunks_to_precalculated_knn_(num_chunks=counts["chunks"], num_nearest_neighbors=2, ...)
    dataset = RETRODataset(num_chunks=counts["chunks"], ...)                # see retro_model.memmaps.files

The files, all without a header:

    train.chunks.dat              int32 (chunks, M + 1): M tokens, and the first token of the document's next
                                  chunk, or padding for its last chunk
    train.seq.dat                 int32 (sequences,): the row at which each training sequence starts
    train.doc_ids.dat             int32 (chunks,): the document of each row, from 0
    train.chunks.embeddings.dat   float32 (chunks, dim)
    train.chunks.knn.index        a faiss index, for faiss.read_index
    train.chunks.knn.dat          int32 (chunks, K): rows, nearest first, -1 for none

Chunker, embedder, index and search are those of the pipeline. retro_model.memmaps.encoder describes how tokenizer and
encoder are selected, retro_model.memmaps.search when a file is reused. Vectors are compared by L2 distance (section
2.2 of the paper), without scaling them to unit length.
"""

from retro_model.memmaps.chunks import text_folder_to_chunks_
from retro_model.memmaps.encoder import bert_embed, tokenize
from retro_model.memmaps.search import (
    SearchableChunks,
    beside,
    chunks_to_index_and_embed,
    chunks_to_precalculated_knn_,
)

__all__ = [
    "SearchableChunks",
    "bert_embed",
    "beside",
    "chunks_to_index_and_embed",
    "chunks_to_precalculated_knn_",
    "text_folder_to_chunks_",
    "tokenize",
]
