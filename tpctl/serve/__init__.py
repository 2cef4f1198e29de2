"""A server with OpenAI's interface over engines of one model; no torch."""
