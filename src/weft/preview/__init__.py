"""What ``weft preview`` shows: the data as training will read it, and its packs."""
