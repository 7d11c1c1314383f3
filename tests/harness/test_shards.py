"""Shards on processes of this machine and on a Dask cluster: the same results, also when workers die."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.harness import shards
from pipeline.harness.machine import Machine
from pipeline.stages import label, pack, score
from pipeline.store import artifact
from tests.harness.work import killed, killed_once, refused, slow, square
from tests.leaks.bench import bench
from tests.tiny import MACHINE, bytes_of, prepared, taught

pytestmark = [pytest.mark.whole, pytest.mark.filterwarnings("ignore")]  # Dask's own warnings


def written(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.txt")}


EXPECTED = {f"{n}.txt": f"{n * n}\n" for n in range(10)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address.replace("tcp://", shards.DASK)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_do_not_depend_on_the_number_of_workers(tmp_path: Path, workers: int) -> None:
    assert sorted(shards.done(partial(square, tmp_path), range(10), workers)) == list(range(10))
    assert written(tmp_path) == EXPECTED


def test_a_cluster_gives_the_same(tmp_path: Path, cluster: str) -> None:
    assert sorted(shards.done(partial(square, tmp_path), range(10), 1, cluster)) == list(range(10))
    assert written(tmp_path) == EXPECTED


def test_no_more_shards_are_made_than_are_in_hand(tmp_path: Path) -> None:
    made = []
    results = shards.done(partial(square, tmp_path), (made.append(n) or n for n in range(100)), 2)  # type: ignore[func-returns-value]
    next(results)
    assert len(made) <= 5


def test_a_killed_process_costs_its_shards_and_no_others(tmp_path: Path) -> None:
    assert sorted(set(shards.done(partial(killed_once, tmp_path), range(10), 2))) == list(range(10))
    assert written(tmp_path) == EXPECTED


def test_a_killed_worker_of_a_cluster_costs_its_shards_and_no_others(tmp_path: Path, cluster: str) -> None:
    results = shards.done(partial(slow, tmp_path), range(10), 1, cluster)
    done = [next(results)]
    os.kill(int((tmp_path / f"{done[0]}.pid").read_text()), signal.SIGKILL)
    done += results
    assert sorted(done) == list(range(10))
    assert written(tmp_path) == EXPECTED


def test_a_shard_that_kills_every_worker_is_named_as_the_reason(tmp_path: Path, cluster: str) -> None:
    with pytest.raises(UserError, match="worker processes died one after the other"):
        list(shards.done(partial(killed, tmp_path), range(10), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_work_raises_is_passed_on(tmp_path: Path, workers: int, cluster: str) -> None:
    for executor in (shards.LOCAL, cluster):
        with pytest.raises(UserError, match="an image is damaged"):
            list(shards.done(partial(refused, tmp_path), range(10), workers, executor))


def test_a_scheduler_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(shards, "PATIENCE_SECONDS", 0.5)
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        list(shards.done(partial(square, tmp_path), range(3), 1, "dask://127.0.0.1:9"))


def test_search_on_a_cluster_makes_the_same_bytes(tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.leaks.search.SHARD", 4)  # no fewer than the validation images: workers have the real one
    work = bench(tmp_path)
    work.search(train=False)
    here = bytes_of(tmp_path / "found")
    work.scratch = tmp_path / "again"
    work.search(train=False, machine=Machine(executor=cluster))
    assert bytes_of(tmp_path / "found") == here


def test_score_label_and_pack_give_the_same_bytes_on_a_cluster(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    data = prepared(tmp_path, {"ant": 8, "bee": 8, "cat": 8})
    teacher = taught(data, tmp_path / "teacher")
    scoring, labelling = score.Score(teacher="-", m=2), label.Label(teacher="-", images="-", views=2)
    packing = pack.Pack(images="-", side=12)
    for name, machine in (("here", MACHINE), ("there", MACHINE.model_copy(update={"executor": cluster}))):
        made = tmp_path / name
        labelled = {"train": data / "train", "teacher": teacher}
        held = data / "holdout"
        score.run(scoring, pool=data / "pool", holdout=held, **labelled, out=made / "score", workdir=made / "s1", machine=machine)
        label.run(labelling, chosen=data / "pool", **labelled, out=made / "label", seed=0, workdir=made / "s2", machine=machine)
        monkeypatch.chdir(made)
        outs = {"out": Path("pack"), "tars_out": Path("tars")}
        pack.run(packing, chosen=data / "pool", train=data / "train", **outs, workdir=made / "s3", machine=machine)
    for out in ("score", "label", "pack", "tars"):
        assert artifact.identity(tmp_path / "here" / out) == artifact.identity(tmp_path / "there" / out), out
