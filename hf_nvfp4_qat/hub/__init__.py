"""How a packed checkpoint goes to the Hub: the model card and the commit."""
