"""What the commands do: compile, build, deploy, stream, measure, show, examine; each from files to results.

Imports `media` and `report`; `export` and `models` only inside functions. What a new command does goes here, and can
be called without the command line.
"""
