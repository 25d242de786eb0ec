"""The states and their table. What its drawing looks like stands in README, and is held there."""

from keepalive.core.states import TABLE, Sign, State, diagram

U, C, L, W, B = State.UNKNOWN, State.COLD, State.LOADING, State.WARM, State.BACKOFF


def leads(sign: Sign) -> dict[State, State | None]:
    return {state: row[sign] for state, row in TABLE.items()}


def test_the_table_has_a_row_for_every_state_and_a_column_for_every_sign():
    assert set(TABLE) == set(State)
    assert all(set(row) == set(Sign) for row in TABLE.values())


def test_only_our_own_load_is_a_move_that_a_state_may_forbid():
    gaps = {(state, sign) for state, row in TABLE.items() for sign, target in row.items() if target is None}

    assert gaps == {(s, Sign.LOAD_STARTED) for s in (State.UNKNOWN, State.LOADING, State.WARM)}


def test_most_signs_lead_to_one_state_wherever_the_model_was():
    everywhere = {sign: set(leads(sign).values()) for sign in Sign}

    assert {sign: to.pop() for sign, to in everywhere.items() if len(to) == 1} == {
        Sign.UNREACHABLE: U,
        Sign.ABSENT: C,
        Sign.HELD_OFF: B,
        Sign.SEEN_LOADING: L,
        Sign.LOAD_FAILED: B,
        Sign.DISPROVED: B,
    }


def test_an_instance_alone_makes_nothing_warm_and_leaves_what_is_under_way():
    assert leads(Sign.PRESENT) == {U: U, C: U, L: L, W: W, B: B}
    assert leads(Sign.UNASKED) == {U: U, C: U, L: U, W: W, B: U}


def test_an_answer_makes_it_warm_unless_it_is_known_to_be_gone():
    assert leads(Sign.PROVED) == {U: W, C: C, L: W, W: W, B: W}


def test_only_what_is_known_to_be_absent_is_loaded():
    assert leads(Sign.LOAD_STARTED) == {U: None, C: L, L: None, W: None, B: L}


def test_states_go_by_the_names_that_metrics_logs_and_records_of_the_past_know():
    assert list(State) == ["unknown", "cold", "loading", "warm", "backoff"]


def test_the_diagram_names_every_state():
    assert all(f"    {state} --> " in diagram() for state in State)
