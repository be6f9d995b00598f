"""Arrays and videos from files and into files.

Imports the engine's errors and `files`. Another format is read in `inputs` and written in `outputs`.
"""
