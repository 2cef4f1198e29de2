"""From one folder to another: shard, reshard, merge."""
