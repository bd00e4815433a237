"""What `lockstep drill` and `lockstep verify --resume` are made of: real faults in real jobs, and their results."""
