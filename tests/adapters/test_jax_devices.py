"""On several devices the steps are those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import TWO_EMITTERS

QUICK = "--xla_cpu_use_fusion_emitters=false" if TWO_EMITTERS else ""  # to compile


@pytest.mark.parametrize(("devices", "structure"), [(2, "eigen"), (4, "block-diagonal")])
def test_the_steps_on_several_devices_are_those_of_one(devices, structure):
    command = [sys.executable, str(Path(__file__).with_name("jax_devices.py")), structure]
    environment = os.environ | {
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ways = ["shard_map"]
    if structure == "block-diagonal":
        ways += ["jit", "inverses divided", "explicit"]
        ways += [f"explicit, {which} in parts" for which in ("a parameter", "all parameters")]
    ways += ["KFAC in shard_map", "KFAC in jit"]
    assert done.stdout.splitlines() == [f"{devices} {structure} {way}" for way in ways]
