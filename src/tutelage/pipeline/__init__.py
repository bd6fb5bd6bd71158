"""What all stages of a run share: checks before the start, the lock on the run folder, the pilot."""
