"""Metrics, comparisons of methods, plots and the lm-evaluation-harness."""
