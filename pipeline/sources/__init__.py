"""Where images come from, one file a kind: folders, tars, Parquet tables, data sets of torchvision.

Used by `prepare` (and, to write tars, by `pack`). What comes after the manifest belongs elsewhere: no other room knows a source.
"""
