"""One thin file for each verb of dvc.yaml: its section of params, and `run`.

Nothing here is needed by another stage, and no stage imports another: what two of them share has a room.
"""

import sys

from pipeline.harness import parent

if sys.argv[0] == "-m":  # Python has been asked for a stage, and has not looked into it: what that imports takes seconds
    parent.end_with_starter()
