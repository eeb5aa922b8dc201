"""MLflow's store: `mlflow.db` and `mlartifacts` at the repository's root, which `mlflow ui` opens without arguments.

Runs in temporary checkouts use it too. MLflow writes absolute artifact locations into its database; if the project
was moved or copied, they are corrected when the store is opened, so that artifacts are always below this project.
"""

import errno
import logging
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retro_model.core.errors import RetroError
from stages.common.harness import file_lock, full_disk_message, project_root

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "retro"
ARTIFACTS = "mlartifacts"

# The places where MLflow's database has an absolute location: it resolves a relative one when it stores it.
MOVE_LOCATIONS = (
    "update experiments set artifact_location = :new || substr(artifact_location, length(:old) + 1) "
    "where artifact_location = :old",
    "update runs set artifact_uri = :new || substr(artifact_uri, length(:old) + 1) "
    "where substr(artifact_uri, 1, length(:old) + 1) = :old || '/'",
    "update logged_models set artifact_location = :new || substr(artifact_location, length(:old) + 1) "
    "where substr(artifact_location, 1, length(:old) + 1) = :old || '/'",
)


def open_store() -> tuple["MlflowClient", str]:
    """The client, and the id of the experiment in which all runs are. Creates or corrects what is needed."""
    from mlflow.tracking import MlflowClient  # takes seconds; only the process that records needs it

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # silences a line for each table of the store
    # MLflow raises write errors too, and those are reported in one line. Do not also log a traceback.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    root = project_root()
    (root / ".retro").mkdir(parents=True, exist_ok=True)
    with file_lock(root / ".retro" / "mlflow.lock"):  # two processes that migrate the database at once break it
        client = MlflowClient(database_uri(root / "mlflow.db"))
        return client, open_experiment(client)


def database_uri(database: Path) -> str:
    """The URI of an SQLite database, for MLflow and for its command line in the project's folder.

    MLflow and SQLAlchemy would take `?`, `#` and `%` for syntax, and do not unquote alike. A relative path has only
    the names below the project.
    """
    special = any(character in str(database) for character in "?#%")
    return f"sqlite:///{os.path.relpath(database) if special else database}"


def open_experiment(client: "MlflowClient") -> str:
    """The id of the experiment; restores it if it was deleted, and corrects its location if the project was moved."""
    artifacts = project_root() / ARTIFACTS
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        # By default MLflow would store the working directory of the first process.
        return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts.as_uri()))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        print(f"mlflow: the experiment {EXPERIMENT} was deleted; restored it with its runs", file=sys.stderr)
    old, new = str(experiment.artifact_location), artifacts.as_uri()
    if old.startswith("file:") and old.endswith(f"/{ARTIFACTS}"):  # otherwise the user has chosen another place
        _require_writable(artifacts)
        if old != new:
            _move_locations(old, new)
    return str(experiment.experiment_id)


def _require_writable(folder: Path) -> None:
    """Raises PermissionError before the training, whose artifacts are written at its end."""
    folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _move_locations(old: str, new: str) -> None:
    """Makes all artifact locations below the URI `old` lie below `new`."""
    with closing(sqlite3.connect(project_root() / "mlflow.db", timeout=60)) as database, database:
        for statement in MOVE_LOCATIONS:
            database.execute(statement, {"old": old, "new": new})
    print(
        f"mlflow: the project was moved or copied; artifacts are in {project_root() / ARTIFACTS} now", file=sys.stderr
    )


@contextmanager
def explain_store_errors() -> Iterator[None]:
    """Turns an error of MLflow's store into a RetroError that says how to go on; no output needs the store."""
    # These belong to MLflow, which takes seconds to import; the block imports it anyway.
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error) as error:
        if full_disk_message(error) is not None:
            raise
        database = project_root() / "mlflow.db"
        reason = str(error).splitlines()[0]
        raise RetroError(
            f"{database}: MLflow cannot use its record of the runs ({reason}); {_advice(database, reason)}"
        ) from error


def _advice(database: Path, reason: str) -> str:
    """What to do about an error of the store."""
    unknown = re.search(r"Can't locate revision identified by '(\w+)'", reason)
    outdated = re.search(r"out-of-date database schema \(found version (\w+),", reason)
    if unknown or (outdated and not _is_known_schema(outdated[1])):
        return "a newer MLflow made it: install that version of MLflow again and run `dvc repro`; no run is lost"
    if outdated:
        backup = f"cp {shlex.quote(str(database))} {shlex.quote(f'{database}.backup')}"
        upgrade = f"mlflow db upgrade {shlex.quote(database_uri(database))}"
        return f"another MLflow made it: run `{backup} && {upgrade}`, then `dvc repro`; no run is lost"
    if "database is locked" in reason:
        return "another program is writing to it: let that end and run `dvc repro` again"
    return f"move {database} away and run `dvc repro` again: nothing else needs it"


def _is_known_schema(version: str) -> bool:
    """Whether the installed MLflow can upgrade from this version of its schema."""
    import mlflow.store  # only after an error of MLflow, which has imported it

    migrations = Path(mlflow.store.__file__).parent / "db_migrations" / "versions"
    return any(migrations.glob(f"{version}_*.py"))
