"""Measurements, each printed as a ratio against its target: run one with ``python -m benchmarks.NAME``."""
