"""What time was spent on, and how the time of a call is taken."""

import time

import pytest

from isgd_jax.app.clock import account, middle_seconds


def test_an_account_adds_up_to_all_the_time() -> None:
    rows = account({"updating": 1.0, "planning": 3.0}, 10.0)
    assert rows == [
        ("planning and compiling", 3.0, 0.3), ("updating", 1.0, 0.1), ("starting, and the rest", 6.0, 0.6),
    ]  # fmt: skip
    assert sum(share for _, _, share in rows) == pytest.approx(1.0)


def test_a_call_is_not_charged_for_the_one_before_it() -> None:
    """The first call after another function is slow here, as it is after a large program; order does not matter."""
    last: list[str] = []

    def call(name: str) -> None:
        if last[-1:] != [name]:
            time.sleep(0.05)
        last.append(name)
        time.sleep(0.001)

    assert max(middle_seconds(lambda: call("one"), lambda: call("other"), repeats=3)) < 0.025
