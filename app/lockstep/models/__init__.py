"""Networks. A model knows nothing of ranks or of how it is divided."""
