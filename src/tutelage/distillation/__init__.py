"""The student learns the targets: teacher outputs, objectives, the loop."""
