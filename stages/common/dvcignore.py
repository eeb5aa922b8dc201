"""Which documents DVC sees: those that `.dvcignore` hides are in no hash, so no stage may read them."""

from retro_model.corpus.files import NameFilter


def dvc_name_filter() -> NameFilter | None:
    """DVC's own filter by the `.dvcignore` files of this repository; None outside of a DVC repository."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.fs import localfs
    from dvc.ignore import DvcIgnoreFilter
    from dvc.repo import Repo

    try:
        root = Repo.find_root()
    except NotDvcRepoError:
        return None
    name_filter: NameFilter = DvcIgnoreFilter(localfs, root)
    return name_filter
