"""A JSON schema of the file, made from the tables, for editors."""

import ast
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from keepalive.config import tables
from keepalive.config.addresses import Address
from keepalive.config.tables import Config
from keepalive.config.values import written


class _AsWritten(GenerateJsonSchema):
    """Defaults as they stand in the file; no null, which TOML does not have; no title that repeats a key."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        found = super().default_schema(schema)
        if found.get("default", ...) is None:
            del found["default"]
        return found

    def encode_default(self, dft: Any) -> Any:
        match dft:
            case Address():
                return str(dft)
            case float():
                return written(dft)
            case BaseModel() | (BaseModel(), *_):
                return None  # said key by key in its own table
        return super().encode_default(dft)

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> dict[str, Any]:
    found = Config.model_json_schema(schema_generator=_AsWritten)
    for table, key, text in _help():
        keys = (found if table == Config.__name__ else found["$defs"][table])["properties"]
        keys[key] = dict(sorted({**keys[key], "description": text}.items()))
    return {"$schema": "http://json-schema.org/draft-07/schema#", **found, "title": "keepalive config.toml"}


def _help() -> Iterator[tuple[str, str, str]]:
    """What an editor shows for a key, which is the docstring below it: a table, its key, the text.

    pydantic would read them for each start of the daemon.
    """
    for table in ast.parse(inspect.getsource(tables)).body:
        lines = table.body if isinstance(table, ast.ClassDef) else []
        for line, below in itertools.pairwise(lines):
            match table, line, below:
                case (
                    ast.ClassDef(name=name),
                    ast.AnnAssign(target=ast.Name(id=key)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    yield name, key, inspect.cleandoc(text)
