"""Several adapters into one: rules for their tensors, and what ``weft combine`` does with their folders."""
