"""What dvc.lock says of a stage's last run: after `dvc pull`, its inputs and outputs are in DVC's cache.

DVC deletes the outputs of a stage before it runs the stage, and the inputs may have changed. The cache still has both.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from retro_model.core.artifacts import link_or_copy


def restore_last_run(stage: str, code: Iterable[str], folder: Path) -> bool:
    """Put the `data/` folders that the last run of the stage in dvc.lock read and wrote into `folder`, as links.

    Return False if there is none, if the code below the dependencies `code` has changed since, or if DVC's cache here
    does not hold all files. Links are read-only, as DVC's cache is.
    """
    lock = Path("dvc.lock")
    if not lock.is_file() or stage not in yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]:
        return False
    from dvc.repo import Repo

    with Repo() as repo:
        (locked,) = repo.stage.collect(stage)
        if any(dep.def_path in code and dep.changed_checksum() for dep in locked.deps):
            return False
        data = [item for item in (*locked.deps, *locked.outs) if item.def_path.startswith("data/")]
        cache = repo.cache.local
        digests = [item.hash_info.value for item in data]
        if not all(digest and Path(cache.oid_to_path(digest)).is_file() for digest in digests):
            return False
        files = {}
        for item, digest in zip(data, digests, strict=True):
            for entry in json.loads(Path(cache.oid_to_path(digest)).read_text(encoding="utf-8")):
                files[folder / item.def_path / entry["relpath"]] = Path(cache.oid_to_path(entry["md5"]))
    if not all(cached.is_file() for cached in files.values()):
        return False
    for target, cached in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(cached, target)
    return True
