"""What all stages of a run share: checks before anything starts, the run folder held, the pilot."""
