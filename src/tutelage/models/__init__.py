"""Teachers, students, their heads, and the loading of weights."""
