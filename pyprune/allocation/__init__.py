"""Allocation of a ratio to the layers: the units that each keeps."""
