"""What the page and the table of `lockstep report` are made of."""
