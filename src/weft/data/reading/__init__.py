"""Files to records: one file per kind of file, all counting lines themselves."""
