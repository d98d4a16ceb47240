"""Compare evaluations of the same cases: statistics, tables, diagrams and one page."""
