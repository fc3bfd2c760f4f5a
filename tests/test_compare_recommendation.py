"""What `reversax compare` recommends, given measurements that are made up."""

import pytest

from reversax.compare._measure import Measurement
from reversax.compare._recommend import Wish, recommend, verdict


def made_up(
    name, seconds, size, error=1e-5, cautionary=False, failure=None, control=False
):
    return Measurement(
        candidate=name,
        cautionary=cautionary,
        control=control,
        solver="Tsit5()",
        adjoint="ReversibleAdjoint(restart_every='auto')",
        dt0=0.1,
        num_steps=40,
        failure=failure,
        gradient_error=error,
        temporary_bytes=size,
        seconds=[seconds],
    )


FAST = made_up("fast", 1.0, 9000)
MIDDLE = made_up("middle", 2.0, 3000)
SMALL = made_up("small", 4.0, 1000)
BEATEN = made_up("beaten", 3.0, 3500)
INACCURATE = made_up("inaccurate", 0.1, 10, error=0.1)
UNCHECKED = made_up("unchecked", 0.1, 10, cautionary=True)
FAILED = made_up("failed", 0.1, 10, failure="It overflowed.")
ALL = [BEATEN, SMALL, FAST, MIDDLE, INACCURATE, UNCHECKED, FAILED]


@pytest.mark.parametrize(
    ("wish", "chosen"),
    [
        (Wish(), "fast"),
        (Wish(prefer="memory"), "small"),
        (Wish(memory_limit=3400), "middle"),
        (Wish(memory_limit=1000), "small"),
        (Wish(memory_limit=999), None),
        (Wish(tolerance=0.2), "inaccurate"),
        (Wish(tolerance=1e-6), None),
    ],
    ids=str,
)
def test_the_wish_decides_what_to_take(wish, chosen):
    assert recommend(ALL, wish).chosen == chosen


def test_only_candidates_that_no_other_beats_in_both_are_efficient():
    recommendation = recommend(ALL, Wish())
    assert recommendation.within == ["beaten", "small", "fast", "middle"]
    assert recommendation.efficient == ["fast", "middle", "small"]


def test_each_candidate_has_the_verdict_of_the_first_rule_it_breaks():
    wish = Wish(memory_limit=5000)
    recommendation = recommend(ALL, wish)
    verdicts = {x.candidate: verdict(x, recommendation, wish) for x in ALL}
    assert verdicts == dict(
        beaten="beaten",
        small="efficient",
        fast="too large",
        middle="take it",
        inaccurate="inaccurate",
        unchecked="unchecked",
        failed="failed",
    )


@pytest.mark.parametrize(
    ("seconds", "chosen"), [(1.09, "almost"), (1.11, "fast")], ids=["near", "far"]
)
def test_within_a_tenth_of_the_fastest_the_smaller_is_taken(seconds, chosen):
    almost = made_up("almost", seconds, 8000)
    assert recommend([FAST, almost, SMALL], Wish()).chosen == chosen


@pytest.mark.parametrize(
    ("size", "chosen"), [(1090, "almost"), (1110, "small")], ids=["near", "far"]
)
def test_within_a_tenth_of_the_smallest_the_faster_is_taken(size, chosen):
    almost = made_up("almost", 3.0, size)
    assert recommend([FAST, almost, SMALL], Wish(prefer="memory")).chosen == chosen


def test_the_order_of_measurements_does_not_matter():
    for wish in (Wish(), Wish(prefer="memory"), Wish(memory_limit=3400)):
        forwards, backwards = recommend(ALL, wish), recommend(ALL[::-1], wish)
        assert forwards.chosen == backwards.chosen
        assert forwards.efficient == backwards.efficient


def said(measurements, **wish):
    return recommend(measurements, Wish(**wish)).text


def test_the_words_say_what_it_takes_and_what_the_alternative_is():
    text = said(ALL)
    assert text.startswith(
        "Take fast, with ReversibleAdjoint, dt0=(t1 - t0)/40. Its gradient is within "
        "1.0e-05 of the reference (wanted: 0.001), in 1 s and 9 kB."
    )
    assert "It is the fastest of the 4 that are as accurate." in text
    assert text.endswith(
        "small takes 9 times less memory and 4 times as long: --prefer memory."
    )
    text = said(ALL, prefer="memory")
    assert "It is the smallest of the 4 that are as accurate." in text
    assert text.endswith(
        "fast is 4 times as fast and takes 9 times the memory: --prefer time."
    )


def test_the_words_say_when_there_is_no_alternative():
    assert said([MIDDLE, BEATEN]).endswith(
        "It is both the fastest and the smallest of the 2 that are as accurate."
    )
    assert said([FAST, INACCURATE]).endswith("No other candidate is as accurate.")
    almost = made_up("almost", 1.05, 8000)
    assert "It is smaller than fast, the fastest of the 2" in said([FAST, almost])


def test_the_control_is_never_taken_and_always_compared_with_what_is():
    control = made_up("by hand", 0.5, 1800, control=True)
    recommendation = recommend([control, *ALL], Wish())
    assert recommendation.chosen == "fast"
    assert verdict(control, recommendation, Wish()) == "control"
    assert recommendation.text.endswith(
        "For comparison, what one would write by hand, by hand: 500 ms and 1.8 kB in "
        "40 steps, 0.5 times as long and 0.2 times the memory."
    )
    inaccurate = made_up("by hand", 0.5, 1800, error=0.1, control=True)
    text = said([inaccurate, FAST])
    assert text.endswith("1.8 kB in 40 steps, and not as accurate (1.0e-01).")


def test_the_words_say_why_nothing_is_recommended():
    text = said(ALL, memory_limit=999)
    assert "None of the 4 candidates that are accurate enough takes at most" in text
    assert "small, takes 1 kB. Raise --memory-limit." in text
    text = said(ALL, tolerance=1e-6)
    assert text.startswith("No candidate's gradient is within 1e-06 of the reference.")
    assert "is within 1.0e-05" in text
    text = said([FAILED, UNCHECKED])
    assert text == "No candidate gave a gradient that can be relied on."
