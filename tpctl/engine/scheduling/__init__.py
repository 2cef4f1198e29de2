"""What runs in a step: no torch, no clock."""
