"""Which exit answers a frame, and whether it kept its promise: predictor, router, costs and audits of one session.

Imports `promise`, `schedule` and `device`. Decisions go into pure files (`router`, `audit_log`), what runs modules
into `runner` and `audits`.
"""
