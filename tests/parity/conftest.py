import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_core(a_core_of_its_own):
    """Whole models, whose answers do not depend on the number of threads."""
