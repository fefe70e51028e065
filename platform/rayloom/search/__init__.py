"""Search: many trials of one job, each with values of its own, on Ray Tune."""
