import pytest

from keepalive.core.quotes import unquoted


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ('"key"', "key"),
        ("'key'", "key"),
        ("\"'key'\"", "'key'"),
        ('""', ""),
        ("key", "key"),
        ('"key', '"key'),
        ("key'", "key'"),
        ("\"key'", "\"key'"),
        ('"', '"'),
        ("", ""),
    ],
)
def test_one_pair_of_quotes_is_taken_away_where_it_is_a_pair(text, bare):
    assert unquoted(text) == bare
