"""Pieces for a training loop of one's own: selection, the transfer set as a torch Dataset, the delivered student."""
