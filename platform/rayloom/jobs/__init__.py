"""Ray Jobs: package a job, submit it to a cluster, follow it, list and stop jobs; and a local head to try it on."""
