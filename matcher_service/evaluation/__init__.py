"""Calibration and evaluation: thresholds from evidence, errors with their uncertainty.

Everything here but `plots` and `report` is pure statistics on arrays. Ground truth is at hand here, as it never is in
operation. Words and measures follow ISO/IEC 19795-1 and 19795-10; see docs/CALIBRATION.md.
"""
