"""What is shipped: the folder ``NAME.warp``, its manifest, and the checks that open it with nothing trusted.

Imports the engine's errors, `spec` and `files`, nothing that runs a graph. A new kind of file or record goes into
`manifest`, and what it is for into `roles`.
"""
