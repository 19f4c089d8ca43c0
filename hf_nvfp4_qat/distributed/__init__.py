"""How a weight crosses processes."""
