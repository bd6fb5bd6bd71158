"""Results for people: tables in a terminal and the page of a run. No torch."""
