"""What `lockstep benchmark` measures with."""
