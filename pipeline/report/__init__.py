"""Measuring models and putting them side by side: the format of an evaluation, statistics, table, plots, page.

Used by `evaluate` and `compare`. What a network answers belongs to `models`; a change here trains nothing again.
"""
