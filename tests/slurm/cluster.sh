#!/usr/bin/env bash
# A real Slurm of one node on this machine, for tests: cluster.sh start FOLDER | stop FOLDER.   Needs root and Debian.
#
# FOLDER/slurm.conf is its configuration ($SLURM_CONF for its commands); state and logs lie beside it. Ports are of the
# loopback interface. The node says that it has four processors, so that jobs run beside each other on any machine.
set -euo pipefail
folder="$2"
stop() {
  for daemon in slurmd slurmctld munged; do
    if [ -s "$folder/$daemon.pid" ]; then kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true; fi
  done
}
if [ "$1" = stop ]; then stop; exit; fi

if ! command -v slurmctld slurmd munged sbatch >/dev/null; then
  echo "installing Debian's slurmctld, slurmd, slurm-client and munge" >&2
  apt-get update -qq
  # their start-up scripts want systemd: nothing is started here
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
  rm -f /usr/sbin/policy-rc.d
fi

mkdir -p "$folder" && cd "$folder" && folder="$PWD"
mkdir -p state spool munge
[ -s munge.key ] || dd if=/dev/urandom of=munge.key bs=1 count=1024 status=none
chown -R munge munge munge.key && chmod 400 munge.key && chmod 711 munge
host="$(hostname -s)"
cat >slurm.conf <<CONF
ClusterName=lors
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=30
JobRequeue=1
AccountingStorageType=accounting_storage/none
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,requeue_delay=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$folder/slurm.conf"
setpriv --reuid=munge --regid=munge --clear-groups munged --force --socket="$folder/munge/socket" \
  --key-file="$folder/munge.key" --log-file="$folder/munge/log" --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed"
ln -sf munge/pid munged.pid
slurmctld
slurmd
for _ in $(seq 60); do
  if sinfo --noheader --format %t 2>/dev/null | grep -qx idle; then exit 0; fi
  sleep 1
done
echo "the node did not come up; logs are in $folder" >&2
stop
exit 1
