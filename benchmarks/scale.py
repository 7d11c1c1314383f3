"""Every stage at the size of large pools: CPU time, wall time, peak memory and bytes written, against the number of images.

    python -m benchmarks.scale --images 1_000_000 5_000_000 14_000_000 --out docs/scale-table.md
    python -m benchmarks.scale --images 14_000_000 --stages prepare search dedup --minutes 30
    python -m benchmarks.scale --images 14_000_000 --from 1_000_000 --stages dedup teach score select

Each stage at each size is a piece of its own, run by the command of dvc.yaml in a folder below .scratch/scale/ and kept in
results.json there: a repeated command goes on with what is missing, and with what did not end within --minutes.

The pool is tars of 16,384 members, 1,024 distinct JPEGs of 32 pixels again and again; all tars are one file under many names, so
14 M images take 35 MB of disk. Networks are tiny, trainings have 20 steps of 256 images. Where a stage works in shards and would
take long, some shards are measured, then the command is killed; the shards that hold the same images get links to what was
made, each with its own ids and row numbers, and the repeated command, which finds its shards finished, does all that remains at
full size. Such a row is marked: its time is that of the shards times their number, and of both commands.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks.seeds import ROOT, machine
from pipeline.leaks import search
from pipeline.learning import labels
from pipeline.stages import label, pack, score
from pipeline.store import artifact, manifest

DISTINCT, MEMBERS, SIDE = 1024, 16_384, 32
CLASSES, LABELLED, VAL = 100, 20, 5  # images of each class
POLL_SECONDS = 0.1
SAMPLE = 3
"""Shards that are measured where not all are done; the first one also pays for the start."""


class Sharded(NamedTuple):
    """A stage that works in shards: where the finished ones lie below its scratch folder, of how many images each, up to how many
    images all are done, and what makes a shard out of one with the same images: (that one, to, first row, ids of its images)."""

    shards: str
    size: int
    whole: int
    again: Callable[[Path, Path, int, pa.ChunkedArray], None]


class Piece(NamedTuple):
    """A stage's entry, as `distil@cached` or `prepare`."""

    stage: str
    entry: str | None

    @property
    def name(self) -> str:
        return f"{self.stage}@{self.entry}" if self.entry else self.stage


@dataclass(frozen=True)
class Used:
    """What a command took: seconds, gigabytes of memory at its peak (mapped files included), bytes of what it wrote.

    `done`: so many images went through it, where not all did; `rest`: the CPU seconds of what was done at full size then.
    `problem`: why there is no result.
    """

    cpu: float
    wall: float
    memory: float
    written: int = 0
    done: int | None = None
    rest: float = 0.0
    problem: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000_000, 5_000_000, 14_000_000], help="of the pool")
    parser.add_argument("--stages", nargs="+", choices=[*dict.fromkeys(piece.stage for piece in PIECES)], help="only these")
    parser.add_argument("--minutes", type=float, default=60, help="the limit of a command")
    parser.add_argument(
        "--from", dest="known", type=int, help="take what prepare and search found at so many images, for more of the same"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".scratch" / "scale")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the command that runs is ended
    results = Results(args.folder)
    for images in sorted(args.images):
        workspace = args.folder.resolve() / str(images)
        draw(workspace, images)
        if args.known and args.known < images:
            repeat(args.folder.resolve() / str(args.known), workspace, images)
        for piece in PIECES:
            if (args.stages is None or piece.stage in args.stages) and not results.has(images, piece):
                missing = [path for path in Command(piece).inputs if not (workspace / path).exists()]
                if missing:
                    print(f"{images:,} {piece.name}: left out, {missing[0]} is not there", flush=True)
                    continue
                used = measured(piece, workspace, images, 60 * args.minutes)
                results.keep(images, piece, used)
                print(f"{images:,} {piece.name}: {used}", flush=True)
    text = f"`{shlex.join(['python', '-m', 'benchmarks.scale', *sys.argv[1:]])}`\n\n{table(results)}"
    print(text)
    if args.out:
        args.out.write_text(text)


