"""Sizes of memory, in bytes; without torch, for plans."""

KIB = 1024
MIB = 1024**2
GIB = 1024 * MIB
