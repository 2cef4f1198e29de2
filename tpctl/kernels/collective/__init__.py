"""Sums over ranks through peer memory."""
