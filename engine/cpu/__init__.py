"""The CPU as a device: cores shared out between consumer and producers, streams that are threads, a session's memory.

Imports `device` and `bundle`; `cuda` is its sister, and neither imports the other. What only the CPU needs goes here,
what both need into `device`.
"""
