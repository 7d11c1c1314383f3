"""The built-in data: what a scene looks like, and the data set of scenes.

Used by `draw` alone, so that winnow runs on a machine without images.
"""