# Data -----------------------------------------------------------------------------------------------------------------


def draw(workspace: Path, images: int) -> None:
    """The sources, in data/raw, and params.yaml; nothing where they are there."""
    raw = workspace / "data" / "raw"
    if raw.exists():
        return
    raw.parent.mkdir(parents=True, exist_ok=True)
    (raw.parent / "remote").mkdir(exist_ok=True)  # what `prepare` reads; nothing lies elsewhere
    (workspace / "data" / "scratch").touch()
    (workspace / "data" / "labels").touch()
    (workspace / "data" / "overrides.csv").write_text("id,action,reason\n")
    (workspace / "params.yaml").write_text(yaml.safe_dump(params(images), sort_keys=False))
    with artifact.writing(raw) as tmp:
        names = [f"c{number:03}" for number in range(CLASSES)]
        for name, each in (("labelled", LABELLED), ("val", VAL)):
            _tar(tmp / f"{name}.tar", [f"{of}/{name}-{i:03}.jpg" for of in names for i in range(each)], name)
        for number in range(-(-images // MEMBERS)):
            count, to = min(MEMBERS, images - number * MEMBERS), tmp / f"pool-{number:05}.tar"
            if number and count == MEMBERS:
                os.link(tmp / "pool-00000.tar", to)
            else:
                _tar(to, [f"{i:05}.jpg" for i in range(count)], "pool")


def _tar(file: Path, names: Sequence[str], of: str) -> None:
    """Members of these names; the same pictures for the same kind of set, others for each."""
    seeds = {"pool": 0, "labelled": DISTINCT, "val": 2 * DISTINCT + CLASSES * LABELLED}
    made: list[bytes] = []
    with tarfile.open(file, "w") as tar:
        for i, name in enumerate(names):
            if i < DISTINCT or of != "pool":
                made.append(_jpeg(seeds[of] + i))
            member = tarfile.TarInfo(name)
            data = made[i % DISTINCT] if of == "pool" else made[i]
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
            tar.members.clear()  # type: ignore[attr-defined]


def _jpeg(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def repeat(known: Path, workspace: Path, images: int) -> None:
    """What `prepare` would write: the pool's first tar, again and again under its other names; and the findings of the smaller
    pool, for `dedup`. Nothing where they are there."""
    for name in ("prepare/train", "prepare/holdout", "prepare/val", "search/findings"):
        if not (workspace / "data" / name).exists():
            artifact.copy(known / "data" / name, workspace / "data" / name)
    pool = workspace / "data" / "prepare" / "pool"
    if pool.exists():
        return
    tar = "pool-00000.tar"
    first = manifest.read(known / "data" / "prepare" / "pool").table.slice(0, MEMBERS).cast(manifest.STORED)
    with artifact.writing(pool) as tmp, manifest.Writer(tmp, ()) as writer:
        for number in range(-(-images // MEMBERS)):
            rows = first.slice(0, images - number * MEMBERS)
            for at, name in enumerate(manifest.STORED.names[:2]):
                rows = rows.set_column(at, name, pc.replace_substring(rows[name], tar, f"pool-{number:05}.tar"))
            writer.add(rows)


def params(images: int) -> dict[str, Any]:
    """A params.yaml of every stage that meets the pool, and of those behind them."""
    k, kept = max(1, 2 * images // (7 * CLASSES)), {"views": 2, "m": 5}
    taught = {"init": "scratch", "model": "tiny", "view": "centre", "training": "brief"}
    return {
        "seed": 0,
        "machine": {"device": "cpu", "precision": "float32", "threads": 1, "workers": 1, "memory_gb": 0.5},
        "prepare": {
            "root": "data/raw",
            **{role: [{"kind": "tar", "path": f"{role}.tar"}] for role in ("labelled", "val")},
            "pool": [{"kind": "tar", "path": "pool-*.tar"}],
        },
        "search": {"train": False},
        "dedup": {},
        "models": {"tiny": {"arch": "resnet8", "options": {"width": 4, "stem_stride": 2}, "input": {"size": 8}}},
        "views": {"centre": {"kind": "none", "flip": False}},
        "trainings": {"brief": {"steps": 20, "batch": 256, "lr": 0.01}},
        "pretrain": {"base": {"images": "dedup/pool", "model": "tiny", "training": "brief", "head_out": 16}},
        "teach": {"teacher": taught},
        "score": {"teacher": {"teacher": "teach/teacher", "m": 5}},
        "select": {
            "top": {"scores": "score/teacher", "rule": "top", "k": k, "membership": "any"},
            "random": {"scores": "score/teacher", "rule": "random", "k": k},
        },
        "pack": {"all": {"images": "dedup/pool", "labelled": False}},
        "label": {"all": {"teacher": "teach/teacher", "images": "dedup/pool", "labelled": False, "view": "centre", **kept}},
        "distil": {
            "cached": {**taught, "teacher": "label/all", "images": "dedup/pool", "labelled": False},
            "online": {**taught, "teacher": "teach/teacher", "images": "select/top"},
        },
        "self_distil": {"all": {**taught, "teacher": "label/all", "images": "dedup/pool", "labelled": False}},
        "ensemble": {"both": {"first": "teach/teacher", "second": "distil/online"}},
        "evaluate": {
            "baseline": {"role": "baseline", "model": "teach/teacher"},
            "cached": {"role": "candidate", "model": "distil/cached"},
        },
        "export": {"student": {"model": "distil/cached", "evaluation": "evaluate/cached"}},
        "compare": {"baseline": "baseline"},
    }


ENTRIES = ("pretrain", "teach", "score", "select", "pack", "label", "distil", "self_distil", "ensemble", "evaluate", "export")
PIECES = [
    *(Piece(stage, None) for stage in ("prepare", "search", "dedup")),
    *(Piece(stage, entry) for stage in ENTRIES for entry in params(1)[stage]),
    Piece("compare", None),
]


class Command:
    """The command line of a piece, as dvc.yaml has it, and its paths."""

    def __init__(self, piece: Piece) -> None:
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        self.words = shlex.split(stages[piece.stage].get("do", stages[piece.stage])["cmd"])
        own = {**params(1)[piece.stage].get(piece.entry, {}), "entry": piece.entry, "root": "data/raw"}
        paths = [(name, re.sub(r"\{(\w+)\}", lambda match: str(own[match[1]]), path)) for name, path in _pairs(self.words[3:])]
        self.inputs = [path for name, path in paths if not _is_out(name)]
        self.outs = [path for name, path in paths if _is_out(name)]
        entry = [piece.entry] if piece.entry else []
        self.line = [sys.executable, *self.words[1:3], *entry, *self.words[3:]]


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


def _is_out(name: str) -> bool:
    return name == "--out" or name.endswith("-out")


# Measuring ------------------------------------------------------------------------------------------------------------


def measured(piece: Piece, workspace: Path, images: int, limit: float) -> Used:
    """What the piece takes at this size; `limit`: seconds of a command."""
    command, kind = Command(piece), SHARDED.get(piece.stage)
    scratch = workspace / ".scratch" / piece.name.replace("@", ".")
    shutil.rmtree(scratch, ignore_errors=True)  # of a command that was interrupted, whose time is lost
    watch = Watch(scratch, kind) if kind and images > max(kind.whole, (SAMPLE + 1) * kind.size) else None
    used = ran(command.line, workspace, limit, watch)
    if watch and used.problem == ENOUGH:
        watch.finish(manifest.read(workspace / POOLS[piece.stage]).table["id"])
        used = watch.extrapolated(ran(command.line, workspace, limit), images)
    if used.problem:
        return used
    written = sum(file.stat().st_size for out in command.outs for file in (workspace / out).rglob("*") if file.is_file())
    return replace(used, written=written)


def ran(line: Sequence[str], workspace: Path, limit: float, watch: "Watch | None" = None) -> Used:
    """Run a command to its end, for `limit` seconds, or until `watch` has seen enough."""
    start, problem, memory = time.monotonic(), None, 0.0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WINNOW_TRACKING": "off"}
    with (workspace / "said").open("w+") as said:
        process = subprocess.Popen(line, cwd=workspace, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                wall, memory = time.monotonic() - start, max(memory, _peak(process.pid))
                if problem is None and (wall > limit or (watch and watch.enough(_cpu(process.pid), wall))):
                    problem = ENOUGH if wall <= limit else f"did not end in {limit:,.0f} s"
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(POLL_SECONDS)
            _, status, usage = ended
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode and problem is None:
            problem = (said.read().splitlines() or [str(process.returncode)])[-1]
    used = Used(usage.ru_utime + usage.ru_stime, time.monotonic() - start, memory, problem=problem)
    if watch:
        watch.memory = used.memory
    return used


def _peak(process: int) -> float:
    """The most gigabytes that a running process has held; what wait4 says is at least what this one holds."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def _cpu(process: int) -> float:
    """The CPU seconds of a running process and of its children that have ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


ENOUGH = "killed: as many shards are done as are measured"


class Watch:
    """Follows the finished shards of a running command, which is to be killed after some, and finishes the others."""

    def __init__(self, scratch: Path, kind: Sharded) -> None:
        self.scratch, self.kind, self.memory = scratch, kind, 0.0
        self.seen: list[tuple[int, float, float]] = []  # shards, CPU seconds, seconds

    def folders(self) -> list[Path]:
        return sorted(self.scratch.glob(self.kind.shards))

    def enough(self, cpu: float, wall: float) -> bool:
        done = len(self.folders())
        if done > (self.seen[-1][0] if self.seen else 0):
            self.seen.append((done, cpu, wall))
        return len(self.seen) > 1 and done >= SAMPLE

    def finish(self, ids: pa.ChunkedArray) -> None:
        """Make the other shards of those that are there, which hold the same images; the last one is left to the command."""
        done, size = self.folders(), self.kind.size
        for number in range(len(done), -(-len(ids) // size) - 1):
            first = number * size
            name = f"{first:012}" if len(done[0].name) == 12 else f"{number:06}"
            self.kind.again(done[0], done[0].with_name(name), first, ids.slice(first, size))

    def extrapolated(self, rest: Used, images: int) -> Used:
        """All shards at the pace of those that were seen, with the start before them, and `rest`, which found them finished."""
        (begun, *first), (ended, *last) = self.seen[0], self.seen[-1]
        left = (images / self.kind.size - begun) / (ended - begun)
        cpu, wall = (a + left * (b - a) for a, b in zip(first, last, strict=True))
        done, memory = ended * self.kind.size, max(rest.memory, self.memory)
        return replace(rest, cpu=rest.cpu + cpu, wall=rest.wall + wall, memory=memory, done=done, rest=rest.cpu)


def _linked(example: Path, to: Path, files: str = "*") -> None:
    for file in example.glob(files):
        os.link(file, to / file.name)


def _scores(example: Path, to: Path, first: int, ids: pa.ChunkedArray) -> None:
    to.mkdir()
    _linked(example, to)


def _labels(example: Path, to: Path, first: int, ids: pa.ChunkedArray) -> None:
    with artifact.writing(to) as tmp:
        pq.write_table(pa.table({"id": ids}), tmp / labels.FILE, compression="zstd", use_dictionary=False)
        _linked(example, tmp, "*.npy")


def _packed(example: Path, to: Path, first: int, ids: pa.ChunkedArray) -> None:
    rows = pq.read_table(example / pack.ROWS)
    paths = pa.array([path.replace(example.name, to.name) for path in rows["path"].to_pylist()]).dictionary_encode()
    rows = rows.set_column(0, "id", ids).set_column(1, "path", paths).cast(manifest.SCHEMA)
    with artifact.writing(to) as tmp:
        pq.write_table(rows, tmp / pack.ROWS)
        _linked(example, tmp, "*.tar")


def _found(example: Path, to: Path, first: int, ids: pa.ChunkedArray) -> None:
    rows = pq.read_table(example / search.ROWS)
    moved = pa.array(rows["row"].to_numpy() + first, rows["row"].type)
    with artifact.writing(to) as tmp:
        pq.write_table(rows.set_column(rows.schema.get_field_index("row"), rows.schema.field("row"), moved), tmp / search.ROWS)


SHARDED = {
    "search": Sharded("*/pool-reference/[0-9]*", search.SHARD, 0, _found),
    "score": Sharded("*/[0-9]*", score.SHARD, 1_000_000, _scores),
    "pack": Sharded("*/[0-9]*", pack.SHARD, 1_000_000, _packed),
    "label": Sharded("*/[0-9]*", label.SHARD, 1_000_000, _labels),
}
POOLS = {"search": "data/prepare/pool", "score": "data/dedup/pool", "pack": "data/dedup/pool", "label": "data/dedup/pool"}


# Results --------------------------------------------------------------------------------------------------------------


class Results:
    """What was measured, in results.json: by the number of images and the piece."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "results.json"

    @property
    def rows(self) -> dict[str, dict[str, dict[str, Any]]]:
        return dict(json.loads(self.file.read_text())) if self.file.exists() else {}

    def has(self, images: int, piece: Piece) -> bool:
        row = self.rows.get(str(images), {}).get(piece.name)
        return row is not None and row["problem"] is None

    def keep(self, images: int, piece: Piece, used: Used) -> None:
        rows = self.rows
        rows.setdefault(str(images), {})[piece.name] = asdict(used)
        with artifact.writing_file(self.file) as tmp:
            tmp.write_text(json.dumps(rows, indent=1) + "\n")

    def of(self, piece: Piece) -> dict[int, Used]:
        """By the number of images, ascending."""
        found = {int(images): Used(**rows[piece.name]) for images, rows in self.rows.items() if piece.name in rows}
        return dict(sorted(found.items()))


def table(results: Results) -> str:
    """Markdown, a row for each piece and size. `grows as`: the power of the number of images by which the CPU time grew."""
    sets = f"{CLASSES} classes, {CLASSES * LABELLED:,} labelled and {CLASSES * VAL:,} val images"
    lines = [
        f"{machine()}; images of {SIDE} px, {sets}; seed 0, each once.",
        "The peak of memory is that of the process, with the files that it maps.",
        "",
        "| stage | images | CPU s | µs an image | grows as | wall s | peak GB | written MB | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for piece in PIECES:
        before: tuple[int, Used] | None = None
        for images, used in results.of(piece).items():
            if used.problem:
                lines.append(f"| `{piece.name}` | {images:,} | | | | {used.wall:,.0f} | {used.memory:.2f} | | {used.problem} |")
                continue
            power = math.log(used.cpu / before[1].cpu) / math.log(images / before[0]) if before else None
            note = f"extrapolated from {used.done:,} images; {used.rest:,.0f} s at full size" if used.done else ""
            each, grows = 1e6 * used.cpu / images, "" if power is None else f"N^{power:.2f}"
            figures = f"{used.cpu:,.1f} | {each:,.1f} | {grows} | {used.wall:,.0f} | {used.memory:.2f}"
            lines.append(f"| `{piece.name}` | {images:,} | {figures} | {used.written / 1e6:,.1f} | {note} |")
            before = images, used
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
