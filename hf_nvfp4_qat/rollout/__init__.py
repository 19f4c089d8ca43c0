"""How an engine gets the weights: a stream of packed tensors into it while it runs, and proof of what arrived."""
