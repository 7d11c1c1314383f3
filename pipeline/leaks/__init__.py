"""Is one picture a copy of another? Features, index, geometry, verdict; the search through a pool, the decisions, the gallery.

Used by `dedup`, and usable without torch and DVC.
"""
