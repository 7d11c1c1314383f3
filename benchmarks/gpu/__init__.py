"""The figures that need a GPU, in pieces of minutes, on a machine with little installed: see `benchmarks.gpu.__main__`."""
