"""Operators: one a file, with its schema, its reference in plain PyTorch and the launch of each backend."""

from .backends import describe, describe_installation
from .moments import ChannelMoments, channel_moments_update, channel_moments_update_reference

__all__ = [
    "ChannelMoments",
    "channel_moments_update",
    "channel_moments_update_reference",
    "describe",
    "describe_installation",
]
