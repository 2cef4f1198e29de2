"""How a rank multiplies by a weight, whatever it is stored as and wherever it lies."""
