"""From logits to tokens, and the next step's inputs, without the host."""
