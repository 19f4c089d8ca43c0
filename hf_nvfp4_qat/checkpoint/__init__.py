"""How a trained weight leaves and returns: names, the stream of tensors, files, and the check of what was written."""
