"""SLURM submission: what is asked of the cluster, and mistakes told before anything is submitted."""

import pickle

import submitit_openclip
from submitit_openclip import TrainTask, main, parse, slurm_parameters


def test_published_config_asks_for_its_nodes_and_gpus():
    config, words, given = parse(["llip_b16_k32", "workers=4", "--partition", "gpu", "--time", "60", "--qos", "high"])
    assert words == ["llip_b16_k32", "workers=4"]
    assert slurm_parameters(config, given) == {
        "nodes": 16,
        "ntasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 6,
        "time": 60,
        "job_name": "llip_b16_k32",
        "partition": "gpu",
        "qos": "high",
    }


def test_cpu_runs_ask_for_no_gpu():
    config, _, given = parse(["llip_quickstart", "device=cpu", "ngpus=2", "--mem-gb", "8"])
    parameters = slurm_parameters(config, given)
    assert "gpus_per_node" not in parameters
    assert (parameters["ntasks_per_node"], parameters["mem"]) == (2, "8GB")


def test_dry_run_submits_nothing(capsys):
    assert main(["llip_quickstart", "--dry-run", "lr=1"]) == 0
    assert "python -m llip.main llip_quickstart lr=1" in capsys.readouterr().out


def test_mistakes(capsys, monkeypatch):
    assert main(["llip_quickstrat"]) == 2
    assert "llip_quickstart" in capsys.readouterr().err
    monkeypatch.setattr(submitit_openclip.shutil, "which", lambda name: None)
    assert main(["llip_quickstart"]) == 2
    assert "no sbatch" in capsys.readouterr().err


def test_the_task_survives_a_requeue():
    task = pickle.loads(pickle.dumps(TrainTask(["llip_quickstart"], "/tmp")))
    assert task.arguments == ["llip_quickstart"]
    again = task.checkpoint()
    assert again.function.arguments == ["llip_quickstart"]
