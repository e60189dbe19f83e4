"""Steps of four processes are those of one: a fraction between the placements, HSDP and FSDP2."""

import pytest
from test_distributed_steps import check, of, references, run
from together import spawned

__all__ = ["references"]  # a fixture


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("of4"), 4, run)


@of(4)
def test_four_processes_give_what_one_gives(processes, references, case, dtype):
    check(processes, references, case, dtype)
