"""Who we are and how we talk: ranks, collectives, failures."""
