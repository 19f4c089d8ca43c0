"""How a weight is cut across processes."""
