"""Triton kernels, one operator a file. Installed as pyprune.triton_kernels.

The bare name triton_kernels on PyPI belongs to the Triton project: never import it.
"""
