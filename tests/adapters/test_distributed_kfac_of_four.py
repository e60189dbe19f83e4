"""Algorithm 2 in four processes is Algorithm 2 in one."""

import pytest
from test_distributed_kfac import check_resumed, check_steps, options, run
from together import spawned


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("of4"), 4, run)


@pytest.mark.parametrize("name", options(4))
def test_four_processes_take_the_step_of_one(processes, name):
    check_steps(processes, name)


def test_one_process_goes_on_from_a_state_of_four(processes):
    check_resumed(processes)
