#!/usr/bin/env bash
# A real Slurm of two nodes, n1 and n2, and a login node, inside namespaces of its own: tests/slurm_cluster.py starts it.
#   unshare --net --uts --mount --pid --fork --kill-child --mount-proc tests/slurm_cluster.sh SHARED_FOLDER...
# It prints `ready` and stays until its standard input ends. It is then gone without a trace: every process lives in its
# process namespace, and every file that it makes on a tmpfs of its mount namespace. Nothing can be reached from outside.
# Each node is a network, a host name, and a /tmp and /dev/shm of its own; of /tmp they share only the SHARED_FOLDERs. Each
# has half of the cores: ranks of two nodes that share one, and wait by sched_yield, can starve each other for minutes
# (Linux 6.18 divides a core between sessions first).
set -euo pipefail
nodes='1 2' net=10.231.7

hostname login
ip link set lo up
mount -t tmpfs tmpfs /etc/slurm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/{munge,netns,sshd,log,state,spool/n1,spool/n2,config}
cd /run/config

# A /tmp and /dev/shm that only the calling node sees. What is shared and lies below /tmp is put back.
private_folders() {
    mount --rbind /tmp /mnt
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    local folder
    for folder; do
        [[ $folder != /tmp/* ]] || { mkdir -p "$folder"; mount --rbind "/mnt/${folder#/tmp/}" "$folder"; }
    done
    umount --lazy /mnt
}

# The CPUs of node $1.
cpus_of() {
    local range all=()
    for range in $(taskset --cpu-list --pid $$ | sed 's/.*: //; s/,/ /g'); do
        mapfile -t -O ${#all[@]} all < <(seq "${range%-*}" "${range#*-}")
    done
    local num=${#all[@]}
    local of_node=("${all[@]:num * ($1 - 1) / 2:num / 2}")
    [[ $num -gt 1 ]] || of_node=("${all[@]}")
    (IFS=,; echo "${of_node[*]}")
}

# Run a command as node $1.
on_node() {
    taskset --cpu-list "$(cpus_of "$1")" nsenter --net="/run/netns/n$1" unshare --uts --mount --propagation private \
        bash -euo pipefail -c 'hostname "n$1"; private_folders "${@:3}"; exec $2' - "$1" "$2" "${shared[@]}"
}
export -f private_folders
shared=("$@")

{ echo "127.0.0.1 localhost"; echo "$net.254 login"; for i in $nodes; do echo "$net.$i n$i"; done; } >hosts
mount --bind hosts /etc/hosts
ssh-keygen -q -t ed25519 -N '' -f key
cp key.pub authorized_keys
cat >ssh_config <<END
Host n*
  IdentityFile $PWD/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
END
mount --bind ssh_config /etc/ssh/ssh_config
cat >sshd_config <<END
HostKey $PWD/key
AuthorizedKeysFile $PWD/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
MaxStartups 100
END
cat >/etc/slurm/slurm.conf <<END
ClusterName=tests
SlurmctldHost=login
SlurmUser=root
# cred_expire: so many seconds, by default 120, a requeued job waits for the nodes to clean up.
AuthInfo=socket=/run/munge/socket,cred_expire=10
StateSaveLocation=/run/state
SlurmdSpoolDir=/run/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile=/run/log/slurmctld.log
SlurmdLogFile=/run/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=3600
GresTypes=gpu
NodeName=n[1-2] CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=24:00:00
END
printf 'Name=gpu File=/dev/%s\n' null zero >/etc/slurm/gres.conf # in place of GPUs, to be counted
echo CgroupPlugin=cgroup/v1 >/etc/slurm/cgroup.conf # slurmd looks for cgroups even where it is to use none

dd if=/dev/urandom of=munge.key bs=128 count=1 status=none
chmod 600 munge.key
munged --key-file="$PWD/munge.key" --socket=/run/munge/socket --pid-file=/run/munge/pid \
    --log-file=/run/log/munged.log --seed-file=/run/munge/seed

ip link add bridge type bridge
ip addr add "$net.254/24" dev bridge
ip link set bridge up
for i in $nodes; do
    ip netns add "n$i"
    ip link add "to-n$i" type veth peer name eth0 netns "n$i"
    ip link set "to-n$i" master bridge up
    ip -n "n$i" addr add "$net.$i/24" dev eth0
    ip -n "n$i" link set lo up
    ip -n "n$i" link set eth0 up
done

slurmctld
for i in $nodes; do
    # Not `ip netns exec`, which remounts /sys without the cgroups that slurmd looks for.
    on_node "$i" "slurmd -N n$i"
    on_node "$i" "/usr/sbin/sshd -f $PWD/sshd_config -E /run/log/sshd.n$i.log"
done
private_folders "${shared[@]}"

for _ in {1..200}; do
    if [[ $(sinfo --noheader --format='%T %D' 2>&1) == 'idle 2' ]]; then
        echo ready
        cat >/dev/null
        exit
    fi
    sleep 0.1
done
echo 'the nodes did not become idle:'
sinfo || true
tail -n 15 /run/log/*.log
exit 1
