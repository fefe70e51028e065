"""Optimizers: transformers' own by their names, and those that see matrices or blocks of layers."""
