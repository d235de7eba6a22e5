"""What was found out about a data set on the way: every file that was left out, mended or read in an unusual way."""

import re
from collections import Counter
from dataclasses import dataclass, field


SHOWN = 100
"""Lines that a printed report has of each severity; the rest is counted."""
KINDS = 10
"""Sorts of reasons that are counted there, the most frequent first."""


@dataclass
class Report:
    """Lines of (name of the file, what is with it), and figures. Nothing here stops anything."""

    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Files that are not in the data set."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Files that are, but not quite as they were."""
    figures: list[str] = field(default_factory=list)

    def skip(self, name: str, reason: object) -> None:
        self.skipped.append((name, str(reason)))

    def note(self, name: str, text: object) -> None:
        self.notes.append((name, str(text)))

    def extend(self, other: "Report") -> None:
        self.skipped += other.skipped
        self.notes += other.notes
        self.figures += other.figures

    def text(self) -> str:
        """Figures first, then what was left out, then what was noticed."""
        lines = list(self.figures)
        for title, entries in (("left out", self.skipped), ("noticed", self.notes)):
            if entries:
                lines.append(f"{title}: {len(entries)}")
                lines += [f"  {name}: {text}" for name, text in entries[:SHOWN]]
            if len(entries) > SHOWN:
                lines.append(f"  and {len(entries) - SHOWN} more. In all:")
                kinds = Counter(re.split(r" \(|: ", text)[0] for _, text in entries).most_common(KINDS)
                lines += [f"  {count} times: {kind}" for kind, count in kinds]
        return "\n".join(lines)
