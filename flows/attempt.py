"""One attempt at a stage in this folder: `dvc repro` of it, its lines heard, its failure judged."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import httpx
from prefect import get_run_logger, runtime
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact

from flows import child, dag
from flows.adapter import dvc

# Exit codes of a stage (pipeline/harness/stage.py) that no repetition will change: its own message says what to mend.
WRONG_INPUT, DEFECT, INTERRUPTED = 2, 1, 130

_ROOT_CAUSE = re.compile(r"Root Cause.*?exitcode *: (-?\d+)", re.S)  # torchrun's report; its own exit code is always 1
_PROGRESS = re.compile(r"^(?P<label>.+?): (?P<n>[\d,]+) of (?P<total>[\d,]+) ")
_BUSY = "another process is running the stage"  # pipeline/harness/stage.py


class StageFailed(Exception):
    """A stage did not end well; `again`: whether a repetition may help (its process was killed, a lock, a disk, the network)."""

    def __init__(self, message: str, again: bool) -> None:
        super().__init__(message)
        self.again = again


@dataclass(frozen=True)
class Where:
    """The folder a run works in, and what its stages get from the run."""

    folder: Path
    workspace: Path
    force: bool
    env: dict[str, str] = field(default_factory=dict, repr=False)  # it holds the address of MLflow, maybe with a password
    share: bool = False  # push what a stage made to the DVC remote, and pull what the lock knows
    label: str = ""  # of one variant of a sweep

    def named(self, stage: str) -> str:
        """The stage as this run calls it: `distil@ssld`, in a sweep `distil@ssld [js]`."""
        return f"{stage} [{self.label}]" if self.label else stage


def verdict(ended: child.Ended) -> StageFailed:
    """Why `dvc repro` of a stage failed, from its last lines: DVC's own exit code is always 255."""
    cause = _ROOT_CAUSE.search(ended.text)
    code = int(cause[1]) if cause else dvc.exit_code(ended.text)
    said = next((line for line in reversed(ended.lines) if line.startswith("error: ")), "").removeprefix("error: ")
    if dvc.is_busy(ended.text) or _BUSY in ended.text:
        return StageFailed("another process works on this stage or waits for it", again=True)
    if code is None:  # DVC itself: killed, or out of reach of its lock, its cache, its remote
        return StageFailed(f"dvc ended with {ended.code}: {ended.lines[-1] if ended.lines else 'no word'}", again=True)
    if code in (WRONG_INPUT, DEFECT, INTERRUPTED):
        return StageFailed(said or f"the stage ended with {code}", again=False)
    return StageFailed(said or f"the stage was killed or could not go on ({code})", again=True)


class Listener:
    """Hears the lines of a stage. Each goes to the run's log; `scoring: 10 of 80 images` moves a progress artifact.

    `outcome`: Cached until DVC says that it runs the stage (Completed) or takes it from its cache (Restored).
    """

    def __init__(self, stage: str, title: str) -> None:
        self.stage, self.title, self.log, self.outcome = stage, title, get_run_logger(), "Cached"
        self.artifact: UUID | None = None

    async def hear(self, line: str) -> None:
        self.log.info(line)
        if (said := dvc.outcome(line)) and said[0] == self.stage:
            self.outcome = said[1]
        elif progress := _PROGRESS.match(line):
            n, total = (int(progress[group].replace(",", "")) for group in ("n", "total"))
            await self.show(100 * n / max(total, 1), line)

    async def show(self, percent: float, line: str) -> None:
        try:
            if self.artifact is None:
                self.artifact = await acreate_progress_artifact(
                    percent, key=artifact_key("progress", self.title), description=line
                )
            else:
                await aupdate_progress_artifact(self.artifact, percent, description=line)
        except httpx.HTTPError as error:  # the server is away for a moment: no reason to stop a training
            self.log.warning("progress is not shown: %r", error)


