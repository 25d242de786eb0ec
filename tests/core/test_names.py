"""Who is meant: every kind of name, in the order in which it is looked up."""

import pytest

from keepalive.core.facts import Entry, Instance, ModelId, fold_key
from keepalive.core.names import Meaning, Names

TINY = ModelId("a", "acme/tiny-4b")
TINY_B = ModelId("b", "acme/tiny-4b")
CODER = ModelId("a", "coder")


def row(key, *instances, variants=(), selected=None):
    return Entry(key, instances=tuple(map(Instance, instances)), variants=variants, selected=selected)


def names(*rows, kept=None, default=None, upstreams=("a",), **listings):
    """Names after each upstream's listing: of the first as `rows`, of others by name; None: not heard yet."""
    made = Names()
    made.configure(upstreams, {TINY: ["gpt-4o-mini"]} if kept is None else kept, default)
    for upstream in upstreams:
        found = listings.get(upstream, rows if upstream == upstreams[0] else ())
        if found is not None:
            index = {fold_key(e.key): e for e in found}
            for entry in found:
                for variant in entry.variants:
                    index.setdefault(fold_key(variant), entry)
            made.listed(upstream, index)
    return made


VARIANTS = ("acme/tiny-4b@q4_k_m", "acme/tiny-4b@q8_0")
LISTED = row("acme/tiny-4b", variants=VARIANTS, selected=VARIANTS[0])
LOADED = row(
    "acme/tiny-4b", "acme/tiny-4b", "acme/tiny-4b:2", "My-Own", variants=VARIANTS, selected=VARIANTS[0]
)


@pytest.mark.parametrize("name", ["acme/tiny-4b", "ACME/Tiny-4B", "acme/tiny-4b:2", "my-own"])
@pytest.mark.parametrize("how", [str, str.upper])
def test_a_kept_model_is_meant_by_its_key_and_by_each_instance(name, how):
    assert names(LOADED).meaning(how(name)) == Meaning("a", (TINY,))


@pytest.mark.parametrize("name", ["acme/tiny-4b:17", "acme/tiny-4b:latest", "acme/tiny-4b@q4_k_m:17"])
@pytest.mark.parametrize("how", [str, str.upper])
def test_a_copy_that_is_gone_and_a_tag_that_lm_studio_does_not_know_become_the_key(name, how):
    meaning = names(LOADED).meaning(how(name))

    assert (meaning.upstream, meaning.models) == ("a", (TINY,))
    assert meaning.written(TINY) == "acme/tiny-4b"


@pytest.mark.parametrize("kept", ["llama3", "llama3:latest"])
@pytest.mark.parametrize("name", ["llama3", "Llama3:Latest"])
def test_ollamas_tag_may_stand_there_or_not(kept, name):
    model = ModelId("b", kept)
    both = names(row("coder"), kept={model: ["al"]}, upstreams=("a", "b"), b=[row("llama3:latest")])
    nobodys = names(row("coder"), kept={}, upstreams=("a", "b"), b=[row("llama3:latest")])

    assert both.meaning(name).models == (model,)
    assert both.meaning("llama3:8b") == Meaning("a", known=False)
    assert both.rows("b") == {"llama3:latest": ["al"]}
    assert nobodys.meaning(name).upstream == "b"
    assert nobodys.meaning(name).written() == (None if name.endswith("Latest") else "llama3:latest")
    assert not nobodys.meaning(name).stands_in


def test_a_variant_that_nobody_lists_is_for_whoever_lists_its_key_to_refuse():
    made = names(row("coder"), kept={}, upstreams=("a", "b"), b=[row("on-b", variants=("on-b@q8",))])

    assert made.meaning("On-B@q4") == Meaning("b", known=False)
    assert made.meaning("nobody@q4") == made.meaning("@q4") == Meaning("a", known=False)


