"""Look at what lies below an address: which files, how large, and which content by their ETags or times."""

import sys
from pathlib import Path

from pipeline.harness import stage
from pipeline.sources import remote
from pipeline.sources.remote import Remote
from pipeline.store import artifact


def run(params: Remote, *, out: Path) -> stage.Metrics:
    """List the files below an address, for `prepare`, which reads them in place. Nothing is downloaded.

    DVC runs it each time (`always_changed`): where the list is as it was, nothing else becomes stale.
    """
    objects = remote.look(params)
    if unknown := [file for file in objects if not (file.etag or file.modified)]:
        sys.stderr.write(
            f"GAP: of {len(unknown)} of {len(objects)} files below {params.url} the server tells neither an ETag nor a time: "
            f"another content of the same size is not noticed before an image is read. The first: {unknown[0]}\n"
        )
    with artifact.writing(out) as tmp:
        remote.write(tmp, params, objects)
    return {"files": len(objects), "bytes": sum(file.size for file in objects)}


if __name__ == "__main__":
    stage.main(run, tracked=False)  # MLflow would get a run each time
