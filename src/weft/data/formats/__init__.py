"""Records to examples: what the field's formats look like, told by their keys."""
