"""For all tests."""

import os

os.environ.pop("LOCKSTEP_PREFIX", None)  # hints of programs do not depend on how pytest was started
