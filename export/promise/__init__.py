"""What is measured so that quality can be promised: calibration by age, the predictor, the promise's record.

Imports `graph`, `frames`, `adapter` and `training`. Another signal for the router goes into `predictor`; what a
promise demands of frames into `check`.
"""
