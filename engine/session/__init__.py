"""One client's frames: what comes in, what is carried out, what is answered and when.

Imports `schedule`, `routing` and `device`, never the engine, which hands over what a session needs (`parts`). A new
way of feeding frames is a `FrameSource`; a new way of reading them goes beside `reader`.
"""
