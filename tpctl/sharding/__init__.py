"""What the commands do with a partition plan: shard, merge, reshard, verify, inspect, plan. No torch."""
