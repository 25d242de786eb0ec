import pytest

from keepalive.protocols.forms import asked_in_form, boundary_of, renamed_form

FORM = (
    b'--x1\r\nContent-Disposition: form-data; name="file"; filename="model"\r\nContent-Type: audio/wav\r\n\r\n'
    b'RIFF\0\xff\r\n--x\r\n name="model"\r\n'
    b'\r\n--x1\r\nContent-Disposition: form-data; name="model"\r\n\r\nold\r\n'
    b"--x1\r\ncontent-disposition: form-data; NAME=model\r\n\r\nwhisper\r\n"
    b'--x1\r\nContent-Disposition: form-data; name="language"\r\n\r\nde\r\n--x1--\r\n'
)


@pytest.mark.parametrize(
    ("kind", "boundary"),
    [
        (b"multipart/form-data; boundary=x1", b"x1"),
        (b'Multipart/Form-Data; charset=utf-8; Boundary="x 1"', b"x 1"),
        (b"multipart/form-data", None),
        (b"application/json; boundary=x1", None),
        (None, None),
    ],
)
def test_what_stands_between_the_fields_is_told_by_the_type(kind, boundary):
    assert boundary_of(kind) == boundary


def test_the_last_field_of_that_name_says_who_is_meant_and_alone_is_changed():
    asked = asked_in_form(FORM, b"x1")

    assert (asked.model, asked.readable, asked.stream) == ("whisper", True, False)
    assert renamed_form(FORM, b"x1", "ear") == FORM.replace(b"whisper", b"ear")
    assert asked_in_form(FORM.replace(b"whisper", b"w" * 5000), b"x1").misnamed


def test_a_form_that_is_cut_off_or_names_nobody_says_nothing():
    for end in range(len(FORM)):
        assert asked_in_form(FORM[:end], b"x1").model in (None, "old", "whisper")
    for body in (b"", b"--x1", b'{"model":"m"}', FORM.replace(b"odel", b"ope")):
        assert (asked_in_form(body, b"x1").readable, renamed_form(body, b"x1", "ear")) == (False, None)
