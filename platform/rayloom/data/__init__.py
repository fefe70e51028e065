"""Data Worker: read, align, mix, template, tokenize, pack; one ordered, resumable stream."""
