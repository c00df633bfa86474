"""Draws for anyone's loader: whatever the timing, the same batches; resumed, the same again; unbiased."""

import pickle
import threading

import jax
import numpy as np
import pytest
from sampling_problem import unchecked

import isgd_jax as isgd

N, M = 60, 6
NORMS = np.random.default_rng(0).lognormal(sigma=1.5, size=N).astype(np.float32)


SAMPLER = isgd.importance_sampler(N, batch_size=M)


def made(sampler=SAMPLER, **options):
    return isgd.loaders.index_sampler(sampler, **{"key": jax.random.key(3), "ahead": 3, "refresh_every": 5} | options)


def trained(draws, steps):
    """The indices and weights of so many steps, each observed at once."""
    rows = []
    for _ in range(steps):
        batch = next(draws)
        rows.append((batch.indices, batch.weights))
        draws.observe(batch, norms=NORMS[batch.indices])
    return rows


def same(one, other):
    for (a, b), (c, d) in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


@pytest.mark.slow
def test_timing_and_order_of_observations_change_nothing():
    plain, late = trained(made(), 18), []
    draws = made()
    for _ in range(6):  # three at a time, observed backwards, from a thread
        batches = [next(draws) for _ in range(3)]
        late += [(batch.indices, batch.weights) for batch in batches]
        for batch in batches[::-1]:
            thread = threading.Thread(target=draws.observe, args=(batch,), kwargs={"norms": NORMS[batch.indices]})
            thread.start()
            thread.join()
    same(plain, late)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [SAMPLER, isgd.shuffled_epochs(N, batch_size=M)], ids=["drawn", "epochs"])
def test_a_saved_state_goes_on_bit_for_bit_and_hands_out_again_what_was_not_observed(sampler):
    draws = made(sampler)
    trained(draws, 7)
    next(draws), next(draws)  # in a loader's queue when the run is killed
    saved = pickle.loads(pickle.dumps(draws.state_dict()))
    again = made(sampler, key=jax.random.key(4))  # the key is part of what was saved
    again.load_state_dict(saved)
    whole = trained(made(sampler), 20)
    same(trained(again, 13), whole[7:])


def test_a_saved_state_that_is_refused_changes_nothing():
    """One of another batch size has a state of the same shapes, and other draws."""
    draws, whole = made(), trained(made(), 6)
    trained(draws, 3)
    strange, later = made(isgd.importance_sampler(N, batch_size=2 * M)), made()
    trained(later, 5)
    for saved in (strange.state_dict(), later.state_dict() | {"draws": strange.state_dict()["draws"]}):
        with pytest.raises(ValueError, match="it was saved of another sampler"):
            draws.load_state_dict(saved)
    same(trained(draws, 3), whole[3:])


