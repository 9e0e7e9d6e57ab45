"""What is made of a run: a table, a chart, and all of it as JSON."""
