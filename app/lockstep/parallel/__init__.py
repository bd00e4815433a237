"""Where the model lives on the ranks, and how its parts are merged into one."""
