from isgd_jax.thrift import MOST_PATIENCE, Thrift, decide


def test_scoring_that_pays_is_never_left_out() -> None:
    # R = 0.5 is worth batches twice as large: a gain of 1; scoring costs 0.9 of the updates.
    thrift, decision = decide(Thrift(3, 8), ratio=0.5, scoring_seconds=9.0, update_seconds=10.0)
    assert decision.is_worth
    assert decision.gain == 1.0
    assert decision.cost == 0.9
    assert thrift == Thrift()


def test_scoring_that_does_not_pay_is_tried_ever_more_seldom() -> None:
    thrift, worth = Thrift(), []
    for _ in range(1000):
        thrift, decision = decide(thrift, ratio=0.5, scoring_seconds=11.0, update_seconds=10.0)
        worth.append(decision.is_worth)
    tries = [i for i, is_worth in enumerate(worth) if is_worth]
    assert tries[:4] == [1, 4, 9, 18]  # after 1, 2, 4, 8 left out
    assert tries[-1] - tries[-2] == MOST_PATIENCE + 1


def test_scores_that_gain_nothing_do_not_pay_however_cheap() -> None:
    _, decision = decide(Thrift(), ratio=1.2, scoring_seconds=0.01, update_seconds=10.0)
    assert not decision.is_worth
    assert "gains 0.00" in decision.reason


def test_age_makes_scoring_cheaper() -> None:
    costs = [decide(Thrift(), ratio=0.5, scoring_seconds=15.0, update_seconds=s)[1].is_worth for s in (10.0, 20.0)]
    assert costs == [False, True]


def test_nothing_known_scores() -> None:
    assert decide(Thrift(), ratio=None, scoring_seconds=1.0, update_seconds=1.0)[1].is_worth
    assert decide(Thrift(), ratio=0.9, scoring_seconds=None, update_seconds=1.0)[1].is_worth
