"""The result of an evaluation."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """Metric values with the protocol that makes them comparable."""

    values: Mapping[str, float]
    protocol: Mapping[str, Any]
    line: str
    """Values and protocol in one line of text."""


def to_json(reports: Sequence[Report]) -> str:
    """All values and protocols as one JSON object."""
    values = {name: value for report in reports for name, value in report.values.items()}
    protocol = {name: value for report in reports for name, value in report.protocol.items()}
    return json.dumps({"values": values, "protocol": protocol}, indent=2, ensure_ascii=False) + "\n"
