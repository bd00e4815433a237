"""Build the environment of Lockstep. Standard library only, since nothing else is installed yet when this runs.

Users call `run`, `setup` and `activate`. The modules behind them:

- `build`: all steps, in order, from an empty folder to a tested environment
- `environment`: the virtual environment and its packages
- `toolchain`: finds compiler, MPI, CMake, CUDA and NCCL of this machine
- `lockfile`: reads `requirements.lock`
- `wheels`: builds mpi4py and Horovod from source, and caches the wheels
- `horovod_patches`, `horovod_listeners`, `horovod_secrets`: all changes to Horovod 0.28.1, with their reasons
- `prove`: the final test of an environment
- `steps`: progress lines, logs, and messages for failed steps
"""
