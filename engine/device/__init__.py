"""The seam between the engine and what runs graphs: modules, streams, events, lanes, placements, and pools of memory.

Imports `bundle` and no implementation of a device. A promise that every device has to keep is written down here
first, then kept in `cpu` and `cuda`.
"""
