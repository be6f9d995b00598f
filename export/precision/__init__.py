"""A bundle in another precision: casts, quantisation, and the parity that decides what stays in fp32.

Imports `graph`, `frames` and `bundle`. Another number format is a conversion here, measured by `parity` as all are.
"""
