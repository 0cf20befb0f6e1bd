"""What the tests of the command share."""

from __future__ import annotations

from dataclasses import dataclass

SMALL = ["--steps", "1", "--height", "8", "--width", "8", "--max-sequence-length", "16"]
QUICK = ["--rank", "16", "--smooth-grid", "2", "--calibration-rows", "64"]


@dataclass
class Result:
    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one sentence of a refused command."""
        lines = self.err.splitlines()
        assert self.code == 2, (self.code, self.out, self.err)
        assert len(lines) == 1 and lines[0].startswith("svdquant: "), self.err
        assert self.out == ""
        return lines[0]
