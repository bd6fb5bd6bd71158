"""Training on labels: the baseline, the students of the committee, the last stage, the whole teacher."""
