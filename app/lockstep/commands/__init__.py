"""The commands: each parses its arguments, builds what it needs, and runs it."""
