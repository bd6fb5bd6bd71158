"""Studies, which compare methods over label budgets and seeds: methods, cost estimate, records of finished runs and page."""
