"""What a quality promise says and how it is kept: thresholds, calibrated margins, conformal risk control.

Imports `bundle` and `metrics`; pure but for reading ``calibration.npz``. Another rule goes beside `conformal`, and
its record into `record`.
"""
