"""Who we are and how we talk: the ranks, their collectives and messages, stops, the watchdog."""
