"""Codes, steps, rotations and bytes."""
