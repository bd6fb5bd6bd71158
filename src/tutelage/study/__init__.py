"""Studies, which compare methods over label budgets and seeds: arms, cost estimate, records of finished runs and page."""
