"""Folders on disk: adapters in the layouts of PEFT and AdapterHub."""