@pytest.mark.parametrize(
    ("alias", "name"), [("gpt-4o", "GPT-4o:latest"), ("gpt-4o:latest", "gpt-4o"), ("mini", "mini:2")]
)
def test_ollamas_tag_may_stand_behind_an_alias_too_unless_somebody_lists_that(alias, name):
    made = names(row("acme/tiny-4b"), kept={TINY: [alias]})
    listed = names(row("acme/tiny-4b"), row(name.casefold()), kept={TINY: [alias]})

    assert made.meaning(name).models == (TINY,)
    assert made.meaning(name).written(TINY) == "acme/tiny-4b"
    assert listed.meaning(name).models == ()
    assert made.find("nobody") == ()


def test_a_tag_that_is_listed_is_asked_for_with_it_whatever_the_key_is_that_is_kept():
    model = ModelId("a", "llama3")
    meaning = names(row("llama3:latest"), kept={model: ()}).meaning("llama3:latest")

    assert (meaning.models, meaning.written(model)) == ((model,), None)


@pytest.mark.parametrize("how", [str, str.upper])
def test_a_variant_with_a_tag_is_that_variant_and_not_the_one_that_is_selected(how):
    kept, nobodys = names(LOADED), names(LISTED, kept={})

    assert kept.meaning(how("acme/tiny-4b@q4_k_m:latest")).models == (TINY,)
    other = kept.meaning(how("acme/tiny-4b@q8_0:latest"))
    assert other == Meaning("a", perhaps=(TINY,), renamed=True, name="acme/tiny-4b@q8_0")
    assert nobodys.meaning(how("acme/tiny-4b@q8_0:latest")).written() == "acme/tiny-4b@q8_0"


def test_a_tag_is_taken_away_where_nobody_lists_it():
    model = ModelId("a", "llama3")

    for made in (names(row("coder"), kept={model: ()}), names(kept={model: ()}, a=None)):
        assert made.meaning("llama3:latest").written(model) == "llama3"


def test_a_row_is_found_by_a_copy_that_is_gone_and_by_a_tag():
    made = names(row("coder"), row("llama3:latest"), kept={})

    assert made.row("a", "coder:7").key == "coder"
    assert made.row("a", "llama3").key == "llama3:latest"


def test_whether_the_default_stands_in_for_nobody_is_told():
    made = names(LOADED, default="gpt-4o-mini")

    assert made.meaning("nobody").stands_in
    assert not made.meaning("gpt-4o-mini").stands_in


def test_a_tag_that_is_listed_beside_its_name_is_another_model():
    bare = ModelId("a", "llama3")
    here = names(row("llama3"), row("llama3:latest"), kept={bare: ()})
    there = names(row("llama3"), kept={bare: ()}, upstreams=("a", "b"), b=[row("llama3:latest")])

    assert here.meaning("llama3:latest") == Meaning("a")
    assert there.meaning("llama3:latest") == Meaning("b")


def test_a_copy_of_a_variant_that_is_listed_by_itself_is_no_copy_of_the_bare_key():
    made = names(row("coder", "coder"), row("coder@q8_0"), kept={})

    assert made.row("a", "coder@q8_0:2").key == "coder@q8_0"


@pytest.mark.parametrize("name", ["on-b:2", "ON-B:7", "on-b@q8_0:2"])
def test_a_copy_that_is_not_listed_is_asked_for_where_its_model_is(name):
    listing = [row("on-b", "on-b", variants=("on-b@q8_0",))]
    made = names(LOADED, upstreams=("a", "b"), b=listing, default="gpt-4o-mini")

    assert made.meaning(name) == Meaning("b")


@pytest.mark.parametrize("how", [str, str.upper])
def test_an_alias_becomes_the_key(how):
    meaning = names(LOADED).meaning(how("gpt-4o-mini"))

    assert meaning.models == (TINY,)
    assert meaning.written(TINY) == "acme/tiny-4b"


def test_an_alias_becomes_the_key_of_that_model_that_is_chosen():
    other = ModelId("b", "acme/large")
    meaning = names(kept={TINY: ["it"], other: ["it"]}, upstreams=("a", "b")).meaning("it")

    assert [meaning.written(model) for model in meaning.models] == ["acme/tiny-4b", "acme/large"]
    assert meaning.written() == "acme/tiny-4b"


