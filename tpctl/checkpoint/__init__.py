"""Bytes in and out: safetensors files, checkpoint folders, the Hub, GGUF. No torch."""
