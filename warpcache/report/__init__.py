"""What people read: tables in the terminal, charts and pages, JSON records.

Imports the engine's records; measures nothing. A new figure is a row of a table first, which the terminal and the
page both show.
"""
