"""Pipelines: jobs one after the other, each of which begins at what one before it has trained."""
