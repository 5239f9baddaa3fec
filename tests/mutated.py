"""JSON documents with some of their values replaced by any others, or gone."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.sampled_from([7, 2**31, 2**63, 10**400, -(10**400), 1e308, 5e-324])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["fp16", "fp32", "v2", "linear", "internvl2_5", "../x", "a\0", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every path in a JSON document, inner ones included."""
    found = [prefix] if prefix else []
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += paths(inner, (*prefix, key))
    return found


def mutated(manifest: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    manifest = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        *steps, last = data.draw(st.sampled_from(paths(manifest)), label="path")
        place = manifest
        for step in steps:
            place = place[step]
        if data.draw(st.booleans(), label="delete"):
            del place[last]
            if not manifest:
                break
        else:
            place[last] = data.draw(JSON, label="value")
    return manifest
