"""Measure what a plan does to a model."""
