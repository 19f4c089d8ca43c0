"""Where training meets NVFP4: the layer, the scale it reads, and which layers of a model get it."""