def test_only_an_alias_or_the_default_changes_the_name():
    made = names(LOADED, row("other"))

    for name in ("acme/tiny-4b", "ACME/tiny-4b", "acme/tiny-4b:2", VARIANTS[0], "other", "nobody"):
        assert made.meaning(name).written(TINY) is None


@pytest.mark.parametrize(
    ("kept", "listed", "name", "meant"),
    [
        ("acme/tiny-4b", LISTED, "acme/tiny-4b@q4_k_m", True),
        ("acme/tiny-4b", LISTED, "Acme/tiny-4b@Q4_K_M", True),
        ("acme/tiny-4b", LISTED, "acme/tiny-4b@q4_k_m:2", True),
        ("acme/tiny-4b", LISTED, "acme/tiny-4b@q8_0", False),
        ("acme/tiny-4b", LISTED, "acme/tiny-4b@q8_0:2", False),
        # Told by the quantization alone.
        ("acme/tiny-4b", row("acme/tiny-4b", selected=VARIANTS[0]), "acme/tiny-4b@q4_k_m", True),
        ("acme/tiny-4b", row("acme/tiny-4b", selected=VARIANTS[0]), "acme/tiny-4b@q8_0", False),
        # Nothing is known of variants: a second copy is the greater harm.
        ("acme/tiny-4b", row("acme/tiny-4b"), "acme/tiny-4b@q8_0", True),
        ("acme/tiny-4b", row("something-else"), "acme/tiny-4b@q8_0", True),
        # The kept one is a variant itself.
        ("acme/tiny-4b@q4_k_m", LISTED, "acme/tiny-4b@q4_k_m", True),
        ("acme/tiny-4b@q4_k_m", LISTED, "acme/tiny-4b", True),
        ("acme/tiny-4b@Q4_K_M", LISTED, "ACME/tiny-4b", True),
        ("acme/tiny-4b@q8_0", LISTED, "acme/tiny-4b", False),
        ("acme/tiny-4b@q8_0", LISTED, "acme/tiny-4b@q4_k_m", False),
        ("acme/tiny-4b@q8_0", row("acme/tiny-4b"), "acme/tiny-4b", True),
    ],
)
def test_a_variant_is_the_kept_model_where_it_is_the_one_that_is_kept_or_selected(kept, listed, name, meant):
    model = ModelId("a", kept)
    meaning = names(listed, kept={model: ()}).meaning(name)

    assert meaning.models == ((model,) if meant else ())
    assert meaning.known or name.endswith(":2")


def test_of_a_key_and_its_variant_that_are_both_kept_each_name_means_its_own():
    bare, variant = ModelId("a", "acme/tiny-4b"), ModelId("a", "acme/tiny-4b@q8_0")
    made = names(LISTED, kept={bare: (), variant: ()})

    assert made.find("acme/tiny-4b@q8_0") == (variant,)
    assert made.find("acme/tiny-4b") == (bare,)


def test_what_is_loaded_of_a_key_may_answer_for_its_other_variants():
    variant = ModelId("a", "acme/tiny-4b@q8_0")
    renamed = row("acme/tiny-4b", "my-own", variants=VARIANTS, selected=VARIANTS[0])

    assert names(renamed, kept={variant: ()}).meaning("acme/tiny-4b").perhaps == (variant,)
    assert names(LOADED).meaning("acme/tiny-4b@q8_0").perhaps == (TINY,)
    assert names(LISTED).meaning("acme/tiny-4b@q8_0").perhaps == ()


def test_a_variant_is_meant_only_where_it_is_selected():
    other = row("acme/tiny-4b", variants=VARIANTS, selected=VARIANTS[1])
    made = names(LISTED, kept={TINY: (), TINY_B: ()}, upstreams=("a", "b"), b=[other])

    assert made.find(VARIANTS[0]) == (TINY,)
    assert made.find(VARIANTS[1]) == (TINY_B,)


def test_what_looks_like_a_copy_and_is_listed_as_a_key_is_that_key():
    made = names(row("coder"), row("coder:7"), kept={CODER: ()})

    assert made.meaning("coder:7") == Meaning("a")
    assert made.meaning("coder:8").models == (CODER,)


