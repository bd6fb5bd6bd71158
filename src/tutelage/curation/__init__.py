"""From a gallery to a transfer set: embeddings, search, strategies, duplicates and leaks."""
