"""Train an empty faiss index, with autofaiss or with faiss alone (`index.builder`). Both give the same bytes."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retro_model.core.arrays import Float32Array
from retro_model.core.artifacts import save_array
from retro_model.core.errors import ArtifactError
from retro_model.search.distances import RECALL_AT, Vectors, import_faiss, sample_rows
from retro_model.search.index import on_gpu, to_gpu
from retro_model.search.keys import IndexConfig, code_of, num_lists


def train_index(vectors: Vectors, key: str, config: IndexConfig, gpu: bool = False, work: Path | None = None) -> Any:
    """An empty index, trained on a seeded random sample of `vectors`.

    4-bit codes are in the plain layout; see `pack_for_fast_scan`. autofaiss reads the sample from a file, which is
    written below `work`, or to the system's temporary folder (which may be in memory). It would otherwise train on
    the first rows, which cover few topics.
    """
    sample = sample_rows(vectors, max(num_lists(key) * config.train_points_per_list, RECALL_AT), config.seed)
    if config.builder == "faiss":
        return _train_with_faiss(sample, _training_key(key), gpu)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        save_array(Path(folder) / "sample.npy", sample)
        del sample  # free the memory: autofaiss has its own copy
        index = _build_with_autofaiss(folder, _training_key(key), gpu)
    index.reset()  # autofaiss also adds the sample
    return index


def trains_on_gpu(key: str, device: str) -> bool:
    """Whether k-means runs on the GPU: only for IVF<lists>,Flat; faiss trains 4-bit codes on the CPU only."""
    return on_gpu(device) and num_lists(key) > 0 and code_of(key) is None


def _training_key(key: str) -> str:
    """The key to train: codes in the plain layout, without polysemous training (np)."""
    code = code_of(key)
    return key if code is None else f"{key.partition(',')[0]},PQ{code.numbers}x{code.bits}np"


def pack_for_fast_scan(key: str, index: Any) -> Any:
    """Converts a filled index with 4-bit codes to fast scan's layout; returns any other index as it is.

    The index is trained and filled in the plain layout because merging fast-scan lists gives different bytes
    from run to run. The conversion empties `index`.
    """
    if not key.endswith("fs"):
        return index
    faiss = import_faiss()
    fast_scan = faiss.IndexIVFPQFastScan(index)
    # The new index keeps a reference to `index` for its centroids. Drop the codes in `index`, or they would stay
    # in memory twice.
    empty = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    empty.this.disown()
    index.replace_invlists(empty, True)
    return fast_scan


def _train_with_faiss(sample: Float32Array, key: str, gpu: bool) -> Any:
    """faiss's index for `key`, trained on `sample`."""
    faiss = import_faiss()
    index = faiss.index_factory(sample.shape[1], key, faiss.METRIC_L2)
    if gpu:
        index = to_gpu(index)
    index.train(sample)
    return faiss.index_gpu_to_cpu(index) if gpu else index


def _build_with_autofaiss(folder: str, key: str, gpu: bool) -> Any:
    """autofaiss's index over the `.npy` files in `folder`; its log is shown only in the error message."""
    faiss = import_faiss()
    with _captured_logging("autofaiss") as log:
        from autofaiss import build_index

        # A given key and parameters keep autofaiss from tuning by time. Memory was checked before; with a smaller
        # limit here, autofaiss would train on less than the sample.
        index, _ = build_index(
            folder,
            save_on_disk=False,
            index_key=key,
            index_param="nprobe=1" if key != "Flat" else "",
            metric_type="l2",
            max_index_memory_usage="1T",
            current_memory_available="2T",
            nb_cores=faiss.omp_get_max_threads(),
            use_gpu=gpu,
            verbose=logging.ERROR,
        )
    if index is None:
        raise ArtifactError(f"index: autofaiss could not build {key}: {' '.join(log.getvalue().split())}")
    return faiss.index_gpu_to_cpu(index) if gpu else index


@contextlib.contextmanager
def _captured_logging(name: str) -> Iterator[io.StringIO]:
    """Collects the named logger's messages and standard error in a buffer; restores logging afterwards."""
    root, logger, text = logging.getLogger(), logging.getLogger(name), io.StringIO()
    before = (root.handlers[:], root.level, logger.handlers[:], logger.propagate)
    root.handlers = [logging.NullHandler()]
    logger.handlers, logger.propagate = [logging.StreamHandler(text)], False
    try:
        with contextlib.redirect_stderr(text), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from autofaiss's imports on newer Pythons
            yield text
    finally:
        root.handlers, root.level, logger.handlers, logger.propagate = before