def test_an_instance_is_meant_only_on_the_upstream_that_has_it():
    made = names(kept={TINY: (), TINY_B: ()}, upstreams=("a", "b"), b=[LOADED])

    assert made.find("my-own") == (TINY_B,)


def test_a_key_comes_before_an_alias_and_an_alias_before_an_instance_and_that_before_a_listed_model():
    tiny = row("acme/tiny-4b", "gpt-4o", "coder", "free")
    made = names(tiny, row("free"), row("gpt-4o"), kept={TINY: ["gpt-5"], CODER: ["gpt-4o"]})

    assert made.find("coder") == (CODER,)
    assert made.find("gpt-4o") == (CODER,)
    assert made.find("free") == (TINY,)


@pytest.mark.parametrize("name", ["on-b", "ON-B", "on-b-instance", "on-b@q8_0", "plain@q8_0"])
def test_what_some_upstream_lists_is_asked_for_there(name):
    listing = [row("on-b", "on-b-instance", variants=("on-b@q8_0",)), row("plain")]
    made = names(LISTED, upstreams=("a", "b"), b=listing)

    assert made.meaning(name) == Meaning("b")


def test_of_several_that_list_it_the_first_is_asked_unless_another_is_up_or_has_it_loaded():
    cold, warm = row("m"), row("m", "m")
    up = {"a", "b"}

    assert names(cold, upstreams=("a", "b"), b=[cold]).meaning("m", up).upstream == "a"
    assert names(cold, upstreams=("a", "b"), b=[warm]).meaning("m", up).upstream == "b"
    assert names(cold, upstreams=("a", "b"), b=[cold]).meaning("m", {"b"}).upstream == "b"
    assert names(cold, upstreams=("a", "b"), b=[warm]).meaning("m", {"a"}).upstream == "a"


def test_without_a_default_lm_studio_decides_at_the_first_upstream():
    made = names(LISTED, upstreams=("a", "b"))

    assert made.meaning("nobody") == Meaning("a", known=False)
    assert made.meaning(None) == made.meaning("") == Meaning("a", known=False)


@pytest.mark.parametrize("name", [None, "", "nobody"])
@pytest.mark.parametrize("default", ["acme/tiny-4b", "ACME/TINY-4B", "gpt-4o-mini", "acme/tiny-4b@q4_k_m"])
def test_the_default_stands_for_no_name_and_for_one_that_nobody_lists(name, default):
    meaning = names(LISTED, default=default).meaning(name)

    assert meaning.models == (TINY,)
    assert meaning.written(TINY) == "acme/tiny-4b"
    assert meaning.known


def test_a_default_that_is_another_variant_is_asked_for_by_its_name():
    meaning = names(LISTED, default="acme/tiny-4b@q8_0").meaning(None)

    assert (meaning.models, meaning.upstream, meaning.written()) == ((), "a", "acme/tiny-4b@q8_0")


def test_the_default_does_not_stand_for_what_is_listed():
    assert names(LISTED, row("other"), default="acme/tiny-4b").meaning("other") == Meaning("a")


def test_a_name_that_nobody_knows_yet_may_still_be_listed():
    made = names(LISTED, upstreams=("a", "b"), default="acme/tiny-4b", b=None)

    assert made.meaning("on-b").open == {"b"}
    made.unheard("b")
    assert made.meaning("on-b").open == set()


def test_a_variant_may_still_turn_out_to_be_another_model():
    made = names(upstreams=("a", "b"), a=None, b=None)

    assert made.meaning("acme/tiny-4b@q8_0") == Meaning("a", (TINY,), open=frozenset("a"))
    assert made.meaning("acme/tiny-4b").open == made.meaning("gpt-4o-mini").open == set()


def test_a_listing_holds_until_the_next_one_or_until_its_server_is_another():
    made = names(LISTED, upstreams=("a", "b"), b=[row("on-b")])

    made.unheard("b")
    assert made.meaning("on-b").upstream == "b"
    made.forget("b")
    assert made.meaning("on-b") == Meaning("a", known=False, open=frozenset("b"))
    made.listed("b", {})
    assert made.meaning("on-b") == Meaning("a", known=False)


