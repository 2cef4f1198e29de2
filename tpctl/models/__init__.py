"""Model families: their configs and weights as data (no torch), and the one decoder built from that data."""
