"""`lockstep verify --resume` under its old name, for one more release."""

import sys

from lockstep.__main__ import old_program

if __name__ == "__main__":
    sys.argv.insert(1, "--resume")
    old_program("verify")
