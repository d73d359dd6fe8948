"""Predict parameters, time and memory of a run."""
