"""Examples to token ids with a loss weight per token."""
