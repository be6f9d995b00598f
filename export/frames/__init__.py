"""What a user brings: clips, streams of inputs, where the surface is; checked against the generator before any work.

Imports `graph` for the generator's names and shapes. A new array that frames may carry is read and checked here.
"""
