"""The layers of a tensor-parallel decoder, one idea a file."""
