"""Where the tasks of a job meet."""

import os
from unittest import mock

from llip.training.distributed.slurm_environment import join_step, rendezvous_port

STEP = {"SLURM_JOB_ID": "123", "SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}


def test_each_attempt_of_each_neighbouring_job_has_a_port_of_its_own():
    ports = [
        rendezvous_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(attempt)})
        for job in range(9_999_900, 10_000_000)
        for attempt in range(10)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 1024
    assert max(ports) < 32_768  # Linux hands out those from there on


def test_a_first_attempt_has_no_count():
    first = rendezvous_port({"SLURM_JOB_ID": "7"})
    assert first == rendezvous_port({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"})
    assert first != rendezvous_port({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})


def test_tasks_on_several_nodes_meet_at_the_first_host():
    with mock.patch.dict(os.environ, STEP | {"SLURM_JOB_NUM_NODES": "2"}):
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        join_step("node7")
        found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert found == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "node7"}


def test_tasks_on_one_node_need_no_names():
    with mock.patch.dict(os.environ, STEP | {"SLURM_JOB_NUM_NODES": "1"}):
        join_step("a-name-that-does-not-resolve")
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"
