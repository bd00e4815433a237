"""`lockstep train`: train one run, from its settings to its merged model."""

from lockstep.comm.program import run_program
from lockstep.training.run import run


def main() -> None:
    run_program(run)
