"""Inputs that are broken, or made to harm: `python -m tests.hostile`."""
