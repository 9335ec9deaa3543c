"""Measurements of this PC, everything side by side in one run."""
