"""The smallest job file, for tests that only read it."""

JOB = """\
name: a
model:
  path: m
data:
  train:
    - {path: x.jsonl}
    - y.jsonl
"""
