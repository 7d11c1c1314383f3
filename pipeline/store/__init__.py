"""What lies on the disk and is read by all: artifacts, params, manifests of images, their scores, and the one decoder.

A change here makes every stage stale. What only some stages read or write belongs to their room.
"""
