"""Sweeps: many settings of one job, tried over one base."""
