"""What is learned: a task builds the model, yields work, gives the loss and evaluates."""
