"""Bridges to other evaluation programs. Nothing here is imported by the rest of the package."""
