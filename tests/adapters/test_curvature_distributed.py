"""`fit_curvature` in several processes, each with its share of the data, gives what one process gives on all of it."""

import pytest
import torch
from curvature_cases import MODELS, Case, N
from together import spawned
from torch import distributed, nn

from kfaclinalg_torch import fit_curvature

pytestmark = pytest.mark.filterwarnings("ignore:fit_curvature takes the diagonal")
WORLD, SHARES = 2, (13, 7)  # examples of each process, in batches of 5: three of them and two, the last ones smaller
FITS = [
    (name, structure, estimator)
    for name in MODELS
    for structure in ("block-diagonal", "eigen")
    for estimator in ("exact", "empirical")
]


def fitted(name, structure, estimator, rank=None):
    """F of each layer and the number of examples, of all of the data or of a process's share."""
    case = Case(name)
    if rank is not None:
        case.x, case.y = (t.split(SHARES)[rank] for t in (case.x, case.y))
    curvature = case.fit(size=5, structure=structure, estimator=estimator)
    return {"F": [P.to_dense() for P in curvature.operator.blocks], "examples": curvature.examples}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Branch(nn.Module):
    """A layer that is none, which one process alone sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.odd, self.last = nn.Linear(4, 5), Doubled(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.one(x).tanh()
        return self.last(self.odd(h).tanh() if x[0, 0] > 9 else h)


def branched(rank=None):
    """A and G of each layer, of all of the data or of a process's share."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 4, generator=generator).double(), torch.randint(3, (N,), generator=generator)
    x[0, 0] = 10
    x, y = (t if rank is None else t.split(SHARES)[rank] for t in (x, y))
    loader = list(zip(x.split(5), y.split(5), strict=True))
    curvature = fit_curvature(Branch().double(), "categorical", loader, progress=False)
    return {name: [M.diagonal().clone() for M in pair] for name, pair in curvature.layers.items()}


def grouped(rank):
    """The examples of a process alone in its group, and the error of processes with other models in one."""
    torch.manual_seed(0)
    model, said = nn.Sequential(nn.Linear(4, 3 + rank), nn.Linear(3 + rank, 3)), ""
    pair = torch.randn(SHARES[rank], 4), torch.zeros(SHARES[rank], dtype=torch.int64)
    own = [distributed.new_group([one]) for one in range(WORLD)][rank]
    alone = fit_curvature(model, "categorical", pair, progress=False, group=own)
    try:
        fit_curvature(model, "categorical", pair, progress=False)
    except ValueError as error:
        said = str(error)
    return alone.examples, said


def run(rank, world):
    found: dict = {repr(fit): fitted(*fit, rank) for fit in FITS}
    try:
        fitted("mlp", "block-tridiagonal", "exact", rank)
    except ValueError as error:
        found["refused"] = str(error)
    found["branched"], found["grouped"] = branched(rank), grouped(rank)
    case = Case("mlp")
    try:
        fit_curvature(case.model, "categorical", [] if rank == 1 else case.loader(), progress=False)
    except (RuntimeError, ValueError) as error:
        found["empty"] = str(error)
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("curvature"), WORLD, run)


@pytest.mark.parametrize("fit", FITS, ids=" ".join)
def test_two_processes_give_what_one_gives_on_all_of_the_data(processes, fit):
    expected = fitted(*fit)
    for process in processes:
        assert process[repr(fit)]["examples"] == expected["examples"] == N
        for F, one in zip(process[repr(fit)]["F"], expected["F"], strict=True):
            assert float((F - one).abs().max()) <= 1e-12 * float(one.abs().max())
    assert all(map(torch.equal, processes[0][repr(fit)]["F"], processes[1][repr(fit)]["F"]))


def test_what_is_no_layer_to_one_process_is_none_to_all(processes):
    for found in (process["branched"] for process in processes):
        assert {"odd.weight", "odd.bias"} < found.keys()
        torch.testing.assert_close(found, branched(), rtol=1e-9, atol=1e-12)


def test_a_chain_in_several_processes_is_refused(processes):
    assert all("takes all of the data in one process" in process["refused"] for process in processes)


def test_an_error_of_one_process_is_everyones(processes):
    assert "process 1 of 2 failed at A and G" in processes[0]["empty"]
    assert "loader is empty" in processes[1]["empty"]


def test_a_group_says_whose_data_it_is(processes):
    for rank, (examples, said) in enumerate(process["grouped"] for process in processes):
        assert examples == SHARES[rank]
        assert "the processes differ in the layers at A and G" in said
