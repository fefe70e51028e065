"""Rayloom fine-tunes language models on a Ray cluster: one YAML file is one job."""

__version__ = "0.1.0"
