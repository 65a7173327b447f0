"""PEFT's expectations of a tuner, for every adapter of the package."""

import pytest
from checks_adapters import ADAPTERS, CHECKS


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name, check, tmp_path):
    CHECKS[check](ADAPTERS[name], tmp_path)
