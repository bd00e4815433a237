"""Tasks: what is learned. A task builds model and loader, computes the loss and evaluates."""
