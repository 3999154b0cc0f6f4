"""Sizes of memory, in bytes."""

MIB = 1024**2
GIB = 1024 * MIB
