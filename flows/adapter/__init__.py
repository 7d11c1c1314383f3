"""What winnow leans on and no release promises: private parts, prose and file formats of DVC and Prefect.

All of it that `flows` uses is here (what stages take from DVC is in pipeline/harness/dvc.py), with a test for each part in
tests/flows/test_adapter.py, which names the release that broke it. Nothing else in `flows` imports `dvc`, or a module of Prefect
that its documentation does not name.
"""
