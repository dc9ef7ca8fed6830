"""Answers held against the service's model, as they come in."""

from __future__ import annotations

from typing import Any

from ahi_ml.local.protocol import Protocol

PROTOCOL = Protocol()


def hold_to_the_model(client: Any) -> Any:
    """Make a boto3 client fail when an answer is not the model's, or an error not one of its operation."""

    def check(parsed: dict[str, Any], model: Any, **_: Any) -> None:
        if "Error" in parsed:
            assert parsed["Error"]["Code"] in {shape.name for shape in model.error_shapes}
            return
        result = {name: value for name, value in parsed.items() if name != "ResponseMetadata"}
        for name in ("imageFrameBlob", "imageSetMetadataBlob"):
            if name in result:
                result[name] = b""
        assert PROTOCOL.check(model.name, result) == []

    client.meta.events.register("after-call.medical-imaging", check)
    return client
