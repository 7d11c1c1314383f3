"""What turns `run(params, *, pool: Path, out: Path, seed: int, ...)` of a stage into its command.

    python -m pipeline.stages.<stage> [<entry>] --<input> PATH ... --out PATH

A stage module is a pure function of typed params and paths. This module reads params.yaml and gives a `run` what it asks for: the
seed, the machine, a working folder, a journal, or all four as its `job`. It stamps the artifacts with their origin, and writes
the metrics file.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib
import inspect
import json
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.errors import Unavailable, UserError
from pipeline.harness import cache, durations, dvc, lockfile, parent, ranks, reference, scratch
from pipeline.harness.job import Job
from pipeline.harness.journal import Journal, open_journal
from pipeline.harness.machine import Machine
from pipeline.store import artifact
from pipeline.store import params as parameters
from pipeline.store.params import Section

Metrics = Mapping[str, Any]
"""JSON values by name; deterministic for the same inputs (timings belong into the journal)."""

WORK = Path(".scratch")
INERT = ("pipeline.harness", "pipeline.tracking", "pipeline.errors")
"""What cannot change a result: rooms and modules that no stage is stale for."""
PARAMS_FILE = Path("params.yaml")
WRONG_INPUT, TRY_AGAIN, INTERRUPTED = 2, 75, 130
TOO_LARGE = ("a file may not grow further", "Raise the limit (`ulimit -f`)")


def main(run: Callable[..., Metrics], parallel: bool = False, gathers: str | None = None, tracked: bool = True) -> None:
    """Run a stage from the command line. Its exit code says whether a repetition may help, which is what `flows` asks.

    2: a UserError, with its message and no traceback. 75: a disk, a network or a process of a pool failed (an OSError, or what is
    Unavailable). 130: interrupted.
    1: a defect of winnow, with its traceback.
    `parallel`: the stage trains with `fit`, so `machine.processes` processes can share it. `gathers`: the stage reads all entries
    of this section, whose names `run` gets as `entries`; its run in MLflow stands for all that they were made from. `tracked`: it
    has a run in MLflow at all.
    """
    parent.end_with_starter()
    with exit_codes("it goes on where it stopped"):
        _main(_importable(run), sys.argv[1:], parallel, gathers, tracked)


@contextlib.contextmanager
def exit_codes(repeated: str) -> Iterator[None]:
    """End the process with the codes and messages that `main` describes. `repeated`: what the command does the next time."""
    try:
        yield
    except UserError as error:
        _stop(f"{error}{cache.advice(error)}", TRY_AGAIN if isinstance(error, Unavailable) else WRONG_INPUT)
    except OSError as error:
        if error.errno in artifact.FULL:
            what, mend = ("the disk is full", "Free space") if error.errno != errno.EFBIG else TOO_LARGE
            _stop(
                f"{what} ({error.filename or 'while writing'}). {mend} and repeat the command: {repeated}.",
                TRY_AGAIN,
            )
        traceback.print_exc()
        sys.exit(TRY_AGAIN)
    except BrokenExecutor:
        traceback.print_exc()
        _stop("a worker process was killed, perhaps for lack of memory. Repeat the command to go on.", TRY_AGAIN)
    except KeyboardInterrupt:
        _stop("interrupted. Repeat the command to go on.", INTERRUPTED)


def _main(run: Callable[..., Metrics], argv: list[str], parallel: bool, gathers: str | None, tracked: bool = True) -> None:
    stage = Path(inspect.getfile(run)).stem
    hints = get_type_hints(run)
    wanted = hints.keys() | (Job._fields if "job" in hints else ())
    paths = [name for name in inspect.signature(run).parameters if hints.get(name) is Path and name != "workdir"]
    args = _parse(stage, inspect.getdoc(run) or "", paths, hints["params"], argv)
    file = Path(args.params)
    if stage not in parameters.SINGLE and args.entry is None:
        args.entry = _entry(stage)
    keys = (stage, args.entry) if args.entry else (stage,)
    if dvc.runs_this() and (wrong := parameters.lacking(parameters.read(file))):
        raise parameters.ParamsError(f"{file}: " + "\n".join(wrong))  # DVC would say so hours later, at the stage that needs it
    params = parameters.load(file, hints["params"], keys)
    machine = parameters.load(file, Machine, ("machine",)) if "machine" in parameters.read(file) else Machine()
    if machine.executor != "local" and run.__module__ == "__main__":
        # What goes to other machines has to be found there by its own name.
        run = importlib.import_module(sys.modules["__main__"].__spec__.name).run  # type: ignore[union-attr]
    if parallel and machine.processes > 1 and not ranks.launched():
        ranks.launch(machine.processes, f"pipeline.stages.{stage}", argv)
    first = ranks.is_first()
    artifact.discard.set(not first)
    if first and dvc.runs_this():
        lockfile.keep(WORK)
    named = _filled({name: getattr(args, name) for name in paths}, file, keys)
    outs = {name: path for name, path in named.items() if is_out(name)}
    inputs = {name: path for name, path in named.items() if not is_out(name)}
    injected: dict[str, Any] = {"machine": machine}
    if gathers is not None:
        injected["entries"] = tuple(parameters.read(file).get(gathers) or ())
    record = _record(stage, args.entry, params.model_dump(mode="json"), inputs, injected.get("entries", ()))
    if "seed" in wanted:
        record["seed"] = injected["seed"] = parameters.load_seed(file)
    record["key"] = _key(record)
    name = ".".join(keys)
    with _only_one(name) if first else contextlib.nullcontext():
        workdir = WORK / name / record["key"][:16]
        resumed = workdir.is_dir() and any(workdir.iterdir())
        injected["workdir"] = workdir
        if "workdir" in wanted:
            workdir.mkdir(parents=True, exist_ok=True)
        artifact.provenance.set(record)
        journal = injected["journal"] = (
            open_journal(record, WORK / "journal", gathers is not None) if first and tracked else Journal()
        )
        if "job" in wanted:
            injected["job"] = Job(**{name: injected[name] for name in Job._fields})
        random.seed(0)
        start = time.monotonic()
        try:
            metrics = dict(run(params, **named, **{k: v for k, v in injected.items() if k in hints}))
            metrics_file = Path("data", stage, f"{args.entry}.json") if args.entry else Path("data", stage, "metrics.json")
            if first:
                with artifact.writing_file(metrics_file) as tmp:
                    tmp.write_text(json.dumps(metrics, indent=1) + "\n")
        except BaseException as error:
            journal.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", {}, [])
            raise
        journal.log(seconds=time.monotonic() - start)
        journal.finish("FINISHED", metrics, list(outs.values()))
        if first:
            scratch.remove(WORK / name)
            _say(name, metrics, time.monotonic() - start)
            if not resumed:
                _keep_duration(name, record, machine, named)
            if progress := durations.told(dvc.project_folder() / WORK):
                print(f"plan: {progress}", file=sys.stderr)


def _importable(run: Callable[..., Metrics]) -> Callable[..., Metrics]:
    """The `run` of `pipeline.stages.x` where `python -m` calls that module __main__: other processes know it by its name only."""
    spec = sys.modules["__main__"].__spec__
    if spec is None or run.__module__ != "__main__":
        return run
    importable: Callable[..., Metrics] = getattr(importlib.import_module(spec.name), run.__name__)
    return importable


def _entry(stage: str) -> str:
    """The entry that DVC runs: `ssld` of `distil@ssld`. It stands in no command line, so that no shell ever reads it."""
    name, entry = dvc.stage()
    if name != stage or not entry:
        raise UserError(f"which entry of `{stage}`? Give its name: `python -m pipeline.stages.{stage} <entry> ...`.")
    return entry


def _filled(paths: Mapping[str, str], file: Path, keys: tuple[str, ...]) -> dict[str, Path]:
    """The paths of the command line, in which `{entry}` stands for the entry, and `{teacher}` for that key of its params."""
    own: Any = parameters.read(file)
    for key in keys:
        own = own.get(key) if isinstance(own, dict) else None

    def of(match: re.Match[str]) -> str:
        found = keys[-1] if match[1] == "entry" else own.get(match[1]) if isinstance(own, dict) else None
        if not isinstance(found, str):
            key = ".".join((*keys, match[1]))
            raise parameters.ParamsError(f"{file}: `{key}` is missing, which {match.string} is made of. Add it.")
        return found

    return {name: Path(re.sub(r"\{(\w+)\}", of, path)) for name, path in paths.items()}


def is_out(name: str) -> bool:
    """Whether a path argument of `run` is written by the stage: `out`, `pool_out`, `leaks_out`, ... by its name."""
    return name == "out" or name.endswith("_out")


def _parse(stage: str, doc: str, paths: list[str], params: type[Section], argv: list[str]) -> argparse.Namespace:
    where = stage if stage in parameters.SINGLE else f"{stage}.<entry>"
    params = getattr(sys.modules["__main__"], params.__name__, params)  # pydantic finds no texts in a module's second import
    keys = "\n".join(f"  {line}" for line in reference.text(params))
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.stages.{stage}",
        description=doc.split("\n\n")[0],
        epilog=f"keys of {where} in params.yaml, each with its type and default:\n\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "entry", nargs="?", help=f"the entry of the section `{stage}` of the params file, where it has entries; under DVC its own"
    )
    for name in paths:
        parser.add_argument(f"--{name.replace('_', '-')}", required=True, metavar="PATH")
    parser.add_argument("--params", default=str(PARAMS_FILE), metavar="FILE")
    return parser.parse_args(argv)


def _record(
    stage: str, entry: str | None, params: dict[str, Any], inputs: dict[str, Path], entries: tuple[str, ...]
) -> dict[str, Any]:
    """Who makes the artifacts of this run, from what: deterministic, so it may stand inside them."""
    seen, lineage = {}, {}
    for name, path in inputs.items():
        if not path.exists():
            raise UserError(f"--{name.replace('_', '-')}: {path} is not there. Run `dvc repro`, which makes it first.")
        origin = artifact.record(path)
        seen[name] = {"path": path.as_posix(), "identity": artifact.identity(path), "key": origin.get("key")}
        for made_by in filter(None, [origin, *(artifact.record(path / entry) for entry in entries)]):
            if not isinstance(made_by.get("key"), str):
                raise artifact.ArtifactError(f"{path / artifact.RECORD} has no key: no stage wrote it. Remove {path}.")
            lineage.update(made_by.get("lineage", {}))
            lineage[made_by["key"]] = {k: v for k, v in made_by.items() if k != "lineage"}
    return {"stage": stage, "entry": entry, "params": params, "inputs": seen, "code": _code(), "lineage": lineage}


def _key(record: Mapping[str, Any]) -> str:
    """The identity of a run: equal keys mean equal results. Code, params, seed and the content of every input are in it."""
    content = {k: v for k, v in record.items() if k != "lineage"}
    content["inputs"] = {name: i["identity"] for name, i in record["inputs"].items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _code() -> str:
    """A hash of the sources of the pipeline modules this stage has loaded, without those that cannot change a result."""
    digest = hashlib.sha256()
    for _, file in sorted(_sources().items()):  # by the module's name: two rooms may have files of one name
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sources() -> dict[str, Path]:
    """The files of those modules, by the module's name."""
    files: dict[str, Path] = {}
    for name, module in list(sys.modules.items()):
        name = module.__spec__.name if name == "__main__" and module.__spec__ else name
        if name.startswith("pipeline.") and not name.startswith(INERT) and getattr(module, "__file__", None):
            files[name] = Path(str(module.__file__))
    return files


def _keep_duration(name: str, record: Mapping[str, Any], machine: Machine, paths: Mapping[str, Path]) -> None:
    """Note how long this run took, of what, and with which code, for the plans of later ones."""
    wall, cpu = durations.usage()
    durations.keep(
        dvc.project_folder() / WORK,
        name=name,
        **{what: record[what] for what in ("stage", "entry", "params")},
        rows=durations.rows_of(paths),
        machine=durations.machine_of(machine),
        wall=wall,
        cpu=cpu,
        code={module: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for module, file in _sources().items()},
    )


class _only_one:
    """A lock on the stage entry, so that a survivor of a killed `dvc repro` and its successor never write together."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        folder = WORK / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / self.name).open("a")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running the stage {self.name} in this folder. Wait for it, or end it.") from None

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _say(name: str, metrics: Metrics, seconds: float) -> None:
    shown = ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in metrics.items() if isinstance(v, int | float)
    )
    print(f"{name}: done in {seconds:.1f} s. {shown}", file=sys.stderr)


def _stop(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


__all__ = ["Job", "Journal", "Metrics", "exit_codes", "is_out", "main"]
