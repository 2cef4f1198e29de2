"""Triton kernels of the CUDA path, each with a plain-torch reference beside it.

Importing this package imports nothing. Importing one of its modules requires triton, so only the CUDA path does.
Shape suffixes: T tokens, S sequences, N query heads, K key/value heads, D head_dim, B block_size, H hidden size.

Every launcher can be captured in a CUDA graph: no host synchronisation, and a grid that depends on shapes alone.
`pdl=True` launches with programmatic dependent launch: the kernel may start while its predecessor on the stream still
runs, fetches what no kernel writes (weights), and then waits for the predecessor's end. Weights must therefore have
been written before the predecessor started.
"""
