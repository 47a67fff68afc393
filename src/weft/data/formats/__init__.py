"""Records become examples: the names of a record's fields tell its format."""
