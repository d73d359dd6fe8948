"""Decoder layers one at a time over hidden states."""
