#!/usr/bin/env bash
# A Slurm cluster of one node for the tests, next to whatever else this machine does: configuration, munge key and
# socket, ports, state and logs of its own, all below one work folder, and only the loopback address.
#
#   tests/slurm/one_node.sh up WORK [--yes]    install what is missing (Debian, root), start, wait until the node is idle
#   tests/slurm/one_node.sh down WORK          end every process that `up` and the jobs started
#   tests/slurm/one_node.sh status WORK        nodes and jobs
#
# Starts nothing without CI=true or --yes, nor where a slurm.conf exists. Slurm's commands, and ours, need the variables
# that `up` prints: export SLURM_CONF=WORK/etc/slurm.conf
# Exit code 3: this machine cannot have it, with the reason in one line.
set -euo pipefail

readonly ACTION="${1:-}" WORK="$(realpath -m "${2:-}")"
readonly CONF="$WORK/etc/slurm.conf" NODE="$(hostname -s)"
readonly CPUS=16       # advertised, so that a job of two tasks and its evaluation fit a small machine
readonly PATIENCE=30   # seconds that a daemon may take to start or to end

cannot() { echo "no Slurm here: $*" >&2; exit 3; }

check_allowed() {
  [[ "${CI:-}" == true || "${3:-}" == --yes ]] || cannot "it is started with CI=true or --yes only"
  [[ $(id -u) == 0 ]] || cannot "starting it needs root"
  [[ -z "${SLURM_CONF:-}" || "$SLURM_CONF" == "$CONF" ]] || cannot "SLURM_CONF is $SLURM_CONF: a cluster is set up already"
  for conf in /etc/slurm/slurm.conf /etc/slurm-llnl/slurm.conf /usr/local/etc/slurm.conf; do
    [[ ! -e $conf ]] || cannot "$conf is there: a cluster is set up already"
  done
}

install_slurm() {
  local program missing=()
  for program in slurmctld slurmd sbatch srun scontrol munged; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || cannot "${missing[*]} missing, and no apt-get to install slurm-wlm with"
  echo "installing slurm-wlm and munge" >&2
  # invoke-rc.d must not start the services of the packages: ours are started below
  local policy=/usr/sbin/policy-rc.d added=
  [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod 755 "$policy"; added=1; }
  { timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 \
      apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$WORK/log/apt.log" 2>&1 || {
    [[ -z $added ]] || rm -f "$policy"
    cannot "apt-get could not install slurm-wlm and munge: $(tail -n 1 "$WORK/log/apt.log")"
  }
  [[ -z $added ]] || rm -f "$policy"
}

free_ports() {
  python3 - "$1" <<'PY'
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))
PY
}

write_configuration() {
  local ports memory
  read -r -a ports <<<"$(free_ports 2)"
  memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.8)}' /proc/meminfo)
  # cred_expire: how long a requeued job waits before it may start again (120 s by default, 5 at least)
  cat >"$CONF" <<C
ClusterName=llip_tests
SlurmctldHost=$NODE(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$WORK/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd.pid
SlurmctldLogFile=$WORK/log/slurmctld.log
SlurmdLogFile=$WORK/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$NODE Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$NODE MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
C
}

runs() { grep -q '^State:\s*[^ZX[:space:]]' "/proc/$1/status" 2>/dev/null; } # PID: is it there, and not a zombie?
alive() { [[ -s $1 ]] && runs "$(<"$1")"; }                       # FILE with a pid
gone() { ! runs "$1"; }

wait_for() { # DESCRIPTION COMMAND...
  local what=$1 end=$((SECONDS + PATIENCE))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}

node_is_idle() { [[ $(sinfo --noheader --format %t --nodes "$NODE" | sort -u) == idle ]]; }

up() {
  check_allowed "$@"
  mkdir -p "$WORK"/{etc,munge,state,spool,log}
  chmod 700 "$WORK/munge" "$WORK/state"
  install_slurm
  alive "$WORK/slurmctld.pid" && cannot "one is running in $WORK already"
  export SLURM_CONF="$CONF"
  [[ -s $WORK/munge/key ]] || { head -c 128 /dev/urandom >"$WORK/munge/key"; chmod 400 "$WORK/munge/key"; }
  write_configuration
  # --force: the socket may lie in a folder that other users cannot enter; there are none here
  munged --force --key-file="$WORK/munge/key" --socket="$WORK/munge/socket" --pid-file="$WORK/munge/pid" \
    --log-file="$WORK/munge/log" --seed-file="$WORK/munge/seed" >"$WORK/log/start.log" 2>&1 &&
    slurmctld >>"$WORK/log/start.log" 2>&1 && slurmd >>"$WORK/log/start.log" 2>&1 ||
    { down; cannot "a daemon does not start: $(tail -n 1 "$WORK/log/start.log")"; }
  if ! wait_for "the node" node_is_idle; then
    tail -n 5 "$WORK"/log/*.log >&2
    down
    cannot "the node did not become idle within $PATIENCE s"
  fi
  echo "export SLURM_CONF=$CONF"
}

down() {
  export SLURM_CONF="$CONF"
  if alive "$WORK/slurmctld.pid"; then
    timeout 10 scancel --quiet --state=PENDING --user=root 2>/dev/null || true
    timeout 10 scancel --quiet --full --signal=KILL --user=root 2>/dev/null || true
    wait_for "jobs" bash -c '[[ -z $(timeout 5 squeue --noheader) ]]' || echo "jobs are still listed" >&2
  fi
  local pid file
  for file in "$WORK"/slurmd.pid "$WORK"/slurmctld.pid "$WORK"/munge/pid; do
    alive "$file" || continue
    pid=$(<"$file")
    kill "$pid"
    wait_for "$pid" gone "$pid" || kill -9 "$pid"
  done
  # steps outlive their daemon; ours are those that read this configuration
  for file in /proc/[0-9]*; do
    [[ "$(cat "$file/comm" 2>/dev/null)" == slurmstepd ]] || continue
    if { cat "$file/environ" 2>/dev/null || true; } | tr '\0' '\n' | grep -qx "SLURM_CONF=$CONF"; then
      kill -9 "${file#/proc/}" 2>/dev/null || true
    fi
  done
}

case $ACTION in
up | down | status) [[ -n ${2:-} ]] || { echo "usage: $0 $ACTION WORK" >&2; exit 2; } ;;&
up) up "$@" ;;
down) down ;;
status) SLURM_CONF="$CONF" sinfo; SLURM_CONF="$CONF" squeue ;;
*) echo "usage: $0 up|down|status WORK [--yes]" >&2; exit 2 ;;
esac
