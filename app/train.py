"""Trains synchronously over every rank of the job, then merges the model on rank 0.

    env/run python app/train.py                                   one rank
    env/run horovodrun -np 4 python app/train.py                  four ranks on this machine
    env/run mpirun -np 4 python app/train.py --config reference   the reference run (docs/reference.md)
    env/run mpirun -np 4 python app/train.py --resume             resume runs/latest, as if it had never stopped
    env/run python app/train.py --help                            every setting

    env/run horovodrun -np 3 --min-np 2 --max-np 3 --host-discovery-script ./hosts.sh python app/train.py
        elastic: continues without lost workers, and takes in new ones

After `source env/activate`, env/run can be left out. `lockstep train` is the same program.
"""

from lockstep.__main__ import main

if __name__ == "__main__":
    main("train")
