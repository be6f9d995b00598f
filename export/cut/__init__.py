"""Where a generator is split in two: candidates, their ranking by measured cost and reuse, and the split itself.

Imports `graph` and `frames`. Another way to find cuts goes beside `enumerate`, another way to judge them into `rank`.
"""
