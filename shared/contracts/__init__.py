"""The messages of the mesh, one module for each noun.

Every type is a frozen, keyword-only `msgspec.Struct`. Additions carry defaults; a breaking change is a new type on a
`v2` subject. `tests/contracts` holds golden bytes that must decode for ever.
"""
