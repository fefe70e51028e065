"""Stages: one file per training approach."""
