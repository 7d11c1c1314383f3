"""Prefect: when and where the stages of dvc.yaml run. Start with `winnow.py`, the flow of the whole pipeline."""
