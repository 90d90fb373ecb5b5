"""Evaluation: the rendered world, benchmarks and result files."""
