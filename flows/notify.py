"""`python -m flows notify URL`: have Prefect tell a webhook of every run that failed."""

import contextlib
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from prefect.automations import Automation
from prefect.blocks.webhook import Webhook

FILE = Path(__file__).with_name("failed_runs.yaml")
BLOCK = "winnow-failed-runs"


class WrongAddress(Exception):
    """What was given is no address of a webhook."""


async def tell(url: str) -> str:
    """Keep the address in a block of the Prefect that PREFECT_API_URL names, and make the automation of FILE, in place of the one
    that is there; returns its name.

    What is sent is JSON, `{"text": ...}`, which Slack, Mattermost and many others take. Raises WrongAddress.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise WrongAddress(f"{url!r} is no address of a webhook: `https://hooks.example.org/...`.")
    block = Webhook.model_validate({"url": url, "headers": {"Content-Type": "application/json"}})
    saved = await block.asave(BLOCK, overwrite=True)
    (wanted,) = yaml.safe_load(FILE.read_text())["automations"]
    wanted["actions"][0]["block_document_id"] = str(saved)
    with contextlib.suppress(ValueError):  # there is none yet
        await (await Automation.aread(name=wanted["name"])).adelete()
    return str((await Automation.model_validate(wanted).acreate()).name)
