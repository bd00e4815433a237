"""The same trainings, written with other frameworks, in the style of their users. Each is a program of its own."""