def test_an_upstream_that_left_the_config_is_no_longer_asked():
    made = names(LISTED, upstreams=("a", "b"), b=[row("on-b")])
    made.configure(["a"], {TINY: ()})

    assert made.meaning("on-b") == Meaning("a", known=False)


def test_aliases_belong_to_the_row_that_lists_their_model():
    variant = ModelId("a", "acme/tiny-4b@q4_k_m")
    made = names(
        LISTED, kept={variant: ["it"], CODER: ["c1", "c2"], ModelId("b", "x"): ["y"]}, upstreams=("a", "b")
    )

    assert made.rows("a") == {"acme/tiny-4b": ["it"], "coder": ["c1", "c2"]}


def test_all_that_is_loaded_is_told_each_once_whatever_it_is_called():
    made = names(LOADED, row("idle"), upstreams=("a", "b"), b=[row("other", "mine")])

    assert made.loaded() == [TINY, ModelId("b", "other")]


# --- line by line -------------------------------------------------------------------------------------------------


def test_the_name_is_written_as_the_model_of_the_upstream_that_is_asked_is_called_there():
    elsewhere = ModelId("b", "acme/tiny-4b-gguf")
    made = names(row("acme/tiny-4b"), kept={elsewhere: ["it"], TINY: ["it"]}, upstreams=("a", "b"))

    meaning = made.meaning("it", {"a"})

    assert (meaning.upstream, meaning.written()) == ("a", "acme/tiny-4b")


def test_of_several_upstreams_that_keep_it_the_one_that_is_up_comes_first_then_the_one_that_has_it_loaded():
    cold, warm = row("acme/tiny-4b"), row("acme/tiny-4b", "acme/tiny-4b")
    both = {TINY: (), TINY_B: ()}

    def asked(on_a, on_b, *up):
        made = names(on_a, kept=both, upstreams=("a", "b"), b=[on_b])
        return made.meaning("acme/tiny-4b", set(up)).upstream

    assert asked(cold, cold, "a", "b") == asked(cold, cold) == "a"
    assert asked(cold, warm, "a", "b") == "b"
    assert asked(warm, cold, "a", "b") == "a"
    assert asked(warm, cold, "b") == "b"


def test_a_variant_that_a_listing_does_not_name_is_none_of_those_that_it_does_name():
    made = names(row("on-a", variants=("on-a@q4",)), row("plain"))

    assert made.meaning("on-a@q8") == Meaning("a", known=False)
    assert made.meaning("plain@q8") == Meaning("a")


def test_a_listed_key_comes_before_an_instance_that_is_called_like_it():
    made = names(row("x", "y"), row("y"), kept={})

    assert made.row("a", "y").key == "y"


def test_the_row_of_a_name_is_found_by_key_instance_and_by_the_variant_that_is_loaded():
    made = names(LOADED, row("bare"), upstreams=("a", "b"), b=None)

    for name in ("acme/tiny-4b", "ACME/Tiny-4B", "my-own", "acme/tiny-4b@Q4_K_M"):
        assert made.row("a", name) is LOADED
    assert made.row("a", "acme/tiny-4b@q8_0") is None
    assert made.row("a", "bare@q8_0").key == "bare"  # nothing is known of its variants
    assert made.row("a", "nobody") is None
    assert made.row("b", "acme/tiny-4b") is None


def test_a_row_that_is_a_variant_itself_is_found_by_its_key():
    itself = row("acme/tiny-4b@q8_0", selected="acme/tiny-4b@q4_k_m")

    assert names(itself).row("a", "acme/tiny-4b@Q8_0") is itself


def test_an_instance_whose_name_has_an_at_is_no_other_variant_than_what_is_loaded():
    odd = row("acme/tiny-4b", "mine@home", selected=None)

    assert names(odd).row("a", "mine@home") is odd


def test_a_new_listing_is_heard_and_the_same_again_changes_nothing():
    made = names(row("x"), kept={})
    made.listed("a", {"y": row("y")})
    assert (made.row("a", "x"), made.row("a", "y")) == (None, row("y"))

    first = {"y": row("y", "copy")}
    made.listed("a", first)
    made.listed("a", {"y": row("y", "copy")})

    assert made.row("a", "copy") is first["y"]


