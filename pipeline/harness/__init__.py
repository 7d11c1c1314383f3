"""How a stage runs: its command line, its journal, its shards of work, its progress, its place in a group of processes.

Nothing here can change a result, so no stage is stale when it changes. What belongs here works for any stage; what computes
something, or knows the name of a stage, belongs elsewhere.
"""
