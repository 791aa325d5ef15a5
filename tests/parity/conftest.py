import os

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def a_core_of_its_own(worker_id):
    """Where pytest-xdist's workers share the machine, each takes one core: threads that fight for cores wait idly."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if worker_id == "master" or len(cores) < 2:
        yield
        return
    os.sched_setaffinity(0, {cores[int(worker_id.removeprefix("gw")) % len(cores)]})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)
