"""The combination of several adapters into one."""
