"""Runs the stages of dvc.yaml on a tiny house, each in a child forked from a process that has imported everything already."""

import contextlib
import ctypes
import gc
import hashlib
import importlib
import itertools
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from pipeline.harness import stage
from pipeline.leaks import search
from pipeline.stages import label, pack, score
from pipeline.store import artifact
from tests.tiny import encoded, tar_of

ROOT = Path(__file__).parent.parent.parent
LEFT_SECONDS = 10.0
MODEL = {"arch": "resnet8", "options": {"width": 4, "stem_stride": 2}, "input": {"size": 32}}
TRAINING = {"steps": 8, "batch": 8, "lr": 0.05}
NAMED = {"model": "small", "view": "shifted", "training": "sgd"}
STUDENT = {"init": "scratch", "teacher": "teach/teacher", **NAMED}
PARAMS: dict[str, Any] = {
    "seed": 0,
    # The smallest checkpoint interval: a training is saved after every step, so that each kill meets another state.
    "machine": {"device": "cpu", "precision": "float32", "threads": 1, "workers": 1, "checkpoint_minutes": 1e-9},
    "draw": {"scenes": {"seed": 0, "labelled": 1, "val": 1, "in_class": 4, "out_of_class": 8, "leaks": 1, "broken": 1}},
    "prepare": {
        "root": "data/raw",
        "labelled": [{"kind": "tar", "path": "labelled.tar"}],
        "val": [{"kind": "tar", "path": "val.tar"}],
        "pool": [{"kind": "tar", "path": "pool.tar"}],
        "holdout": 0.25,
    },
    "remote": {},  # it asks a server, and writes its list as the others write
    "search": {},
    "dedup": {},
    "models": {"small": MODEL},
    "views": {"shifted": {}},
    "trainings": {
        "sgd": TRAINING,
        "lars": {**TRAINING, "optimizer": "lars"},
        "ema": {**TRAINING, "ema": 0.9},
        "adamw": {**TRAINING, "optimizer": "adamw"},
    },
    "pretrain": {
        "base": {"images": "dedup/pool", "model": "small", "memory": {"size": 20, "ema": 0.5}, "training": "lars"},
    },
    "teach": {"teacher": {"init": "scratch", **NAMED, "training": "ema"}},
    "ensemble": {"both": {"first": "teach/teacher", "second": "distil/online"}},
    "score": {"teacher": {"teacher": "teach/teacher", "m": 2}},
    "select": {"top": {"scores": "score/teacher", "rule": "top", "k": 5}},
    "pack": {"top": {"images": "select/top", "side": 24}},
    "label": {"top": {"teacher": "teach/teacher", "images": "select/top", "views": 2, "view": "shifted"}},
    "distil": {
        "online": {**STUDENT, "images": "select/top"},
        "cached": {**STUDENT, "teacher": "label/top", "images": "select/top", "training": "adamw"},
    },
    "self_distil": {"exits": {**STUDENT, "teacher": "labels", "images": "dedup/train"}},
    "evaluate": {
        "teacher": {"role": "baseline", "model": "teach/teacher"},
        "online": {"role": "candidate", "model": "distil/online"},
    },
    "export": {"online": {"model": "distil/online", "evaluation": "evaluate/online"}},
    "compare": {"title": "faults", "baseline": "teacher"},
}


@dataclass(frozen=True)
class Command:
    """One stage entry of dvc.yaml as `python -m pipeline.stages.<stage> <argv>`, with the paths it reads and writes."""

    name: str
    stage: str
    argv: tuple[str, ...]
    ins: tuple[Path, ...]
    outs: tuple[Path, ...]


