"""The job file: YAML and overrides in, one typed `JobConfig` out."""
