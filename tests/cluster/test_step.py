"""A program for one process does its work in all tasks of a step."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

TASK = textwrap.dedent("""
    import datetime, os, sys
    import torch.distributed as dist
    from llip.cluster import step
    from llip.errors import UserError

    def work(folder, text):
        rank = dist.get_rank()
        together = [None] * dist.get_world_size()
        dist.all_gather_object(together, rank)
        if text == "mistake":
            raise UserError("all of us")
        open(f"{folder}/{text}_{rank}", "w").write(repr(together))

    def program():
        assert step.is_leading()
        if case == "early":
            raise UserError("before any work")
        step.everywhere(work, folder, "first")
        step.everywhere(work, folder, "mistake" if case == "together" else "second")
        return 5

    folder, case = sys.argv[1:]
    if __name__ == "__main__":
        assert not step.is_leading()
        try:
            code = step.lead_or_follow(program, "cpu", datetime.timedelta(seconds=60))
        except UserError as error:
            print(error)
            code = 2
        sys.exit(code)
""")


def run_step(folder: Path, case: str, count: int = 3) -> list[tuple[int, str]]:
    """Run the program in `count` tasks; returns (exit code, what was printed) of each."""
    (folder / "task.py").write_text(TASK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"WORLD_SIZE": str(count), "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    tasks = [
        subprocess.Popen(
            [sys.executable, folder / "task.py", folder, case],
            env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        told = [task.communicate(timeout=90)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, text.strip()) for task, text in zip(tasks, told, strict=True)]


def test_the_work_is_done_in_all_tasks_and_the_first_gives_the_code(tmp_path: Path):
    assert run_step(tmp_path, "good") == [(5, ""), (0, ""), (0, "")]
    done = {path.name for path in tmp_path.glob("*_?")}
    assert done == {f"{work}_{rank}" for work in ("first", "second") for rank in range(3)}
    assert (tmp_path / "second_2").read_text() == "[0, 1, 2]"


def test_a_mistake_before_the_work_lets_the_others_go(tmp_path: Path):
    assert run_step(tmp_path, "early", 2) == [(2, "before any work"), (0, "")]


def test_a_mistake_that_all_make_is_told_by_all(tmp_path: Path):
    assert run_step(tmp_path, "together", 2) == [(2, "all of us")] * 2
