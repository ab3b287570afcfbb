"""The kernels compiled without a GPU: nothing spilled, shared memory within bounds, tensor cores used."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.kernels import SHARED_MEMORY

pytest.importorskip("triton", reason="triton comes with PyPI's CUDA build of torch")


@pytest.mark.slow
def test_smallest_and_largest_published_shape(tmp_path):
    """`python -m benchmarks.kernels` has the others."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.kernels", "llip_b16_k32", "llip_G14_k64", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(row["config"], row["kernel"], row["arch"]) for row in rows} == {
        (config, kernel, arch)
        for config in ("llip_b16_k32", "llip_G14_k64")
        for kernel in ("forward", "backward")
        for arch in (80, 90)
    }
    for row in rows:
        assert row["spilled_bytes"] == 0
        assert 0 < row["registers"] <= 255
        assert 0 < row["shared_bytes"] <= SHARED_MEMORY[row["arch"]]
        assert (row["wgmma"] > 0) == (row["arch"] == 90)
        assert (row["mma"] > 0) == (row["arch"] == 80)
