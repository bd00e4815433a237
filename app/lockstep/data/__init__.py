"""Data sets, their division over the ranks, and batches with a position. Knows `shard_id`, never a rank."""
