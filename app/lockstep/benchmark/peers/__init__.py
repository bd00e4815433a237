"""The same trainings, written as the users of other means write them: programs that are started beside Lockstep."""
