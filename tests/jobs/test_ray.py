"""A Ray cluster of two nodes on this machine makes the same parts, also when a worker is killed in the middle."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_stages import OUT, STAGES, files_of, finished, make, small_parts
from paths import ROOT, SUPPORT
from square_job import SquareJob, run, times_made, wait_until

from retro_model.core.errors import ConfigError
from retro_model.jobs.engine import EngineConfig

pytestmark = [pytest.mark.slow]
ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
RAY = EngineConfig(engine="ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), str(ROOT)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        nodes.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", nodes.address)
        ray.init(nodes.address, logging_level="ERROR", log_to_driver=False)
        yield nodes
        ray.shutdown()
        nodes.shutdown()


def test_two_nodes_share_the_parts(cluster: Any, diary: Path, tmp_path: Path) -> None:
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    # A part waits until two processes are at work: a node has one core, and so the two are on both.
    assert run(SquareJob(diary, together=2), tmp_path / "work", RAY) == [x * x for x in range(50)]
    assert times_made(diary) == [1] * 5
    assert len(list(diary.glob("opened-*"))) >= 2


def test_a_killed_worker_costs_its_part_only(cluster: Any, diary: Path, tmp_path: Path) -> None:
    def kill() -> None:
        wait_until(lambda: list(diary.glob("hangs-*")))
        (worker,) = diary.glob("hangs-*")
        os.kill(int(worker.name.partition("-")[2]), signal.SIGKILL)
        (diary / "go on").touch()  # for whoever makes the part next

    killer = threading.Thread(target=kill)
    killer.start()
    assert run(SquareJob(diary, broken="hangs"), tmp_path / "work", RAY) == [x * x for x in range(50)]
    killer.join()
    assert times_made(diary) == [1, 1, 2, 1, 1], "the part in the killed worker's hands was made again, and no other"
    assert len(list((tmp_path / "work").glob("p-??"))) == 5


def test_a_users_fault_on_a_node_is_told_as_it_is(cluster: Any, diary: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^numbers: found 20, expected another$"):
        run(SquareJob(diary, broken="user"), tmp_path / "work", RAY)


def test_more_than_the_cluster_has_is_refused(cluster: Any, diary: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime.ray_cpus 64 and runtime.ray_gpus 0 are more than the cluster has"):
        run(SquareJob(diary), tmp_path / "work", EngineConfig(engine="ray", ray_cpus=64))


# ---- the stages --------------------------------------------------------------------------------------------


# The stage whose processes start the quickest; test_interrupted.py makes the others' parts in two processes.
@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[] if stage == "chunk" else pytest.mark.torture) for stage in STAGES]
)
def test_a_cluster_writes_the_bytes_of_one_process(
    stage: str, cluster: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch.setattr)
    make(stage, data, tmp_path / "out", tmp_path / "work", RAY)
    expected = files_of(data / OUT[stage])
    assert files_of(tmp_path / "out") == expected
    assert len(finished(tmp_path / "work")) > 3
