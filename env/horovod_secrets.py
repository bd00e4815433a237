"""Changes to Horovod that protect the secret and the environment of a job from other users of the machine.

Every user can read command lines in /proc and connect to any port. So a worker gets its environment as environment
variables, or over ssh on standard input from a pipe, never by a file or a command line. All listening servers ask for
the secret of the job, which is in that environment: env/horovod_listeners.py.
"""

from __future__ import annotations

JOB_SECRET = "HOROVOD_JOB_SECRET"

Change = tuple[str, str, str, str]  # file, old text, new text, why

_COMMAND_LINES = "environments and keys were on command lines, which every user can read in /proc"
_ASK = "the key-value server had no authentication, and served files of its working folder to everyone"

_SECRET = "horovod/runner/common/util/secret.py"
_EXECUTE = "horovod/runner/common/util/safe_shell_exec.py"
_GLOO_RUN = "horovod/runner/gloo_run.py"
_LAUNCH = "horovod/runner/launch.py"
_PROBE = "horovod/runner/driver/driver_service.py"
_TASK = "horovod/runner/task_fn.py"
_REMOTE = "horovod/runner/util/remote.py"

_READ_ENVIRONMENT = """
_NOT_OF_ANOTHER_HOST = {'BASHOPTS', 'BASH_VERSINFO', 'EUID', 'PPID', 'SHELLOPTS', 'UID'}


def command_with_environment(command):
    \"\"\"A line for ssh, in which `command` gets the environment that `environment_as_stdin` makes.\"\"\"
    script = ('while IFS= read -r -d "" variable; do export "$variable"; done; '
              ': "${HOROVOD_RANK:?no environment came over standard input}"; '
              + f'cd {quote(os.getcwd())} > /dev/null 2>&1; exec {command}')
    return quote('exec bash -c ' + quote(script))


def environment_as_stdin(env):
    return b''.join(os.fsencode(f'{name}={value}') + b'\\0' for name, value in env.items()
                    if env_util.is_exportable(name) and name.isascii() and name.isidentifier()
                    and name not in _NOT_OF_ANOTHER_HOST)


"""


