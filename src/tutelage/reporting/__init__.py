"""Results for people: tables in the terminal and the page of a run. Loads no torch."""
