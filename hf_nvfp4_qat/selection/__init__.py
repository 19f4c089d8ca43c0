"""Which layers train in NVFP4, and which share a scale: by their names, and by the structure of the model."""
