"""Calibration data: a deterministic generator and a loader for the user's own."""
