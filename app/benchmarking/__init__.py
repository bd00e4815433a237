"""What `app/benchmark.py` measures with."""