def test_masked_arrays_and_versions_that_are_no_count_are_refused():
    """NumPy drops the mask, and what it hid would be learnt."""
    draws = made()
    batch, masked = next(draws), np.ma.masked_array(np.ones(M, np.float32), mask=np.arange(M) == 1)
    for name, use in {
        "norms": lambda: draws.observe(batch, norms=masked),
        "scores": lambda: draws.record(batch.indices, masked),
        "ids": lambda: draws.record(np.ma.masked_array(batch.indices), np.ones(M)),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be an array without a mask"):
            use()
    with pytest.raises(ValueError, match="version must be 0 or more, got -1"):
        draws.record(batch.indices, np.ones(M), version=-1)


def test_scores_of_updates_that_nobody_has_made_are_refused():
    """They would count as younger than any, and be overwritten by none."""
    draws = made(isgd.importance_sampler(N, batch_size=M, steps_per_update=2))
    trained(draws, 4)
    draws.record([0], [1.0], version=3)  # four steps are observed, and three can be learnt from
    with pytest.raises(ValueError, match=r"version must be of updates that are made: at most 3, since 4 .* got 4"):
        draws.record([1], [1.0], version=4)


def test_copies_in_other_processes_are_refused():
    """In each worker of a loader they drew the same batches, and learnt nothing."""
    draws = made()
    batch = next(draws)
    with pytest.raises(TypeError, match=r"cannot be pickled: .* give the loader batch_sampler=draws\.lists\(\)"):
        pickle.dumps(draws)
    draws._process += 1  # as after a fork
    for use in (lambda: next(draws), lambda: draws.observe(batch), lambda: draws.record([0], [1.0])):
        with pytest.raises(ValueError, match=r"made in another process: .* would all draw the same"):
            use()


def test_a_loop_over_lists_that_was_left_does_not_begin_anew_with_others_examples():
    draws = made()
    lists = draws.lists()
    for _, asked in zip(lists, range(2), strict=False):  # a loader took a third into its queue
        assert asked == draws.listed().step
    with pytest.raises(ValueError, match=r"while 1 batches that lists\(\) gave were not asked for"):
        iter(lists)
    draws.load_state_dict(draws.state_dict())
    for indices in lists:
        batch = draws.listed()
        assert batch.step == 0
        assert indices == batch.indices.tolist()
        break


def test_a_batch_that_a_loader_lost_is_no_batch_of_another_ones_weights():
    draws = made()
    lists = draws.lists()
    next(lists)  # its reading fails in a worker, and the loop goes on
    second = next(lists)
    with pytest.raises(ValueError, match=r"other examples than those of step 0, which are next: it lost a batch"):
        draws.listed(second)
    draws.load_state_dict(draws.state_dict())
    first = next(iter(lists))
    assert draws.listed(np.asarray(first)).step == 0


def test_epochs_are_epochs():
    rows = trained(made(isgd.shuffled_epochs(N, batch_size=M)), N // M)
    assert sorted(np.concatenate([indices for indices, _ in rows])) == list(range(N))


def test_the_estimate_is_unbiased_and_draws_follow_the_norms():
    draws = made(refresh_every=20)
    trained(draws, 100)
    rows = trained(draws, 1500)
    means = np.array([np.mean(weights * NORMS[indices]) for indices, weights in rows])
    assert abs(means.mean() - NORMS.mean()) < 5 * means.std() / np.sqrt(len(means))
    counts = np.bincount(np.concatenate([indices for indices, _ in rows]), minlength=N)
    assert np.corrcoef(counts, NORMS)[0, 1] > 0.8
    assert means.std() < 0.7 * NORMS.std() / np.sqrt(M)
    assert "parameter updates" in str(draws.report())


def test_processes_get_their_parts_of_the_same_draws():
    whole, parts = made(), []
    observed: dict = {}
    for place in range(2):
        parts.append(made(shard=(place, 2), gather=lambda part: observed["whole"]))
    for _ in range(12):
        batch, mine = next(whole), [next(part) for part in parts]
        np.testing.assert_array_equal(batch.indices, np.concatenate([part.indices for part in mine]))
        np.testing.assert_array_equal(batch.weights, np.concatenate([part.weights for part in mine]))
        observed["whole"] = NORMS[batch.indices]
        whole.observe(batch, norms=observed["whole"])
        for part, own in zip(parts, mine, strict=True):
            part.observe(own, norms=NORMS[own.indices])


def test_late_scores_are_known_at_the_next_refresh_and_lists_come_with_their_batches():
    draws = made(refresh_every=1)
    draws.record(np.arange(N), np.where(np.arange(N) < 3, 1e3, 1e-3))
    trained(draws, 1)
    next(draws), next(draws)  # they were drawn before
    lists = draws.lists()
    assert sum(i < 3 for i in next(lists)) >= M / 2
    batch = draws.listed()
    draws.observe(batch, scores=NORMS[batch.indices])  # waits for its turn
    draws.record([2**40, -1], [1.0, 1.0])  # padding
    with pytest.raises(ValueError, match="has been asked for"):
        draws.listed()


def test_misuse_is_told():
    draws = made(timeout=0.05)
    batches = [next(draws) for _ in range(3)]
    with pytest.raises(TimeoutError, match="3 batches are handed out and none was observed"):
        next(draws)
    with pytest.raises(ValueError, match=r"norms of the 6 draws, got shape \(2,\)"):
        draws.observe(batches[0], norms=np.ones(2))
    draws.observe(batches[0], norms=np.ones(M))
    with pytest.raises(ValueError, match="step 0 was observed before"):
        draws.observe(batches[0], norms=np.ones(M))
    scored = isgd.presampling(N, batch_size=M, scorer=lambda params, batch: batch)
    for options, told in (
        ({"shard": (0, 2)}, "gather="), ({"shard": (2, 2)}, "equal parts"), ({"shard": (0, 4)}, "equal parts"),
        ({"ahead": 0}, "ahead"), ({"sampler": scored}, "presampling"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            made(**options)
    with pytest.raises(TypeError, match="whole numbers"):
        draws.record([0.5], [1.0])
    with pytest.raises(ValueError, match="the batch is not that of step 1 of this sampler"):
        draws.observe(batches[2]._replace(step=1, probs=batches[2].probs / 2))
    parted = made(shard=(0, 2), gather=lambda part: part)
    with pytest.raises(ValueError, match=r"gather must put the parts one after the other, norms \[6\]; got shape \(3,"):
        parted.observe(next(parted), norms=np.ones(M // 2))


@pytest.mark.slow
def test_scores_are_distrusted_by_the_callers_clock_and_a_refused_observation_changes_nothing():
    draws = made(isgd.importance_sampler(N, batch_size=M, max_age_seconds=5.0))
    batches = [next(draws) for _ in range(3)]
    for batch in (batches[1], batches[0]):
        with pytest.raises(ValueError, match="pass seconds= to observe and record"):
            draws.observe(batch, norms=NORMS[batch.indices])
    for batch in batches:
        draws.observe(batch, norms=NORMS[batch.indices], seconds=1.0)
    draws.record([0], [1.0], seconds=2.0)
    assert int(draws.report().version) == 3
    with pytest.raises(ValueError, match="another sampler"):
        made().load_state_dict(made(isgd.importance_sampler(N + 1, batch_size=M)).state_dict())
    with pytest.raises(ValueError, match="ahead=2, here it is 3"):
        made().load_state_dict(made(ahead=2).state_dict())


@pytest.mark.parametrize(
    "options",
    [{"ahead": np.uint8(3)}, {"refresh_every": np.uint8(5)}, {"shard": (np.uint8(0), np.uint8(1))}],
    ids=["ahead", "refresh_every", "shard"],
)
def test_numbers_of_numpy_count_as_those_of_python(options):  # of eight bits, which are at their end after 255 steps
    with unchecked():
        plain, draws = made(), made(**options)
    kept = plain.state_dict() | {"observed": 250}
    plain.load_state_dict(kept)
    draws.load_state_dict(kept)
    same(trained(plain, 10), trained(draws, 10))


def test_the_step_that_others_wait_for_is_named():
    """Of a batch whose update failed; it said that none was observed."""
    draws = made(timeout=0.05)
    next(draws)
    for batch in (next(draws), next(draws)):
        draws.observe(batch, norms=np.ones(M))
    with pytest.raises(TimeoutError, match=r"step 0 was .* not observed in 0\.05 s, and 2 later ones wait for it: "):
        next(draws)
    draws.load_state_dict(draws.state_dict())
    assert next(draws).step == 0


def test_a_timeout_is_a_number_of_seconds_and_lists_go_on_after_it():
    with pytest.raises(ValueError, match="timeout must be 0 or more seconds, or infinity, got nan"):
        made(timeout=float("nan"))
    with unchecked(), pytest.raises(ValueError, match=r"timeout must be 0 or more seconds, or infinity, got None"):
        made(timeout=None)
    with unchecked(), pytest.raises(TypeError, match=r"each number of shard must be a whole number, got 1\.0"):
        made(shard=(1.0, 2))
    patient = made(ahead=1, timeout=float("inf"))
    batch = next(patient)
    threading.Timer(0.1, patient.observe, (batch,), {"norms": np.ones(M)}).start()
    assert next(patient).step == 1
    draws = made(ahead=1, timeout=0.01)
    lists = draws.lists()
    next(lists)
    for _ in range(2):  # the second was told that there are no more batches
        with pytest.raises(TimeoutError, match="none was observed"):
            next(lists)
    draws.observe(draws.listed(), norms=np.ones(M))
    assert next(lists) == draws.listed().indices.tolist()