class House:
    """A folder with tiny images, params.yaml, and whatever the stages make of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = folder / "data" / "raw"
        names = [f"{name}/{i:02}.jpg" for name in ("ant", "bee") for i in range(16)]
        tar_of(raw / "labelled.tar", {name: _textured(i) for i, name in enumerate(names[:12] + names[16:28])})
        val = {name: _textured(100 + i) for i, name in enumerate(names[12:16] + names[28:])}
        tar_of(raw / "val.tar", val)
        leaks = dict(zip(("leak0.jpg", "leak1.jpg"), val.values(), strict=False))
        tar_of(raw / "pool.tar", {f"{i:02}.jpg": _textured(200 + i) for i in range(22)} | leaks)
        for file in ("scratch", "labels", "overrides.csv"):
            shutil.copy(ROOT / "data" / file, folder / "data" / file)
        shutil.copytree(ROOT / "data" / "remote", folder / "data" / "remote")
        (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))
        search.SHARD = label.SHARD = pack.SHARD = score.SHARD = 16  # so that there are finished shards to resume from
        os.environ["WINNOW_TRACKING"] = "off"

    def start(self, command: Command) -> int:
        """Fork a child that runs the stage; returns its pid."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.chdir(self.folder)
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = [command.stage, *command.argv]
            module = importlib.import_module(f"pipeline.stages.{command.stage}")
            module.main() if command.stage == "compare" else stage.main(module.run)
            Path("modules").write_text("\n".join(sys.modules))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, command: Command) -> tuple[int, float]:
        """Run the stage to its end: exit status and seconds."""
        begin = time.monotonic()
        pid = self.start(command)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - begin

    def warm(self) -> None:
        """Import what the stage that has just ended had imported, so that no child does it again: seconds of each run."""
        for name in (self.folder / "modules").read_text().splitlines():
            with contextlib.suppress(ImportError, AttributeError):  # modules that only others can import
                importlib.import_module(name)
        gc.freeze()  # a child that collects garbage would copy every page of these modules

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def killed(self, command: Command, after: float) -> bool:
        """Run the stage and kill it after so many seconds; whether it was still at work then."""
        pid = self.start(command)
        time.sleep(after)
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if ended:
            return False
        os.kill(pid, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

    def forget(self, command: Command) -> None:
        """Remove what the stage has written and what it could resume from."""
        for path in (*command.outs, Path(".scratch")):
            whole = self.folder / path
            if whole.is_dir():
                shutil.rmtree(whole)
            else:
                whole.unlink(missing_ok=True)

    def written(self, command: Command) -> dict[str, str]:
        """SHA-256 of every file that the stage has written, by path."""
        files = [f for out in command.outs for f in ([self.folder / out] if out.suffix else (self.folder / out).rglob("*"))]
        return {str(f.relative_to(self.folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}

    def artifacts_read(self, command: Command) -> Iterator[Path]:
        for path in command.ins:
            for folder in (self.folder / path, *(self.folder / path).glob("*/")):
                if (folder / artifact.CHECKSUMS).is_file():
                    yield folder


def _textured(seed: int) -> bytes:
    """A JPEG file of 32 pixels with enough detail for the leak check to be quick and sure."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return encoded(cv2.resize(coarse, (32, 32), interpolation=cv2.INTER_CUBIC), "JPEG", quality=95)


def commands() -> list[Command]:
    """The stage entries that dvc.yaml has with PARAMS, each after those that it reads from."""
    found = []
    for name, spec in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        entries = PARAMS[name] if "foreach" in spec else {None: {}}
        for key, item in entries.items():
            root = PARAMS["prepare"]["root"]
            values = {"${key}": key, "{entry}": key, "${prepare.root}": root, "{root}": root}
            values |= {f"${{item.{k}}}": v for k, v in item.items()} | {f"{{{k}}}": v for k, v in item.items()}
            found.append(_command(name, key, _filled(spec.get("do", spec), values)))
    ordered: list[Command] = []
    made = {Path("data") / file for file in ("scratch", "labels", "overrides.csv", "raw", "remote", "evaluate")}
    while len(ordered) < len(found):
        ready = [c for c in found if c not in ordered and made.issuperset(c.ins)]
        later = [c for c in ready if c.stage != "compare"]
        for command in later or ready:
            ordered.append(command)
            made.update(command.outs)
    return ordered


def _filled(tree: Any, values: dict[str, Any]) -> Any:
    """`tree` with each of `values` replaced: ${name} as DVC does, {name} as a stage does."""
    if isinstance(tree, dict):
        return {_filled(k, values): _filled(v, values) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_filled(part, values) for part in tree]
    if isinstance(tree, str):
        for name, value in values.items():
            tree = tree.replace(name, str(value))
    return tree


def _command(name: str, key: str | None, spec: dict[str, Any]) -> Command:
    argv = [*([key] if key else []), *spec["cmd"].split()[3:]]
    paths = {flag: Path(value) for flag, value in itertools.pairwise(argv) if flag.startswith("--")}
    outs = [Path(next(iter(out))) if isinstance(out, dict) else Path(out) for out in [*spec["outs"], *spec.get("metrics", ())]]
    return Command(
        f"{name}@{key}" if key else name,
        name,
        tuple(argv),
        tuple(path for flag, path in paths.items() if not stage.is_out(flag[2:].replace("-", "_"))),
        tuple(outs),
    )


@dataclass
class Killed:
    """What came of the kills of a stage: how many met it at work, and the trials after which something was wrong."""

    met: int = 0
    differing: list[str] = field(default_factory=list)
    """Files with other bytes than the undisturbed stage's."""
    stuck: list[str] = field(default_factory=list)
    """The last words of a stage that did not go on when it was run again."""
    left: int = 0
    """Processes that outlived a killed stage by LEFT_SECONDS."""


def kill(house: House, command: Command, kills: int, random: np.random.Generator, seconds: float) -> Killed:
    """Kill the stage `kills` times at random moments, in trials of one to three kills, and let each trial come to its end.

    `seconds`: how long the undisturbed stage took, which has just run.
    """
    expected, came = house.written(command), Killed()
    for _ in range(10 * kills):
        if came.met >= kills:
            break
        house.forget(command)
        for _ in range(int(random.integers(1, 4))):
            came.met += house.killed(command, random.uniform(0, seconds))
            came.left += end_orphans()
        status, _ = house.run(command)
        if status:
            came.stuck.append(f"{command.name}, killed and run again, ended with status {status}:\n{house.log()}")
            continue
        found = house.written(command)
        came.differing += [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    return came


def adopt_orphans() -> None:
    """From now on whatever a killed stage leaves behind becomes a child of this process, which so can see it (Linux)."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def end_orphans() -> int:
    """Wait for adopted children to end by themselves, and kill those that do not; returns how many did not."""
    deadline, children = time.monotonic() + LEFT_SECONDS, Path(f"/proc/self/task/{os.getpid()}/children")
    left: set[int] = set()
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, _ = os.waitpid(-1, os.WNOHANG)
            if not ended and time.monotonic() > deadline:
                for pid in map(int, children.read_text().split()):
                    left.add(pid)
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0 if ended else 0.01)
    return len(left)


def flip(house: House, command: Command, random: np.random.Generator) -> list[str]:
    """Flip one bit in each artifact that the stage reads, one after the other; the flips that it did not refuse."""
    unnoticed = []
    for folder in house.artifacts_read(command):
        files = sorted(f for f in folder.iterdir() if f.is_file() and f.stat().st_size)
        file = files[random.integers(len(files))]
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        file.write_bytes(broken)
        status, _ = house.run(command)
        if status != stage.WRONG_INPUT or str(folder.relative_to(house.folder)) not in house.log() or "Traceback" in house.log():
            unnoticed.append(f"{command.name}: {file.relative_to(house.folder)}, status {status}: {house.log()[-500:]}")
        file.write_bytes(whole)
    return unnoticed
