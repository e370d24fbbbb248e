"""Properties of pure modules, which the suite tries some hundred times. A round is 1,000 tries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cache.test_near import test_what_is_near_was_not_written as what_is_near
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagination.test_body import pages
from pagination.test_body import test_what_is_written_is_what_the_model_makes as what_is_written

generated = settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(("tried", "drawn"), [(what_is_near, st.data()), (what_is_written, pages())])
def test_properties(tried: Any, drawn: st.SearchStrategy[Any], rounds: Iterator[int]) -> None:
    check = generated(given(drawn)(tried.hypothesis.inner_test))
    for _ in rounds:
        check()