def artifact_key(*words: str) -> str:
    """The key of what every run shows anew, by which Prefect keeps its history: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(["winnow", *words]).lower()).strip("-")


def run_title() -> str:
    """The name of this flow run, which tells what it runs."""
    return str(runtime.flow_run.name)


async def repro(stage: str, where: Where) -> str:
    """Bring a stage up to date in this folder; returns what happened: Completed, Restored (from DVC's cache) or Cached.

    Raises StageFailed.
    """
    listener = Listener(stage, where.named(stage))
    env = {**dag.environment(), **where.env}
    ended = await child.run(dag.repro(stage, force=where.force), cwd=where.folder, env=env, line=listener.hear)
    if ended.code:
        raise verdict(ended)
    if listener.artifact is not None:
        await listener.show(100.0, f"{stage}: done")
    return listener.outcome


class _RunsAfterAll(Exception):
    """DVC began to run a stage of which it was said to have the result."""


async def restore(stages: Sequence[str], where: Where) -> list[str]:
    """Take the results that DVC has of `stages`, in their order, in one command; returns those that it took.

    None of them is run: where DVC would run one after all it is ended at once, and that stage is left for the run.
    """
    log, restored = get_run_logger(), list[str]()

    async def hear(line: str) -> None:
        log.info(line)
        if said := dvc.outcome(line):
            if said[1] == "Completed":
                raise _RunsAfterAll(said[0])
            restored.append(said[0])

    try:
        env = {**dag.environment(), **where.env}
        ended = await child.run(dag.repro(*stages), cwd=where.folder, env=env, line=hear)
    except _RunsAfterAll as stage:
        log.warning("DVC has no whole result of %s: it is run", stage)
    else:
        if ended.code:
            log.warning("not all could be restored: %s", why(ended))
    return restored


def why(ended: child.Ended) -> str:
    """What DVC says of a failure: its first three errors, and the last one, which counts them."""
    errors = dvc.errors(ended.lines)
    return "; ".join(errors[:3] + errors[3:][-1:]) or (ended.lines[-1] if ended.lines else str(ended.code))


def unpushed(stage: str, where: Where) -> Path:
    """The file that is there from when a stage has run until others have what it made. It holds the outcome: an attempt after a
    failed push, of this run or of a later one, finds the stage Cached, or in DVC's cache, and yet it was run for it."""
    return where.folder / ".scratch" / "flows" / "unpushed" / stage


def remembered(stage: str, outcome: str, where: Where) -> str:
    """The outcome of the attempt that ran the stage, until it is `delivered`."""
    file = unpushed(stage, where)
    if outcome != "Completed" and file.is_file():
        return file.read_text()
    if outcome != "Cached":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(outcome)
    return outcome


def delivered(stage: str, where: Where) -> None:
    """Others have what the stage made."""
    unpushed(stage, where).unlink(missing_ok=True)


async def share(stage: str, outcome: str, where: Where) -> str:
    """Push what a stage made; returns its outcome, which is that of the attempt that made it. Raises StageFailed."""
    if not where.share:
        return outcome
    outcome = remembered(stage, outcome, where)
    await exchange("push", [stage], where)  # whatever the outcome: of what is there already DVC pushes nothing
    delivered(stage, where)
    return outcome


def told(outcomes: Iterable[str]) -> str:
    """`2 stages run, 7 restored, 10 cached`."""
    counted = Counter(outcomes)
    words = {"Completed": "run", "Restored": "restored", "Pushed": "pushed", "Cached": "cached"}
    (what, first), *others = [(word, counted[name]) for name, word in words.items() if counted[name]] or [("cached", 0)]
    return ", ".join([f"{first} {'stage' if first == 1 else 'stages'} {what}", *(f"{n} {word}" for word, n in others)])


async def exchange(what: str, stages: Sequence[str], where: Where, *, strict: bool = True) -> None:
    """`dvc push` or `dvc pull` of some stages. `strict`: a remote that cannot be reached fails the task, and is tried again."""
    if not (stages and where.share):
        return
    ended = await child.run(dag.command(what, *stages), cwd=where.folder, env={**dag.environment(), **where.env})
    if ended.code and strict:
        raise StageFailed(f"dvc {what} {' '.join(stages)}: {why(ended)}", again=True)
    if ended.code:
        get_run_logger().warning("dvc %s: %s", what, ended.text)
