"""`lockstep evaluate` under its old name, for one more release."""

from lockstep.__main__ import old_program

if __name__ == "__main__":
    old_program("evaluate")
