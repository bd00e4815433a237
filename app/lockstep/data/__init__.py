"""Data sets, sharding and batch loaders. Code here knows a `shard_id` and `num_shards`, never a rank."""
