"""Training on labels: the baseline, the students of the committee, the last stage, and fine-tuning of the whole teacher."""