def secrets() -> list[Change]:
    """Return the changes, in the order of application."""
    return [
        # -- the secret
        (
            _SECRET,
            "def make_secret_key():\n",
            f"JOB_SECRET = '{JOB_SECRET}'\n\n\n"
            "def make_job_secret():\n"
            '    """For whatever this process starts from now on, by its environment."""\n'
            "    os.environ[JOB_SECRET] = os.urandom(SECRET_LENGTH).hex()\n\n\n"
            "def authorization():\n"
            "    return 'Bearer ' + os.environ[JOB_SECRET]\n\n\n"
            "def is_job_secret(given):\n"
            '    """False for all if there is no secret."""\n'
            "    return JOB_SECRET in os.environ and hmac.compare_digest(given.encode(), authorization().encode())\n"
            "\n\n"
            "def make_secret_key():\n",
            _ASK,
        ),
        (_LAUNCH, "def _run(args):\n", "def _run(args):\n    secret.make_job_secret()\n", _ASK),
        # -- command lines
        (
            _EXECUTE,
            "def _exec_middleman(command, env, exit_event, stdout, stderr, rw):\n",
            "def _exec_middleman(command, env, exit_event, stdout, stderr, rw, stdin=None):\n",
            _COMMAND_LINES,
        ),
        (
            _EXECUTE,
            "                                      stdout=stdout_w, stderr=stderr_w)\n",
            "                                      stdout=stdout_w, stderr=stderr_w,\n"
            "                                      stdin=None if stdin is None else subprocess.PIPE)\n"
            "    if stdin is not None:\n"
            "        in_thread(executor_shell.communicate, (stdin,), silent=True)\n",
            _COMMAND_LINES,
        ),
        (
            _EXECUTE,
            '            prefix_output_with_timestamp=False):\n    """\n',
            '            prefix_output_with_timestamp=False, stdin=None):\n    """\n',
            _COMMAND_LINES,
        ),
        (
            _EXECUTE,
            "                                                          (r, w)))\n",
            "                                                          (r, w), stdin))\n",
            _COMMAND_LINES,
        ),
        (
            _REMOTE,
            "from horovod.runner.common.util import env as env_util\n",
            "import os\nfrom shlex import quote\n\nfrom horovod.runner.common.util import env as env_util\n"
            + _READ_ENVIRONMENT,
            _COMMAND_LINES,
        ),
        (
            _GLOO_RUN,
            "from horovod.runner.util.remote import get_remote_command\n",
            "from horovod.runner.util.remote import command_with_environment, environment_as_stdin, "
            "get_remote_command\n",
            _COMMAND_LINES,
        ),
        (
            _GLOO_RUN,
            """        env_vars = create_slot_env_vars(slot_info)
        horovod_rendez_env = " ".join(
            [f"{k}={str(v)}" for k, v in env_vars.items()])

        return '{shell} {horovod_env} {env} {run_command}' .format(
            shell='env',
            horovod_env=horovod_rendez_env,
            env=' '.join(['%s=%s' % (key, quote(value)) for key, value in env.items()
                          if env_util.is_exportable(key)]),
            run_command=run_command)
""",
            "        command, run_env = run_command\n"
            "        return command, {**env, **run_env, **create_slot_env_vars(slot_info)}\n",
            _COMMAND_LINES,
        ),
        (
            _GLOO_RUN,
            """            local_command = quote('cd {pwd} > /dev/null 2>&1 ; {command}'
                                  .format(pwd=os.getcwd(), command=command))
            command = get_remote_command(local_command,
""",
            "            stdin, env = environment_as_stdin(env), None\n"
            "            command = get_remote_command(command_with_environment(command),\n",
            _COMMAND_LINES,
        ),
        (
            _GLOO_RUN,
            "        index = slot_info.rank\n",
            "        (command, env), stdin = command, None\n        index = slot_info.rank\n",
            _COMMAND_LINES,
        ),
        (
            _GLOO_RUN,
            "                                                index=index,\n",
            "                                                env=env,\n"
            "                                                stdin=stdin,\n"
            "                                                index=index,\n",
            _COMMAND_LINES,
        ),
        (
            _GLOO_RUN,
            """    env_string = " ".join(
        [f"{k}={str(v)}" for k, v in env_vars.items()])
    run_command = (
        '{env_string} '
        '{command}'  # expect a lot of environment variables
        .format(env_string=env_string,
                command=' '.join(quote(par) for par in command)))
    return run_command
""",
            "    return ' '.join(quote(par) for par in command), {k: str(v) for k, v in env_vars.items()}\n",
            _COMMAND_LINES,
        ),
        (
            _PROBE,
            "    def _exec_command(command):\n",
            "    settings_as_stdin = codec.dumps_base64(settings, to_ascii=False)\n\n    def _exec_command(command):\n",
            _COMMAND_LINES,
        ),
        (
            _PROBE,
            "            exit_code = safe_shell_exec.execute(command,\n",
            "            exit_code = safe_shell_exec.execute(command,\n"
            "                                                stdin=settings_as_stdin,\n",
            _COMMAND_LINES,
        ),
        (
            _PROBE,
            "            '{driver_addresses} {settings}' \\\n",
            "            '{driver_addresses}' \\\n",
            _COMMAND_LINES,
        ),
        (
            _PROBE,
            "codec.dumps_base64(driver_addresses),\n                    settings=codec.dumps_base64(settings))\n",
            "codec.dumps_base64(driver_addresses))\n",
            _COMMAND_LINES,
        ),
        (_TASK, "len(sys.argv) != 5", "len(sys.argv) != 4", _COMMAND_LINES),
        (_TASK, "<driver_addresses> <settings>'", "<driver_addresses>, settings on standard input'", _COMMAND_LINES),
        (_TASK, "codec.loads_base64(sys.argv[4])", "codec.loads_base64(sys.stdin.read())", _COMMAND_LINES),
    ]
