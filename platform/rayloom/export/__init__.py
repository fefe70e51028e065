"""What a job has trained, in the form that other programs read."""
