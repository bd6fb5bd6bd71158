"""Images and labels: where they are, decoding, the image cache, views, masks, budgets."""
