"""What is wrong with data, and what there is of it: checks, duplicates, figures."""
