"""From models to what is shipped: the manifest, the weights that the graphs share, the folder that is written.

Imports `graph`, `frames` and the engine's bundle. A new record of the manifest is filled in here and defined in the
engine.
"""
