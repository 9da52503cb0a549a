"""A Slurm of two nodes, the hosts ``head`` and ``worker``."""

import os
import shutil
import time

from tests.cluster.hosts import address
from tests.programs import wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# Two partitions on the same nodes: jobs of the second one take the nodes from those of the first, which get the signal that they
# asked for and some time, and are queued again. A job that is queued again waits for cred_expire seconds.
CONF = """
ClusterName=rotssl
SlurmctldHost=head({head})
AuthType=auth/munge
AuthInfo=socket=/dev/shm/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile=/dev/shm/slurmctld.pid
SlurmdPidFile=/dev/shm/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=head NodeAddr={head} CPUs=8 RealMemory=4000 Gres=gpu:2
NodeName=worker NodeAddr={worker} CPUs=8 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=head,worker Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=head,worker State=UP PriorityTier=2
"""


def missing():
    """Why there can be no Slurm here; empty if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else ""


class Slurm:
    """The daemons, from entering the body to its end.

    Args:
        hosts: ``Hosts``, which are up.
    """

    def __init__(self, hosts):
        self.hosts, self.folder, self.daemons = hosts, hosts.folder / "slurm", []
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self):
        for name in ("state", "spool.head", "spool.worker"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(64))
        conf = CONF.format(folder=self.folder, head=address("head"), worker=address("worker"))
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # to be counted
        files = [f"--{name}-file=/dev/shm/munge.{name}" for name in ("pid", "log", "seed")]
        munge = ["munged", "--force", "--foreground", f"--key-file={key}", "--socket=/dev/shm/munge.socket", *files]
        for host in ("head", "worker"):
            daemon = self._start(host, munge)
            wait_for(lambda host=host: self._on(host, "munge", "--no-input", check=False).returncode == 0, daemon)
        control = self._start("head", ["slurmctld", "-D"])
        for host in ("head", "worker"):
            self._start(host, ["slurmd", "-D", "-N", host])
        wait_for(
            lambda: self("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D", check=False).strip() == "2", control
        )
        return self

    def __exit__(self, *_):
        for daemon in reversed(self.daemons):
            daemon.end()

    def _start(self, host, command):
        self.daemons.append(self.hosts.start(host, command[0], command, self.env))
        return self.daemons[-1]

    def _on(self, host, *command, check=True, **more):
        # munge's own variables are none; its socket is an option of each of its clients.
        where = ["--socket=/dev/shm/munge.socket"] if command[0] == "munge" else []
        return self.hosts.run(host, [*command, *where], self.env, check=check, **more)

    def __call__(self, *command, check=True, env=None, cwd=None):
        """Run a command of Slurm on the head; returns its output."""
        more = {"cwd": cwd} if cwd else {}
        return self.hosts.run("head", command, self.env | (env or {}), check=check, **more).stdout

    def submit(self, *arguments, env=None, cwd=None):
        """Submit a job with sbatch; returns its id."""
        return self("sbatch", "--parsable", *arguments, env=env, cwd=cwd).strip()

    def facts(self, job):
        """What Slurm knows of a job: its ``JobState``, ``Restarts``, ``Reason``, ``ExitCode``, ..."""
        line = self("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait(self, job, condition):
        """The facts of a job, once they meet a condition; ends with the test's timeout."""
        while not condition(facts := self.facts(job)):
            time.sleep(1)  # each look is a process on the host whose cores the job needs
        return facts

    def ended(self, job):
        """The state of a job at its end: COMPLETED, FAILED, CANCELLED, ..."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return self.wait(job, lambda facts: facts["JobState"] in over)["JobState"]
