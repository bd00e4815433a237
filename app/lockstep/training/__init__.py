"""The loop, the optimizer and what a run leaves behind."""
