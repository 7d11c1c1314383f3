"""One attempt at a stage in this folder: `dvc repro` of it, its lines heard, its failure judged."""

import re
from collections import Counter
from collections.abc import Sequence
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

    def __init__(self, stage: str) -> None:
        self.stage, self.log, self.outcome = stage, get_run_logger(), "Cached"
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
                    percent, key=artifact_key(self.stage, "progress"), description=line
                )
            else:
                await aupdate_progress_artifact(self.artifact, percent, description=line)
        except httpx.HTTPError as error:  # the server is away for a moment: no reason to stop a training
            self.log.warning("progress is not shown: %r", error)


def artifact_key(*words: str) -> str:
    """A key for this flow run: keys are shared by all of them, and may hold lower-case letters, digits and dashes."""
    run = str(runtime.flow_run.id or "none")
    return re.sub(r"[^a-z0-9]+", "-", "-".join(["winnow", *words, run[-12:]]).lower())


async def repro(stage: str, where: Where) -> str:
    """Bring a stage up to date in this folder; returns what happened: Completed, Restored (from DVC's cache) or Cached.

    Raises StageFailed.
    """
    listener = Listener(stage)
    env = {**dag.environment(), **where.env}
    ended = await child.run(dag.repro(stage, where.force), cwd=where.folder, env=env, line=listener.hear)
    if ended.code:
        raise verdict(ended)
    if listener.artifact is not None:
        await listener.show(100.0, f"{stage}: done")
    return listener.outcome


def why(ended: child.Ended) -> str:
    """What DVC says of a failure: its first three errors, and the last one, which counts them."""
    errors = dvc.errors(ended.lines)
    return "; ".join(errors[:3] + errors[3:][-1:]) or (ended.lines[-1] if ended.lines else str(ended.code))


class Outcomes:
    """What happened to each stage of the flow runs of this process: an attempt that only pushes what the one before it made finds
    the stage Cached, and yet it was run."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, str]] = {}

    def keep(self, stage: str, outcome: str) -> str:
        """The outcome of the first attempt at the stage that had one to tell; else this one."""
        of_run = self._of.setdefault(str(runtime.flow_run.id), {})
        if of_run.get(stage, "Cached") == "Cached":
            of_run[stage] = outcome
        return of_run[stage]

    def told(self, cached: int) -> str:
        """`2 stages run, 7 restored, 10 cached`; `cached`: how many stages were up to date from the start."""
        counted = Counter(self._of.pop(str(runtime.flow_run.id), {}).values())
        counts = {"run": counted["Completed"], "restored": counted["Restored"], "cached": counted["Cached"] + cached}
        (what, first), *others = [(what, n) for what, n in counts.items() if n] or [("cached", 0)]
        return ", ".join([f"{first} {'stage' if first == 1 else 'stages'} {what}", *(f"{n} {what}" for what, n in others)])


OUTCOMES = Outcomes()


async def exchange(what: str, stages: Sequence[str], where: Where, *, strict: bool = True) -> None:
    """`dvc push` or `dvc pull` of some stages. `strict`: a remote that cannot be reached fails the task, and is tried again."""
    if not (stages and where.share):
        return
    ended = await child.run(dag.command(what, *stages), cwd=where.folder, env={**dag.environment(), **where.env})
    if ended.code and strict:
        raise StageFailed(f"dvc {what} {' '.join(stages)}: {why(ended)}", again=True)
    if ended.code:
        get_run_logger().warning("dvc %s: %s", what, ended.text)
