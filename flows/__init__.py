"""Prefect: when and where the stages of dvc.yaml run. Start with `run.py`."""
