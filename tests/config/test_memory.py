"""Whether what the file wants in memory fits there."""

from keepalive.config import overbooked, parse

HEAD = '[[upstreams]]\nname = "local"\nurl = "http://x"\nmemory = "20GiB"\n'


def said(*models: str, head: str = HEAD) -> list[str]:
    tables = "".join(f"[[models]]\n{model}\n" for model in models)
    return [why for _, why in overbooked(parse(head + tables, "test", {}))]


def test_what_fits_is_not_worth_a_word():
    assert said('key = "a"\nmemory = "12GiB"', 'key = "b"\nmemory = "8GiB"', 'key = "unknown"') == []


def test_the_first_models_are_kept_and_of_those_after_them_it_is_said():
    assert said(
        'key = "a"\nmemory = "12GiB"', 'key = "b"\nmemory = "9GiB"', 'key = "c"\nmemory = "8GiB"'
    ) == [
        '"b" never fits on "local": it takes 9.0 GiB, and memory is 20.0 GiB, of which 12.0 GiB are kept for those '
        "before it"
    ]


def test_what_comes_and_goes_has_to_fit_beside_what_is_always_there():
    auto = 'keep = "auto"'

    assert said(
        'key = "a"\nmemory = "12GiB"',
        f'key = "b"\nmemory = "9GiB"\n{auto}',
        f'key = "c"\nmemory = "8GiB"\n{auto}',
    ) == [
        '"b" never fits on "local": it takes 9.0 GiB, and memory is 20.0 GiB, of which 12.0 GiB are always in use'
    ]


def test_a_budget_below_the_smallest_model_is_said():
    assert said('key = "a"\nmemory = "30GiB"\nkeep = "auto"') == [
        '"a" never fits on "local": it takes 30.0 GiB, and memory is 20.0 GiB'
    ]


def test_without_a_budget_nothing_is_known():
    assert said('key = "a"\nmemory = "300GiB"', head='[[upstreams]]\nurl = "http://x"\n') == []
