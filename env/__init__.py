"""Makes the environment that Lockstep runs in. Standard library only: nothing is installed yet when this runs.

`run`, `setup` and `activate` are what people call. Behind them:

- `build`: the steps, in order, from an empty folder to an environment that is proven to work
- `toolchain`: what this machine has (compiler, MPI, CMake, CUDA, NCCL)
- `lockfile`: reads `requirements.lock`
- `wheels`: builds mpi4py and Horovod from their sources, and keeps the wheels in a cache
- `horovod_patches`: every change we make to Horovod 0.28.1, and why
- `steps`: progress lines, logs, and what to say when a step fails
"""
