"""Linears of a checkpoint in fewer bits, as compressed-tensors stores them: numpy and bytes, no torch."""
