"""What is free, on hosts and GPUs."""