def test_what_an_upstream_that_left_listed_is_not_loaded_any_more():
    made = names(LOADED, upstreams=("a", "b"), b=[row("other", "mine")])
    made.configure(["a"], {TINY: ()})

    assert made.loaded() == [TINY]


def test_where_nobody_may_stand_in_the_default_does_not():
    made = names(LISTED, default="acme/tiny-4b")

    assert made.meaning("nobody", default=False) == Meaning("a", known=False)


def test_a_model_without_aliases_has_no_row_of_them():
    assert names(LISTED, kept={TINY: ()}).rows("a") == {}


def test_only_of_a_variant_may_a_first_listing_tell_that_it_is_another_model():
    bare, variant = TINY, ModelId("a", "acme/tiny-4b@q4_k_m")
    made = names(kept={bare: ["acme/tiny-4b@q8_0"], variant: ()}, a=None)

    for name in ("acme/tiny-4b", "acme/tiny-4b@q4_k_m", "acme/tiny-4b@q8_0"):
        assert made.meaning(name).open == set()
    assert made.meaning("acme/tiny-4b@f16").open == {"a"}


def test_what_may_answer_in_its_place_is_on_the_upstream_that_is_asked():
    other = row("acme/tiny-4b", "acme/tiny-4b", variants=VARIANTS, selected=VARIANTS[0])
    made = names(LOADED, kept={TINY: (), TINY_B: ()}, upstreams=("a", "b"), b=[other])

    assert made.meaning("acme/tiny-4b@q8_0", {"a", "b"}) == Meaning("a", perhaps=(TINY,))


def test_a_copy_is_listed_as_a_key_where_any_upstream_lists_it_so():
    made = names(row("coder"), kept={CODER: ()}, upstreams=("a", "b"), b=[row("coder:7")])

    assert made.find("coder:7") == ()
    assert made.meaning("coder:7") == Meaning("b")


def test_all_that_any_upstream_lists_can_be_looked_through():
    made = names(LOADED, row("idle"), upstreams=("a", "b"), b=[row("other")])

    assert list(dict.fromkeys(entry.key for entry in made.entries())) == ["acme/tiny-4b", "idle", "other"]


@pytest.mark.parametrize("name", ["acme/tiny-4b\n", " Acme/Tiny-4b ", "acme/tiny-4b\u00a0", "small\r\n"])
def test_space_around_a_name_does_not_belong_to_it_and_goes_no_further(name):
    kept = names(LISTED, kept={TINY: ("small",)})

    assert kept.meaning(name).models == kept.find(name) == (TINY,)
    assert (kept.meaning(name).written(TINY), kept.meaning(name).stands_in) == ("acme/tiny-4b", False)
    assert names(LISTED, kept={}).meaning("acme/tiny-4b\n").written() == "acme/tiny-4b"
    assert not kept.meaning(" ").known


def test_space_around_a_name_and_a_tag_that_is_listed_go_together():
    assert names(row("llama3:latest"), kept={}).meaning(" llama3\n").written() == "llama3:latest"


@pytest.mark.parametrize(
    "name", ['"acme/tiny-4b"', "'ACME/tiny-4b' ", "\ufeffacme/tiny-4b\r\n", '"small"', '" small "']
)
def test_quotes_and_marks_around_a_name_do_not_belong_to_it_either(name):
    kept = names(LISTED, kept={TINY: ("small",)})

    assert kept.meaning(name).models == kept.find(name) == (TINY,)
    assert kept.meaning(name).written(TINY) == "acme/tiny-4b"
    assert names(LISTED, kept={}).meaning('"acme/tiny-4b"').written() == "acme/tiny-4b"
    assert not kept.meaning('"').known
    assert not kept.meaning('""').known


def test_an_alias_that_has_quotes_is_meant_with_them():
    kept = names(LISTED, row("coder"), kept={TINY: ('"small"',), CODER: ("small",)})

    assert (kept.find('"Small"'), kept.find("small")) == ((TINY,), (CODER,))
