"""Metrics, comparisons of methods, and plots."""
