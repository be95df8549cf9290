"""Metrics, temperatures, plots and the lm-evaluation-harness."""
