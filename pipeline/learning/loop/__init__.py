"""The one training loop with its optimisers, its resumable state, and the group of processes that share it.

A change here makes everything trained stale.
"""
