"""Mixtures of experts: routing, experts of few rows, and grouped GEMMs of any number of rows."""
