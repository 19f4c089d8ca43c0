"""How a trained weight leaves and returns: the stream of tensors, saving, loading, and checkpoint to checkpoint."""
