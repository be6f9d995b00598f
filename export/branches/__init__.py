"""Exits without a cache: the generator with fewer channels, and the guide bank they look up.

Imports `graph`, `torch_graph` and `training`. What can be cut out of a layer is said in `channel_rules`; another kind
of exit gets a folder of its own.
"""
