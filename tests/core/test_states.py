"""The states, their table, and its drawing."""

from keepalive.core.states import TABLE, Sign, State, diagram


def test_the_table_has_a_row_for_every_state_and_a_column_for_every_sign():
    assert set(TABLE) == set(State)
    assert all(set(row) == set(Sign) for row in TABLE.values())


def test_only_our_own_load_is_a_move_that_a_state_may_forbid():
    gaps = {(state, sign) for state, row in TABLE.items() for sign, target in row.items() if target is None}

    assert gaps == {(s, Sign.LOAD_STARTED) for s in (State.UNKNOWN, State.LOADING, State.WARM)}


def test_the_diagram_names_every_state():
    assert all(f"    {state} --> " in diagram() for state in State)
