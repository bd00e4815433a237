"""What lockstep report puts on its page."""
