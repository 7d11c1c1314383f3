"""A command as a child that is heard line by line and never outlives the flow."""

import asyncio
import os
import re
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import anyio

GUARD = Path(__file__).with_name("guard.py")
GRACE_SECONDS = 10.0
KEPT_LINES = 200
_LINE_END = re.compile(rb"[\r\n]+")


class Ended:
    """How a command ended: its exit code (128 + n for signal n) and the last lines of its output."""

    def __init__(self, code: int, lines: Sequence[str]) -> None:
        self.code, self.lines = code, list(lines)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


async def run(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    line: Callable[[str], Awaitable[None]] | None = None,
) -> Ended:
    """Run `command` to its end and give each line it prints, on either stream, to `line` at once.

    When this coroutine is cancelled, or its process dies, the command and all it has started are ended (`flows.guard`), those
    that ask to be left alone with a session of their own excepted. Raises nothing for a command that fails: see `Ended.code`.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(GUARD), str(GRACE_SECONDS), *command,
        cwd=cwd, env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    kept: deque[str] = deque(maxlen=KEPT_LINES)

    async def hear(raw: bytes) -> None:
        text = raw.decode(errors="replace").rstrip()
        if text:
            kept.append(text)
            if line is not None:
                await line(text)

    try:
        rest = b""
        while block := await process.stdout.read(1 << 16):
            *whole, rest = _LINE_END.split(rest + block)
            for raw in whole:
                await hear(raw)
        await hear(rest)
        return Ended(await process.wait(), kept)
    finally:
        process.stdin.close()  # what the guard waits for
        with anyio.CancelScope(shield=True):
            await process.wait()
