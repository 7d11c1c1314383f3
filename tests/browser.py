"""A page that winnow wrote, in a browser that sees what goes wrong. The fixture `browser` (tests/conftest.py) starts one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 390)
INSIDE = ("file:", "data:", "blob:")


@contextmanager
def started() -> Iterator[Browser]:
    """The system's Chromium, or the one that CHROMIUM names. Skips the test where there is none: nothing is downloaded."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in the variable CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, file: Path, width: int = 1280, **context: Any) -> Iterator[Page]:
    """The page `file`, from disk. At the end there must have been no script error and no request but to files.

    `context`: what Browser.new_context takes, such as color_scheme.
    """
    window = browser.new_context(viewport={"width": width, "height": 900}, **context)
    wrong: list[str] = []
    page = window.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url}"))
    page.on("request", lambda request: None if request.url.startswith(INSIDE) else wrong.append(f"asks for {request.url}"))
    try:
        page.goto(file.resolve().as_uri())
        yield page
    finally:
        window.close()
    assert wrong == []


def is_cut(page: Page) -> bool:
    """Whether the page is wider than its window."""
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))
