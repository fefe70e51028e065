"""Methods: which weights train, and how they are attached to a model."""
