"""How vLLM gets the weights: a stream of packed tensors into a running engine, and proof of what arrived."""
