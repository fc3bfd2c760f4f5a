import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Problems are small: threads would wait for each other."""
    torch.set_num_threads(1)
