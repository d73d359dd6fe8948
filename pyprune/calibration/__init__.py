"""Texts, token windows, and statistics of activations."""

# How documents become windows (packing.py); here, since the command line's help imports no more of this room.
CONCATENATE, SEPARATE = "concatenate", "separate"
PACKINGS = (CONCATENATE, SEPARATE)
