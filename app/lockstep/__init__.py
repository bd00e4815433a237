"""Lockstep: trains deep-learning agents synchronously over every rank of an MPI job, and proves that it did so."""

__version__ = "0.1.0"
