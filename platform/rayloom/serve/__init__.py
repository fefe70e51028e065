"""What a job has trained, behind an OpenAI API."""
