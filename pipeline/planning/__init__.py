"""How long stages will take, before they run: their work, counted from params, at rates that are probed or seen in earlier runs.

Inert: no stage depends on it.
"""
