"""One thin file for each verb of dvc.yaml: its section of params, and `run`.

Nothing here is needed by another stage, and no stage imports another: what two of them share has a room.
"""
