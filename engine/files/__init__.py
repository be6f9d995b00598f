"""How files are written, so that each is whole or not there, and how two processes keep out of each other's way.

Imports the engine's errors alone. Anything that writes beside and renames, or locks, goes here and is used by all
other folders.
"""
