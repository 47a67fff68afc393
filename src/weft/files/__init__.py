"""Files and folders on disk: adapters in the layouts of PEFT and AdapterHub, runs, tensors."""
