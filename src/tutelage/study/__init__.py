"""A study: methods compared over budgets and seeds, its records, its cost beforehand, its page."""
