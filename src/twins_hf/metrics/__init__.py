"""Metrics in the form of `evaluate` modules."""
