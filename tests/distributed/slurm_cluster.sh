#!/usr/bin/env bash
# A SLURM cluster of one node on the loopback, for tests: SLURM's own daemons, without systemd and without cgroups.
#
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#   tests/distributed/slurm_cluster.sh start FOLDER    and then: export SLURM_CONF=FOLDER/slurm.conf
#   sbatch --ntasks=4 --wrap 'exec tpctl batch prompts.jsonl -o rows/ --hosts slurm'
#   tests/distributed/slurm_cluster.sh stop FOLDER
#
# It needs root. Everything lies in FOLDER: keys, states, logs. The node says that it has 8 CPUs and 4 GPUs whatever the
# machine has (the GPUs are /dev/null by other names: SLURM deals them out, and nobody computes on them).
set -euo pipefail

command=${1:-}
folder=$(mkdir -p "${2:?a folder is wanted}" && cd "$2" && pwd)
host=$(hostname -s)

end() { # the daemon whose pid is in a file
    local pid
    [ -f "$1" ] && pid=$(cat "$1") && kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 10); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
}

free_ports() {
    python3 -c 'import socket
found = [socket.create_server(("", 0)) for _ in range(2)]
print(*[one.getsockname()[1] for one in found])'
}

start() {
    for program in munged slurmctld slurmd sinfo; do
        command -v $program >/dev/null || { echo "there is no $program here" >&2; exit 1; }
    done
    read -r control node < <(free_ports)
    mkdir -p "$folder"/{munge,state,spool}
    for gpu in 0 1 2 3; do
        [ -e "$folder/gpu$gpu" ] || mknod "$folder/gpu$gpu" c 1 3
    done
    head -c 128 /dev/urandom >"$folder/munge/key"
    chmod 700 "$folder/munge"
    chmod 400 "$folder/munge/key"
    cat >"$folder/slurm.conf" <<END
ClusterName=tpctl
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$control
SlurmdPort=$node
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
END
    echo "Name=gpu File=$folder/gpu[0-3]" >"$folder/gres.conf"
    export SLURM_CONF=$folder/slurm.conf
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" 2>/dev/null
    slurmctld -i
    slurmd
    for _ in $(seq 150); do
        if sinfo -h -o %t 2>/dev/null | grep -q idle; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    echo "the node does not come up; see $folder/slurmctld.log and $folder/slurmd.log" >&2
    stop
    exit 1
}

stop() {
    export SLURM_CONF=$folder/slurm.conf
    scancel --quiet --user="$(id -un)" 2>/dev/null || true
    end "$folder/slurmd.pid"
    end "$folder/slurmctld.pid"
    end "$folder/munge/pid"
}

case $command in
start | stop) $command ;;
*)
    echo "usage: $0 start|stop FOLDER" >&2
    exit 2
    ;;
esac
