"""The flow of a worker that has a GPU: one stage, for a `winnow` that runs elsewhere."""

import json
from pathlib import Path

import yaml
from prefect import flow
from prefect.artifacts import acreate_table_artifact
from prefect.states import Completed, State

from flows import dag, tracking, worktree
from flows.attempt import StageFailed, Where, artifact_key
from flows.tasks import OUTCOME, limited, run_stage
from flows.variant import check


@flow(name="stage", flow_run_name="{name}", persist_result=False)
async def stage(
    name: str,
    workspace: str,
    folder: str,
    token: str,
    commit: str,
    changed: list[str],
    params: str,
    lock: str,
    force: bool = False,
    hours: float = 48.0,
    retries: int = 2,
    tags: dict[str, str] | None = None,
) -> State:
    """Run one stage of dvc.yaml for a `winnow` that runs elsewhere.

    A worker that was started in the folder of that run (on one machine, or at the same path of a shared disk) works there. Any
    other makes a worktree of its own clone at the same commit, and pulls what the stage needs from the DVC remote. It pushes what
    it made, and hands back the entry of dvc.lock and the metrics.
    """
    here = Path.cwd()
    env = {"WINNOW_TAGS": json.dumps(tags or {}), "MLFLOW_TRACKING_URI": tracking.uri(here)}
    same = here == Path(workspace) and Path(token).is_file()
    pull: list[str] = []
    if same:
        where = Where(Path(folder), here, force, env)
    else:
        if changed:
            raise StageFailed(
                f"a worker elsewhere cannot see the uncommitted changes of {', '.join(changed)}. Commit, push, repeat.",
                again=False,
            )
        if not dag.has_remote(here):
            raise StageFailed(
                f"the clone of this worker, {here}, is not the run's and has no DVC remote. `dvc remote add --default` one.",
                again=False,
            )
        place = worktree.make(here, commit, key=[name, params], params=params, lock=lock)
        await check(place, "--names")  # before DVC reads what came with this run
        above = dag.read(place).upstream([name])  # all of it: manifests name images in the sources that `prepare` has read
        worktree.link_sources(here, place, dag.missing_sources(place, dag.stale(place, above)))
        where = Where(place, here, force, env, share=True)
        pull = [s for s in above if s != name]
    state = await limited(run_stage, name, hours, retries)(name, where, pull, return_state=True)
    if not state.is_completed():
        return state
    rows = [{"what": "outcome", "content": state.name}]
    if not same:
        rows += [
            {"what": "dvc.lock", "content": yaml.safe_dump(dag.lock_entry(where.folder, name), sort_keys=False)},
            *({"what": path, "content": text} for path, text in dag.loose_files(where.folder, name).items()),
        ]
        await tracking.flush(where)
        worktree.remove(here, where.folder)
    await acreate_table_artifact(rows, key=artifact_key(OUTCOME, name), description=f"What {name} hands back to the run")
    return Completed(name=state.name, message=name)
