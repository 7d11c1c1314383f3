"""Progress of long work: a live bar in a terminal, a plain line every ten seconds in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tqdm import tqdm

from pipeline.harness import ranks

LOG_SECONDS = 10.0
T = TypeVar("T")


class Bar(Protocol):
    """What `bar` gives: `update` by the items done since the last call, with figures worth showing beside the rate."""

    def update(self, items: int, **figures: float) -> None: ...


@contextmanager
def bar(total: int | None, unit: str, label: str, done: int = 0) -> Iterator[Bar]:
    """Show items, rate and time left of `total` items on stderr; `done` of them were finished by an earlier run."""
    shown = (
        _Silent()
        if not ranks.is_first()
        else _Live(total, unit, label, done)
        if sys.stderr.isatty()
        else _Lines(total, unit, label, done)
    )
    try:
        yield shown
    finally:
        shown.close()


def track(items: Iterable[T], total: int | None, unit: str, label: str) -> Iterator[T]:
    """Pass `items` through, counting each as one `unit`."""
    with bar(total, unit, label) as shown:
        for item in items:
            yield item
            shown.update(1)


class _Silent:
    def update(self, items: int, **figures: float) -> None:
        pass

    def close(self) -> None:
        pass


class _Live:
    def __init__(self, total: int | None, unit: str, label: str, done: int) -> None:
        self.tqdm = tqdm(total=total, unit=f" {unit}", desc=label, initial=done, dynamic_ncols=True)

    def update(self, items: int, **figures: float) -> None:
        if figures:
            self.tqdm.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)
        self.tqdm.update(items)

    def close(self) -> None:
        self.tqdm.close()


class _Lines:
    def __init__(self, total: int | None, unit: str, label: str, done: int) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.first, self.n = done, done
        self.start = self.last = time.monotonic()
        self.figures: dict[str, float] = {}
        if done:
            print(
                f"{label}: goes on at {done:,}{f' of {total:,}' if total is not None else ''} {unit}", file=sys.stderr, flush=True
            )

    def update(self, items: int, **figures: float) -> None:
        self.n += items
        self.figures = figures or self.figures
        now = time.monotonic()
        if now - self.last >= LOG_SECONDS:
            self.last = now
            self._line(now)

    def _line(self, now: float) -> None:
        rate = (self.n - self.first) / max(now - self.start, 1e-9)
        text = f"{self.label}: {self.n:,}"
        if self.total is not None:
            text += f" of {self.total:,} {self.unit} ({self.n / max(self.total, 1):.0%})"
        else:
            text += f" {self.unit}"
        text += f", {rate:,.4g} {self.unit}/s"
        if self.total is not None and rate > 0 and self.n < self.total:
            text += f", {clock((self.total - self.n) / rate)} left"
        text += "".join(f", {k} {v:.4g}" for k, v in self.figures.items())
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._line(time.monotonic())


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
