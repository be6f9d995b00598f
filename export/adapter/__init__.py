"""The trained part at the cut: cache encoder and warp consumers, recorded, distilled, and written as graphs.

Imports `graph`, `frames` and `training`. Another network that reads the cache goes beside `network`, with its graph
in `graphs`.
"""
