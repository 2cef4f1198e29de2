"""tpctl: shard checkpoints and run tensor-parallel inference from the command line."""

__version__ = "0.1.0"
