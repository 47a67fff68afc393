"""Rendering: examples become token ids with a loss weight per token."""
