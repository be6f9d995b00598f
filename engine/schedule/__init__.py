"""When producers run and which cache answers a frame: pure decisions, without thread, clock, memory or device.

Imports the engine's errors and `bundle` for names of exits. A new policy is a class in `policy`, and nothing outside
this folder has to know of it.
"""
