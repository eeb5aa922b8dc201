"""MLflow's store: the one that `MLFLOW_TRACKING_URI` names, or else `mlflow.db` and `mlartifacts` in the project.

`mlflow ui` opens the project's own store without arguments, and runs in temporary checkouts use it too. MLflow writes
absolute artifact locations into its database; if the project was moved or copied, they are corrected when the store is
opened, so that artifacts are always below this project. Of a store that the user has named, the experiment's artifacts
are where that store puts them.
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
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

EXPERIMENT = "retro"  # unless MLFLOW_EXPERIMENT_NAME names another one
ARTIFACTS = "mlartifacts"
MOST_OF_A_REASON = 300  # characters

# How long to wait for a tracking server, unless the user's environment says otherwise. With MLflow's own values, each
# request to a server that is away takes four minutes.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
}

# The places where MLflow's database has an absolute location: it resolves a relative one when it stores it.
MOVE_LOCATIONS = (
    "update experiments set artifact_location = :new || substr(artifact_location, length(:old) + 1) "
    "where artifact_location = :old",
    "update runs set artifact_uri = :new || substr(artifact_uri, length(:old) + 1) "
    "where substr(artifact_uri, 1, length(:old) + 1) = :old || '/'",
    "update logged_models set artifact_location = :new || substr(artifact_location, length(:old) + 1) "
    "where substr(artifact_location, 1, length(:old) + 1) = :old || '/'",
)


def is_embedded() -> bool:
    """Whether the store is the project's own."""
    return not os.environ.get("MLFLOW_TRACKING_URI")


def store_uri() -> str:
    """The URI of the store, for MLflow."""
    return os.environ.get("MLFLOW_TRACKING_URI") or database_uri(project_root() / "mlflow.db")


def store_name() -> str:
    """The store as messages name it, without a password."""
    return str(project_root() / "mlflow.db") if is_embedded() else without_password(store_uri())


def without_password(text: str) -> str:
    """The text without what stands before the host of an address."""
    return re.sub(r"://[^/@\s]+@", "://", text)


def experiment_name() -> str:
    """The name of the experiment in which all runs are."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def open_store() -> tuple["MlflowClient", str]:
    """The client, and the id of the experiment in which all runs are. Creates or corrects what is needed."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient  # takes seconds; only the process that records needs it

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # silences a line for each table of the store
    # MLflow raises write errors too, and those are reported in one line. Do not also log a traceback.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    root = project_root()
    (root / ".retro").mkdir(parents=True, exist_ok=True)
    with file_lock(root / ".retro" / "mlflow.lock"):  # two processes that migrate the database at once break it
        client = MlflowClient(store_uri())
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
    name = experiment_name()
    experiment = client.get_experiment_by_name(name) or _create_experiment(client, name)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        print(f"mlflow: the experiment {name} was deleted; restored it with its runs", file=sys.stderr)
    if is_embedded():
        old, new = str(experiment.artifact_location), (project_root() / ARTIFACTS).as_uri()
        if old.startswith("file:") and old.endswith(f"/{ARTIFACTS}"):  # otherwise the user has chosen another place
            _require_writable(project_root() / ARTIFACTS)
            if old != new:
                _move_locations(old, new)
    return str(experiment.experiment_id)


def _create_experiment(client: "MlflowClient", name: str) -> "Experiment":
    from mlflow.exceptions import MlflowException  # imported with the store, which takes seconds

    # Beside an SQLite file, MLflow would by default use a folder below the first process's working directory. A server
    # says itself where artifacts are.
    location = (project_root() / ARTIFACTS).as_uri() if store_uri().startswith("sqlite:") else None
    try:
        client.create_experiment(name, artifact_location=location)
    except MlflowException as error:  # another machine may have created it since
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.get_experiment_by_name(name)
    assert created is not None
    return created


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
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, RequestException) as error:
        if full_disk_message(error) is not None:
            raise
        reason = first_reason(error)
        raise RetroError(
            f"{store_name()}: MLflow cannot use its record of the runs ({reason}); {_advice(reason)}"
        ) from error


def first_reason(error: BaseException) -> str:
    """What an error says, in one line; for a connection that failed, what the system says about it."""
    for cause in _chain(error):
        if isinstance(cause, ConnectionError) and cause.strerror:
            return cause.strerror
        if isinstance(cause, TimeoutError):
            return "no answer in time"
    return without_password((str(error).splitlines() or [type(error).__name__])[0])[:MOST_OF_A_REASON]


def is_unreachable(error: BaseException) -> bool:
    """Whether the error is that of a connection, and not an answer of the store."""
    return any(isinstance(cause, (ConnectionError, TimeoutError)) for cause in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _advice(reason: str) -> str:
    """What to do about an error of the store."""
    if not is_embedded():
        return (
            "start the server, correct MLFLOW_TRACKING_URI, or set runtime.tracking to best_effort or off; then "
            "run `dvc repro` again"
        )
    database = project_root() / "mlflow.db"
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
