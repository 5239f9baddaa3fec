"""How much is guessed: as much as pays, as measured; and what is right of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from internvl_edge.runtime.decoding.pass_costs import PassCosts
from internvl_edge.runtime.decoding.speculation import Experience, Grounds, Others, Speculator

VOCAB, SLOT = 1000, 999
ROWS = range(1, 9)

Cost = Callable[[int], float]


def flat(rows: int) -> float:
    return 1.0 + 0.01 * (rows - 1)


def steep(rows: int) -> float:
    return float(rows)


def measured(cost: Cost) -> Experience:
    """The experience of a model whose passes were all measured."""
    found = Experience(VOCAB)
    for rows in ROWS:
        found.costs.add(rows, cost(rows))
    return found


def answer(
    prompt: Sequence[int], ids: Sequence[int], cost: Cost, experience: Experience, most: int = 7
) -> list[tuple[int, int]]:
    """Decode an answer; of each pass what was guessed, and the tokens it gave."""
    guesser = Speculator(prompt, SLOT, most, experience)
    passes, done = [], 1
    while done < len(ids):
        guesses = guesser.draft(ids[:done], len(ids) - done - 1, Others())
        assert len(guesses) < len(ids) - done
        experience.costs.add(1 + len(guesses), cost(1 + len(guesses)))
        tokens = 0
        while done < len(ids):
            hit = guesses[tokens : tokens + 1] == [ids[done]]
            tokens, done = tokens + 1, done + 1
            if not hit:
                break
        if guesses:
            guesser.resolved(tokens)
        passes.append((len(guesses), tokens))
    assert sum(tokens for _, tokens in passes) == len(ids) - 1
    return passes


def taken(passes: Sequence[tuple[int, int]], cost: Cost) -> float:
    return sum(cost(1 + guessed) for guessed, _ in passes)


def unguessable(count: int) -> list[int]:
    """Text in which pairs of tokens never come again as they were."""
    draw = random.Random(1)
    return [draw.randrange(30) for _ in range(count)]


@given(
    ids=st.lists(st.integers(0, 5), min_size=1, max_size=240),
    earlier=st.lists(st.lists(st.integers(0, 5), min_size=40, max_size=240), max_size=2),
    costs=st.lists(st.floats(0.9, 6), min_size=8, max_size=8),
    most=st.integers(1, 7),
)
@example(ids=[0] * 160, earlier=[], costs=[1.0, 4.0, *[1.0] * 6], most=1)  # measured long ago
def test_it_never_loses_more_than_was_allowed(
    ids: list[int], earlier: list[list[int]], costs: list[float], most: int
) -> None:
    def cost(rows: int) -> float:
        return costs[rows - 1]

    experience = measured(cost)
    for other in earlier:
        Speculator([1, 2, 3], SLOT, most, experience).ended(other)
    passes = answer([1, 2, 3, 1, 2], ids, cost, experience, most)
    assert taken(passes, cost) <= cost(1) * (1.01 * len(ids) + 0.5) + 1e-9


def test_text_that_cannot_be_guessed_costs_nothing_worth_mentioning() -> None:
    ids = unguessable(2000)
    assert taken(answer([0], ids, flat, Experience(VOCAB)), flat) < 1.02 * len(ids)
    passes = answer([0], ids, steep, Experience(VOCAB))
    assert taken(passes, steep) < 1.02 * len(ids)
    assert sum(guessed > 0 for guessed, _ in passes) < 20


def test_what_repeats_is_guessed_many_at_a_time() -> None:
    ids = unguessable(300)
    passes = answer(ids, ids, flat, Experience(VOCAB))
    assert taken(passes, flat) < len(ids) / 4
    assert passes[-2] == (7, 8)


def test_rows_that_cost_as_much_as_passes_are_not_run() -> None:
    ids = unguessable(300)
    passes = answer(ids, ids, lambda rows: 0.2 + rows, Experience(VOCAB))
    assert taken(passes, lambda rows: 0.2 + rows) < 1.02 * 1.2 * len(ids)


def test_fewer_rows_where_more_of_them_cost_too_much() -> None:
    ids = unguessable(300)

    def cost(rows: int) -> float:
        return 1.0 if rows <= 4 else 4.0

    passes = answer(ids, ids, cost, Experience(VOCAB))
    assert passes[-2][0] == 3
    assert sum(guessed > 3 for guessed, _ in passes) <= 3


def test_it_begins_again_where_text_begins_to_repeat() -> None:
    """It goes on guessing where nothing is run, and so knows."""
    first = unguessable(400)
    again = first + first[-200:]
    passes = answer([0], again, lambda rows: 1 + 0.1 * (rows - 1), Experience(VOCAB))
    assert sum(guessed for guessed, _ in passes[100:300]) < 60
    assert max(tokens for _, tokens in passes[-20:]) == 8


def test_nothing_is_guessed_before_a_pass_was_measured() -> None:
    guesser = Speculator([1, 2, 3, 1, 2, 3], SLOT, 7, Experience(VOCAB))
    assert guesser.draft([1, 2], 9, Others()) == []


@pytest.mark.parametrize("room", range(9))
def test_no_more_than_there_is_room_for(room: int) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8] * 4
    guesser = Speculator(prompt, SLOT, 5, measured(lambda rows: 1.0))
    assert len(guesser.draft([1, 2, 3], room, Others())) == max(
        count for count in (0, 1, 3, 5) if count <= room
    )


def test_answers_beside_each_other_share_the_rows_that_pay() -> None:
    """Up to 8 rows cost nothing: the first takes what pays most, the others what is left."""
    prompt = [1, 2, 3, 4, 5, 6, 7, 8] * 4
    experience = Experience(VOCAB)
    for rows in range(1, 41):
        experience.costs.add(rows, 1.0 if rows <= 8 else 4.0)
    others = Others.of(3)
    drafts = []
    for _ in range(4):
        guesser = Speculator(prompt, SLOT, 7, experience)
        drafts.append(len(guesser.draft([1, 2, 3], 9, others)))
    assert drafts == [3, 1, 0, 0]
    assert (others.rows, others.answers) == (3 + 4, 3)
    assert others.tokens > 5


def test_costs_are_medians_and_what_lies_between() -> None:
    costs = PassCosts()
    assert costs.seconds(3) == 0
    for seconds in (1.0, 9.0, 1.2, 1.1, 1.3):
        costs.add(1, seconds)
    assert costs.seconds(1) == 1.2
    assert costs.seconds(5) == pytest.approx(1.2 * 1.2)
    costs.add(5, 3.2)
    assert costs.seconds(5) == 3.2
    assert costs.seconds(3) == pytest.approx(1.2 * 1.1)  # never tried
    assert costs.seconds(9) == pytest.approx(3.2 * 1.2)


def test_costs_of_long_ago_are_forgotten() -> None:
    """The fewer they are the sooner."""
    costs = PassCosts()
    for rows in (8, 8, 4):
        costs.add(rows, 50.0)
    for _ in range(60):
        costs.add(1, 1.0)
    assert (costs.seconds(8), costs.seconds(4)) == (50.0, 1.0 + 3 / 7 * 49)
    for _ in range(60):
        costs.add(1, 1.0)
    assert costs.seconds(8) < 2
    costs.add(8, 1.5)
    assert costs.seconds(8) == 50.0  # the middle one of three
    for _ in range(300):
        costs.add(1, 1.0)
    costs.add(8, 1.5)
    assert costs.seconds(8) == 1.5


def test_a_pass_that_met_something_else_is_no_verdict() -> None:
    ids = unguessable(300)
    met = []

    def cost(rows: int) -> float:
        met.append(rows)
        return 30.0 if rows > 1 and not any(other > 1 for other in met[:-1]) else flat(rows)

    passes = answer(ids, ids, cost, Experience(VOCAB))
    assert len(passes) < 150


def test_the_search_for_guesses_takes_a_hundredth_of_the_time() -> None:
    costs = PassCosts()
    assert not costs.may_search  # nothing was run yet
    searched = 0.0
    for _ in range(1000):
        costs.add(1, 0.001)
        if costs.may_search:
            costs.searched(0.0002)
            searched += 0.0002
    assert searched == pytest.approx(0.01 * 1.0, abs=0.0003)
    for _ in range(1000):  # what was left unused is not saved up
        costs.add(1, 0.001)
    spent = 0
    while costs.may_search:
        costs.searched(0.0002)
        spent += 1
    assert spent <= 6


def filled(draw: random.Random) -> list[int]:
    """A form of other values each time: ten keys of eight tokens, which no prompt names."""
    keys = [list(range(100 + 10 * key, 108 + 10 * key)) for key in range(10)]
    return [token for key in keys for token in (*key, *(draw.randrange(30) for _ in range(3)))]


def told(guesser: Speculator, ids: Sequence[int]) -> int:
    """How many passes an answer takes."""
    done = passes = 1
    while done < len(ids):
        guesses = guesser.draft(ids[:done], len(ids) - done, Others())
        right = next((n for n, one in enumerate(guesses) if one != ids[done + n]), len(guesses))
        done, passes = done + min(right + 1, len(ids) - done), passes + 1
    guesser.ended(ids)
    return passes


def test_an_answer_is_guessed_from_earlier_ones() -> None:
    """Its keys are theirs; its values nobody knows."""
    draw, experience = random.Random(2), measured(flat)
    passes = [told(Speculator([0], SLOT, 7, experience), filled(draw)) for _ in range(8)]
    assert passes[0] > 100  # nothing repeats
    assert passes[-1] < 62


@given(seed=st.integers(0, 99))
def test_of_two_guesses_the_one_that_is_right_more_often(seed: int) -> None:
    """The prompt tells this answer; earlier ones went on otherwise behind every three tokens."""
    draw, experience = random.Random(seed), measured(flat)
    for _ in range(8):
        text = [draw.randrange(30) for _ in range(120)]
        passes = told(Speculator(text, SLOT, 7, experience), text)
        other = [token if place % 4 else 30 + draw.randrange(5) for place, token in enumerate(text)]
        Speculator([0], SLOT, 7, experience).ended(other)
    assert passes < 40


def test_guesses_that_agree_count_for_more_than_such_that_do_not() -> None:
    """Earlier answers and the prompt say the same in one place, and not in another."""
    experience = measured(flat)
    experience.answers.add([], [1, 2, 3, 10], SLOT)
    experience.answers.add([], [5, 6, 7, 30], SLOT)
    ids = [9, 1, 2, 3, 10, 9, 5, 6, 7, 20]
    for _ in range(30):
        guesser = Speculator([1, 2, 3, 10, 5, 6, 7, 20], SLOT, 7, experience)
        for done in range(1, len(ids) + 1):
            guesser.draft(ids[:done], 1, Others())
    rates = {
        doubted: experience.rates.rate(Grounds(recalled=True, matched=1, doubted=doubted))
        for doubted in (False, True)
    }
    assert rates[False] > 0.9
    assert rates[True] < 0.1
