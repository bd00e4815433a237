"""The command `lockstep COMMAND ...`; `python -m lockstep COMMAND ...` is the same."""

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "train": "train over every rank of the job, then merge the model on rank 0",
    "evaluate": "score the merged model of a run, alone or over ranks",
    "predict": "write the outputs of the merged model for inputs of your own, alone or over ranks",
    "merge": "merge a checkpoint into one file, offline",
    "export": "write the merged model as torch.export and ONNX",
    "verify": "check checkpoints and ledger; --resume: certify that a resumed run equals one without a stop",
    "report": "write one page about runs; --table: print a table of runs",
    "postmortem": "show what each rank of a run was doing at its last heartbeat",
    "doctor": "check this machine, or every node of a job, for what would break or slow down a training",
    "drill": "inject real faults into real jobs, and report the result of each",
    "benchmark": "measure speed, compared with its limits and with other frameworks",
}
USAGE = "usage: lockstep COMMAND ...\n\n" + "\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items())
PROGRAMS = str(Path(__file__).parents[1])
EXIT_USAGE = 2  # as ExitCode.SETTINGS; `lockstep --help` needs this file alone


def main(command: str | None = None) -> None:
    """Run `command`, or the one named by the first argument, with the remaining arguments."""
    put_programs_last()
    arguments = sys.argv[1:]
    if command is None:
        command, arguments = (arguments[0], arguments[1:]) if arguments else ("--help", [])
        if command in ("-h", "--help"):
            print(USAGE + "\n\nEach has its own --help.")
            return
        if command not in COMMANDS:
            print(f"lockstep: there is no command {command!r}\n{USAGE}", file=sys.stderr)
            sys.exit(EXIT_USAGE)
        sys.argv[:] = [f"lockstep {command}", *arguments]
    import_module(f"lockstep.commands.{command}").main()


def old_program(command: str) -> None:
    """Run `command` for `python app/COMMAND.py`, and print the new command to use instead."""
    from lockstep.runtime.launcher import this_process_reports

    if this_process_reports():
        old = Path(sys.argv[0]).name
        print(f"lockstep: python app/{old} is now `lockstep {command}`; the old one will be removed", file=sys.stderr)
    main(command)


def put_programs_last() -> None:
    """Remove the program's folder (with `-m`, the working folder) from the front of `sys.path`, and append app/.

    So no file there hides a module of the standard library or of an installed package, and the programs in app/
    (train, report, ...) hide none of the user's own modules, which come before them (runtime/importing.py).
    """
    if not sys.flags.safe_path:
        sys.path.pop(0)
    if PROGRAMS not in sys.path:
        sys.path.append(PROGRAMS)


if __name__ == "__main__":
    main()
