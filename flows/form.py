"""What the form of a deployment shows of the pipeline: the stages to choose from, as params.yaml had them when deployed."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import WithJsonSchema

ROOT = Path(__file__).parents[1]


def stages(root: Path) -> list[str]:
    """The names that `targets` takes: each stage of dvc.yaml, and each of its entries in params.yaml; none where there are none.

    DVC is not asked, which takes a second, and this is read whenever the flow is imported.
    """
    try:
        declared = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
        params = yaml.safe_load((root / "params.yaml").read_text())
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    found = []
    for name, stage in declared.items():
        entries = params.get(name) if "foreach" in stage else None
        found += [name, *(f"{name}@{entry}" for entry in entries or {})]
    return found


def _schema(names: list[str]) -> dict[str, Any]:
    """A stage to choose. It decides about the form alone: prefect.yaml has the server take others, too, as `set_params` may add
    an entry, and the flow says which are not there."""
    return {"type": "string", **({"enum": names} if names else {})}


Targets = list[Annotated[str, WithJsonSchema(_schema(stages(ROOT)))]]
