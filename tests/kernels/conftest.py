"""Every test starts from the same random state, on one thread: small tensors gain nothing from a second one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_torch():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
