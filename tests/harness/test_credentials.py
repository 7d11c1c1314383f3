"""No password reaches a file, a log or a link."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.harness import credentials

ROOT = Path(__file__).parents[2]
WORD = "s3cret-w0rd"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"http://me:{WORD}@host:5000/x", "http://***@host:5000/x"),
        (f"https://{WORD}@host", "https://***@host"),
        (f"postgresql://me:{WORD}/@x@host/db", "postgresql://***@host/db"),
        (f"API request to http://me:{WORD}@host/api failed: 'http://me:{WORD}@host'", "API request to http://***@host/api failed: 'http://***@host'"),
        (f"http://host/x?a=1&access_token={WORD}&b=2", "http://host/x?a=1&access_token=***&b=2"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://host/#/experiments/1/runs?viewStateShareKey=winnow", "http://host/#/experiments/1/runs?viewStateShareKey=winnow"),
        ("http://host:5000/#/models/winnow", "http://host:5000/#/models/winnow"),
    ],
)  # fmt: skip
def test_what_logs_in_is_hidden(text: str, hidden: str) -> None:
    assert credentials.masked(text) == hidden
    assert credentials.masked(hidden) == hidden


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_URI"])
def test_a_password_of_the_environment_is_hidden_wherever_it_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"http://me:{WORD}@host" if name.endswith("URI") else WORD)
    assert credentials.masked(f"it was {WORD}, alas") == "it was ***, alas"


def test_a_masked_address_is_whole_again_where_the_environment_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{WORD}@host")
    assert credentials.whole("http://***@host") == f"http://me:{WORD}@host"
    assert credentials.whole("http://***@other") == "http://***@other"
    assert not credentials.lacking("http://***@host")
    assert credentials.lacking("http://***@other")
    assert not credentials.lacking("sqlite:///mlflow.db")


def test_a_link_has_no_login() -> None:
    assert credentials.link(f"http://me:{WORD}@host:5000/mlflow/?token={WORD}") == "http://host:5000/mlflow"


def test_prints_and_tracebacks_are_masked() -> None:
    code = (
        "from pipeline.harness import credentials\ncredentials.mask_output()\n"
        "uri = 'http://me:' + 's3cret-' + 'w0rd@host'\nprint(uri)\nraise OSError(uri)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "http://***@host\n"
    assert done.stderr.endswith("OSError: http://***@host\n")
