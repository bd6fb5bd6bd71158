"""Commands: one file each; the signature is its settings, and the file reads from top to bottom."""
