"""Faults that are really injected into a real job, and what must come of each: for lockstep drill."""
