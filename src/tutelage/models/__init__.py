"""Teachers, students, their heads, and where weights come from."""
