"""Texts, token windows, and statistics of activations."""
