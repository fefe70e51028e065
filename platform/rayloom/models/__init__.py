"""Model Loader: from `model.path` to a tokenizer and weights in the right precision."""
