"""Communication between ranks: collectives, messages, backends, stop votes, the watchdog, elastic jobs."""
