"""The command line: commands, their options, and one sentence for everything that fails.

Imports `tasks` inside the commands, so that ``--help`` answers at once. A new command parses here and works in
`tasks`, which it hands its options as one dataclass of `tasks/choices.py`.
"""
