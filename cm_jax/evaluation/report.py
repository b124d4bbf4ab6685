"""What an evaluation says."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """Numbers, and the protocol without which they cannot be compared."""

    values: Mapping[str, float]
    protocol: Mapping[str, Any]
    line: str
    """Both in one line, to paste into a paper."""


def to_json(reports: Sequence[Report]) -> str:
    values = {name: value for report in reports for name, value in report.values.items()}
    protocol = {name: value for report in reports for name, value in report.protocol.items()}
    return json.dumps({"values": values, "protocol": protocol}, indent=2, ensure_ascii=False) + "\n"
