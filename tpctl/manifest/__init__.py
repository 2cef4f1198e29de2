"""The shard folder's JSON."""
