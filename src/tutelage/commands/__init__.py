"""Commands: one file each; a command's signature defines its settings, and its file reads from top to bottom."""
