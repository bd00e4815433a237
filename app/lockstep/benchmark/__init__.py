"""The benchmarks of `lockstep benchmark`."""
